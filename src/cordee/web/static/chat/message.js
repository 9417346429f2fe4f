/** A message on the screen: what was asked or answered, its versions, and what can be done with it. */
import { number, t } from "../shell/i18n.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact.js";
import { watchText } from "./answers.js";
import { copied } from "./code.js";
import { GrowingText } from "./growing.js";
import { readable } from "./markdown.js";

/** @typedef {import("./conversations.js").Message} Message */
/** @typedef {import("./answers.js").Running} Running */

/**
 * @param {{
 *   message: Message,
 *   versions: Message[],
 *   state: Running | null,
 *   isBusy: boolean,
 *   onVersion: (version: Message) => void,
 *   onEdit: (text: string) => void,
 *   onAgain: () => void,
 *   onGoOn: () => void,
 *   elsewhere: any,
 * }} props
 */
export function MessageView(props) {
  const { message } = props;
  const isUser = message.role === "user";
  return html`
    <article class=${`message ${message.role}`} aria-label=${t(`chat.said_by.${message.role}`)}>
      ${isUser ? html`<${Question} ...${props} />` : html`<${Answer} ...${props} />`}
    </article>
  `;
}

/** @param {any} props */
function Question({ message, versions, isBusy, onVersion, onEdit }) {
  const [draft, setDraft] = useState(/** @type {string | null} */ (null));
  const area = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  useEffect(() => area.current?.focus(), [draft !== null]);
  const send = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (draft?.trim()) onEdit(draft);
    setDraft(null);
  };
  if (draft !== null) {
    return html`
      <form onSubmit=${send}>
        <textarea
          ref=${area}
          rows="4"
          aria-label=${t("chat.edit")}
          value=${draft}
          onInput=${(/** @type {any} */ event) => setDraft(event.target.value)}
          onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
            if (event.key === "Escape") setDraft(null);
            else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
          }}
        ></textarea>
        <div class="row">
          <button class="primary" disabled=${isBusy || !draft.trim()}>${t("chat.send")}</button>
          <button type="button" onClick=${() => setDraft(null)}>${t("chat.cancel")}</button>
        </div>
      </form>
    `;
  }
  return html`
    ${(message.files ?? []).map(
      (/** @type {any} */ file) => html`
        <details class="file">
          <summary><bdi>${readable(file.name)}</bdi></summary>
          <pre tabindex="0" dir="auto">${readable(file.text)}</pre>
        </details>
      `,
    )}
    <div class="asked" dir="auto">${readable(message.text)}</div>
    <div class="actions">
      <${Versions} message=${message} versions=${versions} isBusy=${isBusy} onVersion=${onVersion} />
      <button class="plain" disabled=${isBusy} onClick=${() => setDraft(message.text)}>${t("chat.edit")}</button>
      <${Copy} text=${message.text} />
    </div>
  `;
}

/** @param {any} props */
function Answer({ message, versions, state, isBusy, onVersion, onAgain, onGoOn, elsewhere }) {
  const isCut = message.ending === "failed" || message.ending === "stopped" || message.ending === "length";
  return html`
    ${message.thinking && html`<${Thinking} message=${message} isUnderWay=${state?.phase === "thinking"} />`}
    <${Text} message=${message} />
    ${(message.calls ?? []).map(
      (/** @type {any} */ call) => html`
        <details class="call">
          <summary>${t("chat.call", { name: readable(call.name) })}</summary>
          <pre tabindex="0">${readable(call.arguments)}</pre>
          <p class="quiet">${t("chat.call.about")}</p>
        </details>
      `,
    )}
    ${state && html`<${Progress} state=${state} />`}
    ${message.ending === "failed" && html`<${Fault} message=${message} elsewhere=${elsewhere} />`}
    ${!state &&
    html`
      <div class="actions">
        <${Versions} message=${message} versions=${versions} isBusy=${isBusy} onVersion=${onVersion} />
        ${isCut &&
        message.text &&
        html`<button class="plain" disabled=${isBusy} onClick=${onGoOn}>${t("chat.go_on")}</button>`}
        <button class="plain" disabled=${isBusy} onClick=${onAgain}>${t("chat.again")}</button>
        <${Copy} text=${message.text} />
        <span class="quiet">${told(message)}</span>
      </div>
    `}
  `;
}

/** How an answer ended, and how fast it came. @param {Message} message */
function told(message) {
  const parts = [];
  if (message.ending === "length") parts.push(t("chat.ended.length"));
  if (message.ending === "stopped") parts.push(t("chat.ended.stopped"));
  if (message.model) parts.push(message.model);
  if (message.tokens_per_second) {
    parts.push(t("chat.rate", { rate: number(message.tokens_per_second, { maximumFractionDigits: 1 }) }));
  }
  return parts.join(" · ");
}

/** The text of an answer: elements that are no affair of preact's. @param {{message: Message}} props */
function Text({ message }) {
  const place = useRef(/** @type {HTMLElement | null} */ (null));
  useLayoutEffect(() => {
    const element = /** @type {HTMLElement} */ (place.current);
    const growing = new GrowingText(element);
    const redraw = () => growing.update(message.text, message.ending !== undefined);
    growing.onDrawn = () => element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
    redraw();
    const ignore = watchText(message.id, redraw);
    return () => {
      ignore();
      growing.stop();
    };
  }, [message.id]);
  return html`<div class="text" ref=${place}></div>`;
}

/** @param {{message: Message, isUnderWay: boolean}} props */
function Thinking({ message, isUnderWay }) {
  const place = useRef(/** @type {HTMLElement | null} */ (null));
  useEffect(() => {
    const element = /** @type {HTMLElement} */ (place.current);
    let shown = 0;
    const redraw = () => {
      const text = message.thinking ?? "";
      if (text.length > shown) element.append(readable(text.slice(shown)));
      shown = text.length;
    };
    element.replaceChildren();
    redraw();
    return watchText(message.id, redraw);
  }, [message.id]);
  const seconds = Math.round((message.thought_ms ?? 0) / 1000);
  const title = isUnderWay ? t("chat.thinking") : seconds > 0 ? t("chat.thought.for", { count: seconds }) : t("chat.thought");
  return html`
    <details class="thinking">
      <summary>${title}</summary>
      <div class="thoughts" dir="auto" ref=${place}></div>
    </details>
  `;
}

/** What an answer that comes is doing. @param {{state: Running}} props */
function Progress({ state }) {
  let text = "";
  if (state.isHealing) text = t("chat.healing");
  else if (state.phase === "queue") text = t("chat.queue", { count: state.place - 1 });
  else if (state.phase === "reading") text = t("chat.reading", { read: state.read, total: state.to_read });
  else if (state.phase === "sent") text = t("chat.sent");
  else text = state.rate ? t("chat.rate", { rate: number(state.rate, { maximumFractionDigits: 1 }) }) : t("chat.writing");
  return html`
    <div class="progress quiet">
      <span class="pulse" aria-hidden="true"></span>
      ${text}${state.healed > 0 && !state.isHealing && html` · ${t("chat.healed")}`}
      ${state.phase === "reading" &&
      html`<progress max=${state.to_read} value=${state.read} aria-label=${t("chat.reading.label")}></progress>`}
    </div>
  `;
}

/** @param {{message: Message, elsewhere: any}} props */
function Fault({ message, elsewhere }) {
  const key = `shell.error.${message.fault}`;
  const known = t(key);
  return html`
    <div class="fault" role="alert">
      <p>${known === key ? t("shell.error.other") : known}</p>
      ${message.fault === "unreachable" && elsewhere}
    </div>
  `;
}

/** @param {{message: Message, versions: Message[], isBusy: boolean, onVersion: (version: Message) => void}} props */
function Versions({ message, versions, isBusy, onVersion }) {
  if (versions.length < 2) return null;
  const at = versions.indexOf(message);
  /** @param {number} to */
  const go = (to) => () => onVersion(/** @type {Message} */ (versions[to]));
  return html`
    <span class="versions">
      <button class="plain" disabled=${isBusy || at <= 0} onClick=${go(at - 1)} aria-label=${t("chat.version.before")}>‹</button>
      <span>${t("chat.version", { at: at + 1, count: versions.length })}</span>
      <button
        class="plain"
        disabled=${isBusy || at >= versions.length - 1}
        onClick=${go(at + 1)}
        aria-label=${t("chat.version.after")}
      >
        ›
      </button>
    </span>
  `;
}

/** @param {{text: string}} props */
function Copy({ text }) {
  const press = (/** @type {any} */ event) => void copied(event.currentTarget, text);
  return html`<button class="plain" onClick=${press}>${t("chat.copy")}</button>`;
}
