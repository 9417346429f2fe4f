// What the page uses of highlight.js, for the type checker.
declare const core: {
  getLanguage(name: string): object | undefined;
  highlight(code: string, options: { language: string; ignoreIllegals?: boolean }): { value: string };
};
export default core;
