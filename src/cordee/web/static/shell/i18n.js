/**
 * Words in the reader's language: that of the browser, or the one that was chosen here. Each part of the page has a
 * file for each language, `i18n/PART.LANGUAGE.json`, whose keys begin with the part's name.
 */
import { makeStore } from "./store.js";

export const LANGUAGES = { en: "English", fr: "Français" };
const KEPT = "cordee-language";

/** @typedef {keyof typeof LANGUAGES} Language */

/** The language in use. @type {import("./store.js").Store<Language>} */
export const language = makeStore(firstLanguage());

/** @type {Record<string, Record<string, string>>} by language, then by key */
const words = { en: {}, fr: {} };
/** @type {Set<string>} */
const parts = new Set();

/** @returns {Language} */
function firstLanguage() {
  const wanted = [localStorage.getItem(KEPT) ?? "", ...navigator.languages];
  for (const each of wanted) {
    const short = each.slice(0, 2).toLowerCase();
    if (short === "en" || short === "fr") return short;
  }
  return "en";
}

/**
 * Load the words of a part of the page, in the language in use.
 * @param {string} part
 */
export async function loadWords(part) {
  parts.add(part);
  await load(part, language.get());
  document.documentElement.lang = language.get();
}

/** @param {string} part @param {Language} wanted */
async function load(part, wanted) {
  const url = new URL(`../i18n/${part}.${wanted}.json`, import.meta.url);
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url.pathname}: ${response.status}`);
  Object.assign(words[wanted], await response.json());
}

/**
 * Use another language from now on.
 * @param {Language} wanted
 */
export async function choose(wanted) {
  await Promise.all([...parts].map((part) => load(part, wanted)));
  localStorage.setItem(KEPT, wanted);
  document.documentElement.lang = wanted;
  language.set(wanted);
}

/**
 * The text of a key, with `{name}` replaced by the values. Where it has a `count`, the form of the language for that
 * many is taken: `KEY.one` or `KEY.other`.
 * @param {string} key
 * @param {Record<string, string | number>} [values]
 * @returns {string}
 */
export function t(key, values = {}) {
  const known = words[language.get()];
  let text = known[key];
  if (text === undefined && typeof values.count === "number") {
    const form = new Intl.PluralRules(language.get()).select(values.count);
    text = known[`${key}.${form === "one" ? "one" : "other"}`];
  }
  if (text === undefined) return key;
  return text.replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === "number" ? value.toLocaleString(language.get()) : String(value ?? "");
  });
}

/**
 * A number as people of the language write it.
 * @param {number} value
 * @param {Intl.NumberFormatOptions} [options]
 */
export function number(value, options) {
  return new Intl.NumberFormat(language.get(), options).format(value);
}

/**
 * Bytes in the largest unit that leaves a number of at least 1: powers of 1,000, as `cordee` writes them.
 * @param {number} value
 */
export function bytes(value) {
  const units = language.get() === "fr" ? ["o", "ko", "Mo", "Go", "To"] : ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${number(value, { maximumFractionDigits: value < 10 && place > 0 ? 1 : 0 })}\u00a0${units[place]}`;
}

/**
 * A time of day, or a date where it was not today.
 * @param {number} milliseconds since 1970
 */
export function when(milliseconds) {
  const date = new Date(milliseconds);
  const isToday = date.toDateString() === new Date().toDateString();
  return date.toLocaleString(language.get(), isToday ? { timeStyle: "short" } : { dateStyle: "medium" });
}
