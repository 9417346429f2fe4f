/** The page where people ask: conversations at the side, the branch that is shown, a question below. */
import { language, t } from "../shell/i18n.js";
import { useStore } from "../shell/store.js";
import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { answer, goOn, running } from "./answers.js";
import { Composer } from "./composer.js";
import { add, branch, changed, load, made, opened, show, versions } from "./conversations.js";
import { Elsewhere, learn } from "./elsewhere.js";
import { MessageView } from "./message.js";
import { look, models } from "./models.js";
import { Drawer, lastChosen, remember } from "./settings.js";
import { Sidebar } from "./sidebar.js";

/** How often it is looked how the models are, while the page is seen. */
const LOOK_MS = 15_000;
/** Who is no further than this from the end sees what comes. */
const END_PX = 80;

/** @typedef {import("./conversations.js").Conversation} Conversation */
/** @typedef {import("./conversations.js").Message} Message */

export default function Chat() {
  const conversation = useStore(opened);
  const all = useStore(models);
  const answers = useStore(running);
  const words = useStore(language);
  const [settings, setSettings] = useState(lastChosen);
  const [side, setSide] = useState(false);
  const [drawer, setDrawer] = useState(false);
  const [dropped, setDropped] = useState(/** @type {File[]} */ ([]));
  const chosen = conversation ?? settings;
  const model = chosen.model || all?.[0]?.id || "";
  const state = (conversation && answers.get(conversation.id)) ?? null;

  useEffect(() => {
    void load();
    void learn();
    const again = () => {
      if (!document.hidden) look().catch(() => {});
    };
    again();
    const timer = setInterval(again, LOOK_MS);
    document.addEventListener("visibilitychange", again);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", again);
    };
  }, []);
  useKeys(conversation, () => startNew(), () => state?.stop());

  /** @param {import("./settings.js").Settings} next */
  function choose(next) {
    remember(next);
    setSettings(next);
    if (!conversation) return;
    const { system, temperature, max_tokens } = next;
    Object.assign(conversation, { model: next.model, system, temperature, max_tokens });
    changed(conversation, { touch: false, soon: true });
  }

  function startNew() {
    opened.set(null);
    setSide(false);
    document.querySelector(/** @type {"textarea"} */ (".composer textarea"))?.focus();
  }

  /**
   * @param {string} text
   * @param {import("./conversations.js").Attached[]} files
   */
  function ask(text, files) {
    const current = conversation ?? made({ ...settings, model });
    const question = add(current, { role: "user", text, ...(files.length > 0 ? { files } : {}) });
    opened.set(current);
    void answer(current, question.id);
  }

  return html`
    <div
      class="chat"
      data-side=${side ? "open" : null}
      data-drawer=${drawer ? "open" : null}
      onDragOver=${(/** @type {Event} */ event) => event.preventDefault()}
      onDrop=${(/** @type {DragEvent} */ event) => {
        event.preventDefault();
        setDropped([...(event.dataTransfer?.files ?? [])]);
      }}
    >
      <nav class="side" aria-label=${t("chat.conversations")}>
        <${Sidebar}
          onNew=${startNew}
          onClose=${() => setSide(false)}
          onOpen=${(/** @type {Conversation} */ each) => {
            opened.set(each);
            setSide(false);
          }}
        />
      </nav>
      <section class="talk" aria-label=${t("chat.title")}>
        <div class="row tools">
          <button class="to-side" aria-expanded=${side} onClick=${() => setSide(!side)}>
            <span aria-hidden="true">☰</span><span class="unseen">${t("chat.conversations")}</span>
          </button>
          <${ModelPicker} model=${model} onChange=${(/** @type {string} */ each) => choose({ ...chosen, model: each })} />
          <button aria-expanded=${drawer} aria-controls="drawer" onClick=${() => setDrawer(!drawer)}>${t("chat.settings")}</button>
        </div>
        <${Messages} key=${`${conversation?.id} ${words}`} conversation=${conversation} state=${state} />
        <${Composer}
          isBusy=${state !== null}
          canSend=${model !== ""}
          dropped=${dropped}
          onTaken=${() => setDropped([])}
          onSend=${ask}
          onStop=${() => state?.stop()}
        />
      </section>
      ${drawer && html`<${Drawer} settings=${{ ...chosen, model }} onChange=${choose} onClose=${() => setDrawer(false)} />`}
    </div>
  `;
}

/**
 * @param {{model: string, onChange: (model: string) => void}} props
 */
function ModelPicker({ model, onChange }) {
  const all = useStore(models);
  if (all === null) return html`<span class="quiet grow">${t("chat.model.looking")}</span>`;
  if (all.length === 0) return html`<span class="quiet grow">${t("chat.model.none")}</span>`;
  const isThere = all.some((each) => each.id === model);
  return html`
    <label class="grow picker">
      <span class="unseen">${t("chat.model")}</span>
      <select value=${model} onChange=${(/** @type {any} */ event) => onChange(event.target.value)}>
        ${!isThere && model && html`<option value=${model}>${t("chat.model.gone", { model })}</option>`}
        ${all.map((each) => html`<option value=${each.id}>${each.id} · ${t(`chat.state.${each.state}`)}</option>`)}
      </select>
    </label>
  `;
}

/**
 * The branch that is shown.
 * @param {{conversation: Conversation | null, state: import("./answers.js").Running | null}} props
 */
function Messages({ conversation, state }) {
  const place = useRef(/** @type {HTMLElement | null} */ (null));
  const follows = useRef(true);
  const [isAway, setAway] = useState(false);
  const shown = conversation ? branch(conversation) : [];
  const isBusy = state !== null;

  const toEnd = () => {
    const element = place.current;
    if (element) element.scrollTop = element.scrollHeight;
  };
  useEffect(() => {
    follows.current = true;
    toEnd();
  }, [conversation?.id, isBusy]);

  /** @param {(current: Conversation) => void} change */
  const act = (change) => () => {
    if (!conversation) return;
    change(conversation);
    changed(conversation, { touch: false });
    opened.set(conversation);
  };
  /** @param {Message} message */
  const view = (message) => html`
    <${MessageView}
      key=${message.id}
      message=${message}
      versions=${conversation ? versions(conversation, message) : []}
      state=${state?.message.id === message.id ? state : null}
      isBusy=${isBusy}
      elsewhere=${html`<${Elsewhere} />`}
      onVersion=${(/** @type {Message} */ other) => act((current) => show(current, other))()}
      onEdit=${(/** @type {string} */ text) =>
        act((current) => {
          const { files } = message;
          const question = add(current, { role: "user", parent: message.parent, text, ...(files ? { files } : {}) });
          void answer(current, question.id);
        })()}
      onAgain=${act((current) => void answer(current, message.parent ?? ""))}
      onGoOn=${act((current) => void goOn(current, message))}
    />
  `;
  return html`
    <div
      class="messages"
      ref=${place}
      tabindex="0"
      role="region"
      aria-label=${t("chat.messages")}
      onScroll=${() => {
        const element = /** @type {HTMLElement} */ (place.current);
        follows.current = element.scrollHeight - element.scrollTop - element.clientHeight < END_PX;
        setAway(!follows.current);
      }}
      ongrown=${() => follows.current && toEnd()}
    >
      ${shown.length === 0 && html`<div class="welcome"><h1>${t("chat.welcome")}</h1><p>${t("chat.welcome.about")}</p></div>`}
      ${shown.map(view)}
      <p class="unseen" role="status">${isBusy ? t("chat.status.writing") : shown.length > 0 ? t("chat.status.done") : ""}</p>
      ${isAway && html`<button class="to-end" onClick=${toEnd} aria-label=${t("chat.to_end")}>↓</button>`}
    </div>
  `;
}

/**
 * Keys that work everywhere on the page; `docs/page.md` lists them.
 * @param {Conversation | null} conversation
 * @param {() => void} startNew
 * @param {() => void} stop
 */
function useKeys(conversation, startNew, stop) {
  useEffect(() => {
    /** @param {KeyboardEvent} event */
    const press = (event) => {
      const isCommand = event.ctrlKey || event.metaKey;
      if (event.key === "Escape") stop();
      else if (isCommand && event.key.toLowerCase() === "k") document.getElementById("search")?.focus();
      else if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") startNew();
      else return;
      if (event.key !== "Escape") event.preventDefault();
    };
    document.addEventListener("keydown", press);
    return () => document.removeEventListener("keydown", press);
  }, [conversation?.id, stop]);
}
