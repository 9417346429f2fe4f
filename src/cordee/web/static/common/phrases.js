/**
 * Sentences of the machines, which are English, in another language: each is known by its English form, in which
 * `{kind:name}` or `{kind}` stands for what differs. Pure.
 *
 * Kinds: `said` is a sentence or a part of one that is translated, too; `size` an amount such as `1.5 GB`; `number`;
 * `list` names such as `a, b or c`; `nearest` what is asked behind a name that does not exist, if anything; what has
 * another kind, or none, stands as it is.
 */

/** What a machine says is shorter; a longer text is shown as it is. */
const CHARS_MAX = 4000;
/** Sentences within sentences. */
const DEPTH_MAX = 6;
const PLACE = /\{(?:(\w+):)?(\w+)\}/g;
/** @type {Record<string, string>} */
const KINDS = {
  said: ".*",
  size: "-?\\d+(?:\\.\\d+)? GB",
  number: "-?\\d+(?:\\.\\d+)?",
  list: ".+",
  nearest: "(?: \\(did you mean .+\\?\\))?", // as nearest() in src/cordee/errors.py
};

/** @typedef {{pattern: RegExp, kinds: Map<string, string>, other: string}} Phrase */
/** @typedef {Record<string, (value: string) => string>} Written how the language writes what is of a kind */

/**
 * The phrases of a language, the ones with most words first.
 * @param {Record<string, string>} table English forms, and the other language's
 * @returns {Phrase[]}
 */
export function phrasesOf(table) {
  /** @param {string} form */
  const fixed = (form) => form.replace(PLACE, "").length;
  return Object.entries(table)
    .sort(([one], [other]) => fixed(other) - fixed(one))
    .map(([form, other]) => {
      /** @type {Map<string, string>} */
      const kinds = new Map();
      const parts = form.split(PLACE); // text, kind or nothing, name, text, …
      let pattern = "";
      for (let at = 0; at < parts.length; at += 3) {
        pattern += (parts[at] ?? "").replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
        const name = parts[at + 2];
        if (name === undefined) continue;
        const kind = parts[at + 1] ?? name;
        kinds.set(name, kind);
        pattern += `(?<${name}>${KINDS[kind] ?? ".+?"})`;
      }
      return { pattern: new RegExp(`^${pattern}$`, "s"), kinds, other };
    });
}

/**
 * A sentence in the other language; null where it is not known, or a part of it is not.
 * @param {Phrase[]} phrases
 * @param {string} text
 * @param {Written} written
 * @returns {string | null}
 */
export function translated(phrases, text, written, depth = 0) {
  if (text.length > CHARS_MAX || depth > DEPTH_MAX) return null;
  if (text === "") return "";
  for (const { pattern, kinds, other } of phrases) {
    const match = pattern.exec(text);
    if (match === null) continue;
    let isKnown = true;
    const found = other.replace(PLACE, (_, kind, name) => {
      const value = shown(phrases, kinds.get(name) ?? kind ?? "", match.groups?.[name] ?? "", written, depth);
      isKnown &&= value !== null;
      return value ?? "";
    });
    if (isKnown) return found;
  }
  return null;
}

/**
 * @param {Phrase[]} phrases
 * @param {string} kind
 * @param {string} value
 * @param {Written} written
 * @param {number} depth
 * @returns {string | null}
 */
function shown(phrases, kind, value, written, depth) {
  if (kind === "said" || kind === "nearest") return translated(phrases, value, written, depth + 1);
  return written[kind]?.(value) ?? value;
}
