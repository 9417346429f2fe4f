// What the page uses of markdown-it, for the type checker.
export interface Token {
  type: string;
  nesting: number;
  level: number;
  map: [number, number] | null;
  content: string;
  attrGet(name: string): string | null;
  attrSet(name: string, value: string): void;
  attrs: [string, string][] | null;
}
export default class MarkdownIt {
  constructor(options?: any);
  disable(rules: string[]): MarkdownIt;
  parse(text: string, env: object): Token[];
  inline: { ruler: { before(place: string, name: string, rule: (state: any, silent: boolean) => boolean): void } };
  core: { ruler: { push(name: string, rule: (state: { tokens: Token[] }) => void): void } };
  renderer: { rules: Record<string, any>; render(tokens: Token[], options: any, env: object): string };
  options: any;
  linkify: { set(options: any): void };
  utils: { escapeHtml(text: string): string };
}
