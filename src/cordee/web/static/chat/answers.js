/**
 * Answers that come. An answer belongs to its conversation, not to what is on the screen: it goes on while somebody
 * looks at another page or conversation. What it does is told by `running`; what it says is in its message.
 */
import { ApiError, apiError, request } from "../shell/api.js";
import { makeStore } from "../shell/store.js";
import { createParser } from "../vendor/eventsource-parser.js";
import { add, branch, changed, keep } from "./conversations.js";
import { look, stateOf } from "./models.js";

/** Without a token for this long, it is looked whether a machine fell. */
const SILENCE_MS = 1200;
/** A machine that has said nothing for this long, not even how it is, is gone: its cable is out, or its power. */
const GONE_MS = 30_000;
/** How often the rate is told. */
const RATE_MS = 500;

/**
 * @typedef {import("./conversations.js").Conversation} Conversation
 * @typedef {import("./conversations.js").Message} Message
 * @typedef {{
 *   message: Message,
 *   stop: () => void,
 *   phase: "sent" | "queue" | "reading" | "thinking" | "writing",
 *   place: number,
 *   read: number,
 *   to_read: number,
 *   rate: number,
 *   isHealing: boolean,
 *   healed: number,
 * }} Running `healed`: how often it went on after a machine had fallen
 */

/** By conversation. */
export const running = makeStore(/** @type {Map<string, Running>} */ (new Map()));
/** Called when more of an answer has come; see `watchText`. @type {Map<string, Set<() => void>>} */
const listeners = new Map();

/**
 * Be told whenever more of a message has come.
 * @param {string} id of the message
 * @param {() => void} listener
 * @returns {() => void} to be told no more
 */
export function watchText(id, listener) {
  const all = listeners.get(id) ?? new Set();
  listeners.set(id, all.add(listener));
  return () => {
    all.delete(listener);
    if (all.size === 0) listeners.delete(id);
  };
}

/** @param {Message} message */
function grew(message) {
  for (const listener of listeners.get(message.id) ?? []) listener();
}

/**
 * Have the model answer the question at `parent`: a new version beside those that there are.
 * @param {Conversation} conversation
 * @param {string} parent
 */
export async function answer(conversation, parent) {
  const message = add(conversation, { role: "assistant", text: "", parent, model: conversation.model });
  await follow(conversation, message);
}

/**
 * Have the model go on with an answer that was cut off.
 * @param {Conversation} conversation
 * @param {Message} message
 */
export async function goOn(conversation, message) {
  delete message.ending;
  delete message.fault;
  await follow(conversation, message);
}

/**
 * @param {Conversation} conversation
 * @param {Message} message
 */
async function follow(conversation, message) {
  const controller = new AbortController();
  /** @type {Running} */
  const state = {
    message,
    stop: () => controller.abort(),
    phase: "sent",
    place: 0,
    read: 0,
    to_read: 0,
    rate: 0,
    isHealing: false,
    healed: 0,
  };
  tell(conversation, state);
  changed(conversation);
  const watch = new Watch(conversation, state, () => controller.abort(new ApiError("unreachable", "")));
  try {
    const response = await request("/v1/chat/completions", {
      body: asked(conversation, message),
      signal: controller.signal,
    });
    await read(response, (event) => take(event, message, state, watch), (comment) => watch.comment(comment));
    message.ending ??= "failed";
    if (message.ending === "failed") message.fault ??= "unreachable";
  } catch (error) {
    const isStopped = controller.signal.aborted && !(error instanceof ApiError);
    message.ending = isStopped ? "stopped" : "failed";
    if (!isStopped) message.fault = error instanceof ApiError ? error.code : "unreachable";
    if (!isStopped && !(error instanceof ApiError)) console.warn(error);
  } finally {
    watch.end();
    tell(conversation, null);
    changed(conversation);
    grew(message);
  }
}

/**
 * @param {Conversation} conversation
 * @param {Running | null} state
 */
function tell(conversation, state) {
  const all = new Map(running.get());
  if (state === null) all.delete(conversation.id);
  else all.set(conversation.id, state);
  running.set(all);
}

/**
 * The body of a request for an answer.
 * @param {Conversation} conversation
 * @param {Message} message the answer, perhaps begun
 */
function asked(conversation, message) {
  const said = branch(conversation, message.parent).map((each) => ({ role: each.role, content: content(each) }));
  if (conversation.system.trim()) said.unshift({ role: /** @type {any} */ ("system"), content: conversation.system });
  if (message.text) said.push({ role: "assistant", content: message.text });
  return {
    model: conversation.model,
    messages: said,
    temperature: conversation.temperature,
    ...(conversation.max_tokens === null ? {} : { max_tokens: conversation.max_tokens }),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

/**
 * What a message says to the model: its files first, each under its name.
 * @param {Message} message
 */
function content(message) {
  const files = (message.files ?? []).map(({ name, text }) => `File ${JSON.stringify(name)}:\n\n${text}\n\n---\n\n`);
  return files.join("") + message.text;
}

/**
 * Read server-sent events to their end.
 * @param {Response} response
 * @param {(event: any) => void} onEvent
 * @param {(comment: string) => void} onComment
 */
async function read(response, onEvent, onComment) {
  const parser = createParser({
    onEvent: ({ data }) => {
      if (data !== "[DONE]") onEvent(JSON.parse(data));
    },
    onComment,
  });
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    parser.feed(decoder.decode(value, { stream: true }));
  }
}

/**
 * Take in an event of the stream.
 * @param {any} event
 * @param {Message} message
 * @param {Running} state
 * @param {Watch} watch
 */
function take(event, message, state, watch) {
  if (event.error) throw apiError(event);
  const choice = event.choices?.[0];
  const delta = choice?.delta ?? {};
  if (delta.reasoning_content) {
    message.thinking = (message.thinking ?? "") + delta.reasoning_content;
    watch.wrote("thinking");
  }
  if (delta.content) {
    message.text += delta.content;
    watch.wrote("writing");
  }
  for (const call of delta.tool_calls ?? []) {
    message.calls ??= [];
    const known = (message.calls[call.index] ??= { id: call.id ?? "", name: "", arguments: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
    watch.wrote("writing");
  }
  if (choice?.finish_reason) message.ending = choice.finish_reason;
  if (event.usage) message.tokens = event.usage.completion_tokens;
  if (event.timings) message.tokens_per_second = event.timings.predicted_per_second;
  state.message = message;
}

/** Watches one answer: how fast it comes, and whether it stands still because a machine fell. */
class Watch {
  /**
   * @param {Conversation} conversation
   * @param {Running} state
   * @param {() => void} giveUp called when the machine is gone
   */
  constructor(conversation, state, giveUp) {
    this.conversation = conversation;
    this.state = state;
    this.giveUp = giveUp;
    this.heard = performance.now(); // when the last token came
    this.answered = this.heard; // when the machine last said how it is
    this.isLooking = false;
    this.first = 0;
    this.told = 0;
    this.timer = setInterval(() => void this.look(), SILENCE_MS / 2);
  }

  end() {
    clearInterval(this.timer);
  }

  /** @param {string} comment */
  comment(comment) {
    const [, kind, count, total] = /^ ?(queue|read) (\d+)(?: of (\d+))?$/.exec(comment) ?? [];
    if (kind === undefined || this.first) return;
    this.state.phase = kind === "queue" ? "queue" : "reading";
    if (kind === "queue") this.state.place = Number(count);
    else Object.assign(this.state, { read: Number(count), to_read: Number(total) });
    this.heard = performance.now();
    tell(this.conversation, this.state);
  }

  /** @param {"thinking" | "writing"} phase */
  wrote(phase) {
    const { state } = this;
    const now = performance.now();
    const isNew = state.phase !== phase || state.isHealing;
    if (state.isHealing) {
      state.isHealing = false;
      state.healed += 1;
    }
    if (phase === "writing" && state.phase === "thinking") state.message.thought_ms = now - this.first;
    state.phase = phase;
    this.heard = now;
    this.first ||= now;
    if (isNew || now - this.told > RATE_MS) {
      this.told = now;
      state.rate = now > this.first ? ((state.message.tokens ?? 1) - 1) / ((now - this.first) / 1000) : 0;
      tell(this.conversation, state);
    }
    grew(state.message);
    keep(this.conversation, true);
  }

  /** Where nothing comes, ask why. */
  async look() {
    if (this.isLooking || performance.now() - this.heard < SILENCE_MS) return;
    this.isLooking = true;
    try {
      await look();
    } catch (error) {
      const isThere = error instanceof ApiError && error.status > 0;
      if (!isThere && performance.now() - Math.max(this.heard, this.answered) > GONE_MS) this.giveUp();
      if (!isThere) return;
    } finally {
      this.isLooking = false;
    }
    this.answered = performance.now();
    const isHealing = stateOf(this.conversation.model) === "recovering";
    if (isHealing !== this.state.isHealing && performance.now() - this.heard >= SILENCE_MS && isHealing) {
      this.state.isHealing = true;
      tell(this.conversation, this.state);
    }
  }
}
