/** What a machine says, in the reader's language where that is known; else in English, and marked as such. */
import { language, number } from "../shell/i18n.js";
import { useStore } from "../shell/store.js";
import { html } from "../vendor/preact.js";
import { phrasesOf, translated } from "./phrases.js";

/** @param {string} value */
const decimal = (value) => number(Number.parseFloat(value), { maximumFractionDigits: 9 });
/** @type {import("./phrases.js").Written} */
const FRENCH = {
  number: decimal,
  size: (value) => `${decimal(value)}\u00a0Go`,
  list: (value) => value.replace(/ or /g, " ou ").replace(/ and /g, " et "),
};
const table = await (await fetch(new URL("./said.fr.json", import.meta.url))).json();
const french = phrasesOf(table);

/** @param {string} text @returns {string | null} null: not known in the reader's language */
export function inWords(text) {
  if (language.get() !== "fr") return null;
  return translated(french, text, FRENCH);
}

/** @param {{text: string}} props */
export function Said({ text }) {
  useStore(language);
  const found = inWords(text);
  return found === null ? html`<span lang="en">${text}</span>` : html`<span>${found}</span>`;
}
