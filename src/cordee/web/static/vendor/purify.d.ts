// What the page uses of DOMPurify, for the type checker.
declare const DOMPurify: {
  sanitize(text: string, options: any): DocumentFragment;
  addHook(place: "afterSanitizeAttributes", hook: (node: Element) => void): void;
};
export default DOMPurify;
