/**
 * Conversations as files. JSON has all of them, with all branches; Markdown has one as it is read, and comments that
 * say who speaks, by which it is read again.
 */
import { t } from "../shell/i18n.js";
import { branch, newId } from "./conversations.js";
import { TEMPERATURE } from "./settings.js";

/** @typedef {import("./conversations.js").Conversation} Conversation */
/** @typedef {import("./conversations.js").Message} Message */

const FORMAT = "cordee-conversations";
const MESSAGES_MAX = 100_000;
const MARK = /^<!-- cordee:(user|assistant) -->\n(?:#+ .*\n\n?)?/m;

/** @param {Conversation[]} list */
export function toJson(list) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations: list }, null, 1);
}

/** @param {Conversation} conversation */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title.replace(/\n/g, " ")}\n`];
  for (const message of branch(conversation)) {
    parts.push(`<!-- cordee:${message.role} -->\n### ${t(`chat.said_by.${message.role}`)}\n`);
    for (const file of message.files ?? []) parts.push(`${quoted(file.name)}:\n\n${quoted(file.text)}\n`);
    parts.push(`${quoted(message.text)}\n`);
  }
  return parts.join("\n");
}

/** A text must not look as if somebody else went on. @param {string} text */
function quoted(text) {
  return text.replace(/<!-- cordee:/g, "<!-- cordee\\:");
}

/** @param {string} text */
function unquoted(text) {
  return text.replace(/<!-- cordee\\:/g, "<!-- cordee:");
}

/**
 * The conversations of a file, new ones: nothing that is here is replaced. Throws where it is none of ours.
 * @param {string} text
 * @returns {Conversation[]}
 */
export function fromText(text) {
  const found = text.trimStart().startsWith("{") ? fromJson(text) : fromMarkdown(text);
  if (found.length === 0) throw new Error("no conversation");
  return found;
}

/** @param {string} text */
function fromJson(text) {
  const read = JSON.parse(text);
  if (read?.format !== FORMAT || !Array.isArray(read.conversations)) throw new Error("another format");
  return read.conversations.map(checked);
}

/**
 * A conversation of a file, with only what is known, each of its kind.
 * @param {any} given
 * @returns {Conversation}
 */
function checked(given) {
  const entries = Object.values(given.messages ?? {});
  if (entries.length > MESSAGES_MAX) throw new Error("too many messages");
  /** @type {Record<string, Message>} */
  const messages = {};
  for (const each of /** @type {any[]} */ (entries)) {
    const id = string(each.id);
    const role = each.role === "user" ? "user" : "assistant";
    messages[id] = { id, role, parent: each.parent === null ? null : string(each.parent), text: string(each.text), at: time(each.at) };
    const made = /** @type {Message} */ (messages[id]);
    if (typeof each.thinking === "string") made.thinking = each.thinking;
    if (typeof each.model === "string") made.model = each.model;
    if (["stop", "length", "tool_calls", "stopped", "failed"].includes(each.ending)) made.ending = each.ending;
    else if (role === "assistant") made.ending = "stopped";
    if (Array.isArray(each.files)) {
      made.files = each.files.map((/** @type {any} */ file) => ({ name: string(file.name), text: string(file.text) }));
    }
    if (Array.isArray(each.calls)) {
      made.calls = each.calls.map((/** @type {any} */ call) => ({
        id: string(call.id),
        name: string(call.name),
        arguments: string(call.arguments),
      }));
    }
  }
  const leaf = typeof given.leaf === "string" && given.leaf in messages ? given.leaf : null;
  return {
    id: newId(),
    title: string(given.title),
    created: time(given.created),
    updated: time(given.updated),
    model: string(given.model),
    system: string(given.system),
    temperature: typeof given.temperature === "number" ? Math.min(Math.max(given.temperature, 0), 2) : TEMPERATURE,
    max_tokens: Number.isInteger(given.max_tokens) && given.max_tokens > 0 ? given.max_tokens : null,
    messages,
    leaf: leaf ?? Object.keys(messages).at(-1) ?? null,
  };
}

/** @param {unknown} value */
function string(value) {
  if (typeof value !== "string") throw new Error("a text is missing");
  return value;
}

/** @param {unknown} value */
function time(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : Date.now();
}

/** @param {string} text */
function fromMarkdown(text) {
  const [head = "", ...parts] = text.replace(/\r\n/g, "\n").split(new RegExp(MARK, "gm"));
  const now = Date.now();
  /** @type {Record<string, Message>} */
  const messages = {};
  let parent = /** @type {string | null} */ (null);
  for (let at = 0; at + 1 < parts.length; at += 2) {
    const id = newId();
    const role = parts[at] === "user" ? "user" : "assistant";
    messages[id] = { id, parent, role, text: unquoted((parts[at + 1] ?? "").trim()), at: now + at };
    if (role === "assistant") /** @type {Message} */ (messages[id]).ending = "stop";
    parent = id;
  }
  if (parent === null) return [];
  const title = head.replace(/^#\s*/, "").trim();
  const times = { created: now, updated: now };
  return [{ id: newId(), title, ...times, model: "", system: "", temperature: TEMPERATURE, max_tokens: null, messages, leaf: parent }];
}

/**
 * Have the browser save a text as a file.
 * @param {string} name
 * @param {string} text
 * @param {string} type
 */
export function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/**
 * A name for a file: what every system takes.
 * @param {string} title
 */
export function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "conversation";
}
