// What the page uses of eventsource-parser, for the type checker.
export function createParser(options: {
  onEvent(event: { data: string }): void;
  onComment?(comment: string): void;
}): { feed(text: string): void };
