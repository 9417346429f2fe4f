/** Blocks of code in an answer: their language, a button that copies, colours. */
import { t } from "../shell/i18n.js";
import { clean } from "./markdown.js";

/** What is longer is shown without colours: they take a second at ten times this. */
const COLOURED_CHARS_MAX = 20_000;

/** @type {Promise<typeof import("../vendor/highlight.js").default> | null} */
let colours = null;

/**
 * Give a `pre` of an answer its heading, and colours once they are loaded.
 * @param {HTMLElement} pre
 * @param {string} language as the answer names it
 */
export function furnish(pre, language) {
  const frame = document.createElement("div");
  frame.className = "code";
  const heading = document.createElement("div");
  heading.className = "code-heading";
  const name = document.createElement("span");
  name.textContent = language;
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "plain";
  copy.textContent = t("chat.copy");
  copy.addEventListener("click", () => void copied(copy, pre.textContent ?? ""));
  heading.append(name, copy);
  pre.replaceWith(frame);
  pre.tabIndex = 0; // it scrolls sideways, also by keyboard
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", t("chat.code", { language }));
  pre.dir = "ltr";
  frame.append(heading, pre);
}

/**
 * Colour a block of code that will not change any more.
 * @param {HTMLElement} code
 * @param {string} language
 */
export async function colour(code, language) {
  const text = code.textContent ?? "";
  if (!language || text.length > COLOURED_CHARS_MAX) return;
  colours ??= import("../vendor/highlight.js").then((module) => module.default);
  const known = await colours;
  if (!known.getLanguage(language) || code.textContent !== text) return;
  code.replaceChildren(clean(known.highlight(text, { language, ignoreIllegals: true }).value));
}

/**
 * Copy a text, and say so on the button.
 * @param {HTMLElement} button
 * @param {string} text
 */
export async function copied(button, text) {
  const before = button.textContent;
  button.textContent = t((await copy(text)) ? "chat.copied" : "chat.not_copied");
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
}

/**
 * Put a text on the clipboard. Over plain HTTP, browsers offer the old way only.
 * @param {string} text
 * @returns {Promise<boolean>}
 */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
