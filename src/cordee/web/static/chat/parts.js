/**
 * The parts of a block that may grow long: the rows of a table, the items of a list. All but the last of them can no
 * longer change when more comes; pure.
 */

/**
 * @typedef {import("./markdown.js").Block} Block
 * @typedef {{open: Block["tokens"], parts: Block[], close: Block["tokens"]}} Divided
 * `open` and `close` are what stands before the first part and behind the last
 */

/**
 * The parts of a block; null where it has none.
 * @param {Block} block
 * @returns {Divided | null}
 */
export function divided(block) {
  const { tokens } = block;
  const kind = tokens[0]?.type ?? "";
  const isTable = kind === "table_open";
  if (!isTable && kind !== "bullet_list_open" && kind !== "ordered_list_open") return null;
  const begin = 1 + (isTable ? tokens.findIndex((token) => token.type === "tbody_open") : 0);
  if (begin === 0) return null; // a table without rows
  const end = tokens.length - (isTable ? 2 : 1);
  const level = isTable ? 2 : 1;
  /** @type {Block[]} */
  const parts = [];
  for (const token of tokens.slice(begin, end)) {
    if (token.level === level && token.nesting === 1) parts.push({ first: token.map?.[0] ?? 0, tokens: [] });
    parts[parts.length - 1]?.tokens.push(token);
  }
  return { open: tokens.slice(0, begin), parts, close: tokens.slice(end) };
}

/**
 * A block with only some of its parts.
 * @param {Divided} whole
 * @param {Block[]} parts
 * @returns {Block}
 */
export function joined({ open, close }, parts) {
  return { first: 0, tokens: [...open, ...parts.flatMap((part) => part.tokens), ...close] };
}

/**
 * The rows or items of a block that is drawn.
 * @param {DocumentFragment} fragment
 * @returns {{element: HTMLElement, parts: ChildNode[]}}
 */
export function drawnParts(fragment) {
  const element = /** @type {HTMLElement} */ (fragment.querySelector("tbody") ?? fragment.firstElementChild);
  return { element, parts: element?.localName === "table" ? [] : [...(element?.childNodes ?? [])] };
}
