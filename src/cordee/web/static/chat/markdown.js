/**
 * Markdown of an answer as elements of the page. Nothing in it can act or load: HTML is text, pictures are links, and
 * what is left goes through DOMPurify. Formulas stay as they were written.
 */
import MarkdownIt from "../vendor/markdown-it.js";
import DOMPurify from "../vendor/purify.js";

const TAGS = [
  ...["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre"],
  ...["s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
];
const ATTRIBUTES = ["class", "href", "start"];
const LINK = /^(?:https?:|mailto:)/i;
/**
 * Characters that change the direction in which text is drawn, and so what it seems to say: they are shown as codes.
 */
const DIRECTION = /[\u202A-\u202E\u2066-\u2069]/g;
const FORMULA = /^(?:\$\$[^$]+\$\$|\$(?!\s)[^$\n]*[^$\s\\]\$(?!\d)|\\\([\s\S]+?\\\)|\\\[[\s\S]+?\\\])/;
/** Of a formula: what is longer is none. */
const FORMULA_CHARS_MAX = 2000;

const markdown = new MarkdownIt({ html: false, linkify: true, typographer: false });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
markdown.inline.ruler.before("escape", "formula", formula);
markdown.core.ruler.push("plain", plain);
markdown.renderer.rules.formula = (/** @type {any[]} */ tokens, /** @type {number} */ at) =>
  `<span class="formula">${markdown.utils.escapeHtml(tokens[at].content)}</span>`;
markdown.renderer.rules.image = (/** @type {any[]} */ tokens, /** @type {number} */ at) => {
  const token = tokens[at];
  const url = markdown.utils.escapeHtml(token.attrGet("src") ?? "");
  return `<a href="${url}">${markdown.utils.escapeHtml(token.content || token.attrGet("src") || "")}</a>`;
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  const target = node.getAttribute("href") ?? "";
  if (!LINK.test(target)) {
    node.removeAttribute("href");
    return;
  }
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
  node.setAttribute("title", readable(target));
});

/**
 * A rule of markdown-it: `$…$`, `$$…$$`, `\(…\)` and `\[…\]` are kept as they are.
 * @param {any} state
 * @param {boolean} silent
 */
function formula(state, silent) {
  const first = state.src[state.pos];
  if (first !== "$" && first !== "\\") return false;
  const found = FORMULA.exec(state.src.slice(state.pos, state.pos + FORMULA_CHARS_MAX));
  if (found === null) return false;
  if (!silent) state.push("formula", "", 0).content = found[0];
  state.pos += found[0].length;
  return true;
}

/**
 * A rule of markdown-it: cells are aligned by classes, since the page allows no styles in its content.
 * @param {{tokens: import("../vendor/markdown-it.js").Token[]}} state
 */
function plain(state) {
  for (const token of state.tokens) {
    const side = /^text-align:(\w+)$/.exec(token.attrGet("style") ?? "")?.[1];
    if (side) {
      token.attrs = null;
      token.attrSet("class", `to-${side}`);
    }
  }
}

/**
 * Text as it is shown: characters that turn its direction are named.
 * @param {string} text
 */
export function readable(text) {
  return text.replace(DIRECTION, (each) => `⟦U+${each.charCodeAt(0).toString(16).toUpperCase()}⟧`);
}

/**
 * @typedef {{first: number, tokens: import("../vendor/markdown-it.js").Token[]}} Block
 * A block of the text, such as a paragraph, a list or a table; `first` is its first line, from 0.
 */

/**
 * The blocks of a text.
 * @param {string} text
 * @returns {Block[]}
 */
export function blocks(text) {
  /** @type {Block[]} */
  const found = [];
  let depth = 0;
  for (const token of markdown.parse(readable(text), {})) {
    if (depth === 0 && token.nesting >= 0) found.push({ first: token.map?.[0] ?? 0, tokens: [] });
    found[found.length - 1]?.tokens.push(token);
    depth += token.nesting;
  }
  return found;
}

/**
 * A block as elements.
 * @param {Block} block
 * @returns {DocumentFragment}
 */
export function drawn(block) {
  const text = markdown.renderer.render(block.tokens, markdown.options, {});
  const fragment = clean(text);
  for (const each of fragment.children) each.setAttribute("dir", "auto");
  return fragment;
}

/**
 * HTML as elements that can do nothing.
 * @param {string} text
 * @returns {DocumentFragment}
 */
export function clean(text) {
  return DOMPurify.sanitize(text, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
}
