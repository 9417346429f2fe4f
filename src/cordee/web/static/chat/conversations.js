/**
 * Conversations, kept in this browser and nowhere else (IndexedDB). A conversation is a tree: who edits a question, or
 * wants another answer, gets a new branch, and the old one stays. `leaf` is the end of the branch that is shown.
 */
import { makeStore } from "../shell/store.js";
import { openDB } from "../vendor/idb.js";

/**
 * @typedef {{name: string, text: string}} Attached a file's text
 * @typedef {{id: string, name: string, arguments: string}} Call
 * @typedef {{
 *   id: string,
 *   parent: string | null,
 *   role: "user" | "assistant",
 *   text: string,
 *   at: number,
 *   files?: Attached[],
 *   thinking?: string,
 *   thought_ms?: number,
 *   calls?: Call[],
 *   model?: string,
 *   tokens?: number,
 *   tokens_per_second?: number,
 *   ending?: "stop" | "length" | "tool_calls" | "stopped" | "failed",
 *   fault?: string,
 * }} Message
 * @typedef {{
 *   id: string,
 *   title: string,
 *   created: number,
 *   updated: number,
 *   model: string,
 *   system: string,
 *   temperature: number,
 *   max_tokens: number | null,
 *   messages: Record<string, Message>,
 *   leaf: string | null,
 * }} Conversation
 */

const STORE = "conversations";
const TITLE_CHARS_MAX = 60;
/** Answers that come are saved this often at most. */
const SAVE_MS = 2000;

/** All of them, the newest first. */
export const conversations = makeStore(/** @type {Conversation[]} */ ([]));
/** The one that is shown; null: a new one. */
export const opened = makeStore(/** @type {Conversation | null} */ (null));
/** Whether this browser keeps them; private windows of some do not. */
export const isKept = makeStore(true);

/** @type {Promise<import("../vendor/idb.js").Database> | null} */
let database = null;
/** Tells other tabs of this browser what changed. */
const channel = new BroadcastChannel("cordee-conversations");
/** @type {Map<string, ReturnType<typeof setTimeout>>} */
const waiting = new Map();

channel.onmessage = async (/** @type {MessageEvent} */ { data }) => {
  const id = String(data);
  if (waiting.has(id)) return; // an answer comes here
  const found = await (await base())?.get(STORE, id);
  const others = conversations.get().filter((each) => each.id !== id);
  conversations.set(sorted(found ? [...others, found] : others));
  if (opened.get()?.id === id) opened.set(found ?? null);
};

async function base() {
  database ??= openDB("cordee", 1, {
    upgrade(made) {
      made.createObjectStore(STORE, { keyPath: "id" });
    },
  });
  try {
    return await database;
  } catch {
    isKept.set(false);
    return null;
  }
}

/** Read what is kept. */
export async function load() {
  const found = await (await base())?.getAll(STORE);
  if (found) conversations.set(sorted(found));
}

/** @param {Conversation[]} list */
function sorted(list) {
  return list.sort((one, other) => other.updated - one.updated);
}

/**
 * @param {Pick<Conversation, "model" | "system" | "temperature" | "max_tokens">} settings
 * @returns {Conversation}
 */
export function made(settings) {
  const now = Date.now();
  const { model, system, temperature, max_tokens } = settings;
  const id = newId();
  return { id, title: "", created: now, updated: now, model, system, temperature, max_tokens, messages: {}, leaf: null };
}

/** An identifier; `crypto.randomUUID` is not there over plain HTTP. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((each) => each.toString(16).padStart(2, "0")).join("");
}

/**
 * Put a message under its parent, and show its branch.
 * @param {Conversation} conversation
 * @param {Omit<Message, "id" | "at" | "parent"> & {parent?: string | null}} message
 * @returns {Message} as it is kept
 */
export function add(conversation, message) {
  const kept = { parent: conversation.leaf, ...message, id: newId(), at: Date.now() };
  conversation.messages[kept.id] = kept;
  conversation.leaf = kept.id;
  if (!conversation.title && kept.role === "user") conversation.title = titleOf(kept);
  return kept;
}

/** @param {Message} message */
function titleOf(message) {
  const line = (message.text.trim() || (message.files?.[0]?.name ?? "")).split("\n")[0] ?? "";
  return line.length > TITLE_CHARS_MAX ? `${line.slice(0, TITLE_CHARS_MAX)}…` : line;
}

/**
 * The messages of the branch that is shown, from the first on.
 * @param {Conversation} conversation
 * @param {string | null} [leaf]
 * @returns {Message[]}
 */
export function branch(conversation, leaf = conversation.leaf) {
  /** @type {Message[]} */
  const found = [];
  for (let id = leaf; id !== null; ) {
    const message = conversation.messages[id];
    if (!message || found.length > Object.keys(conversation.messages).length) break;
    found.push(message);
    id = message.parent;
  }
  return found.reverse();
}

/**
 * The messages that stand in the place of one: itself and its other versions, in the order they were made.
 * @param {Conversation} conversation
 * @param {Message} message
 */
export function versions(conversation, message) {
  return Object.values(conversation.messages)
    .filter((each) => each.parent === message.parent && each.role === message.role)
    .sort((one, other) => one.at - other.at);
}

/**
 * Show the branch of a message, down to where somebody was last.
 * @param {Conversation} conversation
 * @param {Message} message
 */
export function show(conversation, message) {
  let end = message;
  for (;;) {
    const below = Object.values(conversation.messages).filter((each) => each.parent === end.id);
    const newest = below.sort((one, other) => other.at - one.at)[0];
    if (!newest) break;
    end = newest;
  }
  conversation.leaf = end.id;
}

/**
 * Tell everybody that a conversation changed, and keep it: now, or soon while an answer comes.
 * @param {Conversation} conversation
 * @param {{soon?: boolean, touch?: boolean}} [how] `touch`: it moves to the top
 */
export function changed(conversation, { soon = false, touch = true } = {}) {
  if (touch) conversation.updated = Date.now();
  const others = conversations.get().filter((each) => each.id !== conversation.id);
  conversations.set(sorted([...others, conversation]));
  keep(conversation, soon);
}

/**
 * @param {Conversation} conversation
 * @param {boolean} soon
 */
export function keep(conversation, soon) {
  const planned = waiting.get(conversation.id);
  if (soon && planned !== undefined) return;
  clearTimeout(planned);
  const write = async () => {
    waiting.delete(conversation.id);
    if (!conversations.get().some((each) => each.id === conversation.id)) return; // deleted meanwhile
    await (await base())?.put(STORE, conversation);
    channel.postMessage(conversation.id);
  };
  if (soon) waiting.set(conversation.id, setTimeout(() => void write(), SAVE_MS));
  else void write();
}

/** @param {Conversation} conversation */
export async function remove(conversation) {
  clearTimeout(waiting.get(conversation.id));
  waiting.delete(conversation.id);
  conversations.set(conversations.get().filter((each) => each.id !== conversation.id));
  if (opened.get()?.id === conversation.id) opened.set(null);
  await (await base())?.delete(STORE, conversation.id);
  channel.postMessage(conversation.id);
}

/** Remove all of them. */
export async function removeAll() {
  for (const each of [...conversations.get()]) await remove(each);
}

/**
 * Those that have all words of a search, in their title or anywhere.
 * @param {Conversation[]} list
 * @param {string} search
 */
export function matching(list, search) {
  const words = fold(search).split(/\s+/).filter(Boolean);
  if (words.length === 0) return list;
  return list.filter((each) => {
    const text = fold([each.title, ...Object.values(each.messages).map((message) => message.text)].join("\n"));
    return words.every((word) => text.includes(word));
  });
}

/** Small letters without accents, so that "ecole" finds "École". @param {string} text */
function fold(text) {
  return text.normalize("NFD").replace(/\p{Mn}/gu, "").toLowerCase();
}
