/** The list of conversations: search, a new one, export, import, delete. */
import { t, when } from "../shell/i18n.js";
import { useStore } from "../shell/store.js";
import { html, useRef, useState } from "../vendor/preact.js";
import { running } from "./answers.js";
import { changed, conversations, isKept, matching, opened, remove, removeAll } from "./conversations.js";
import { fileName, fromText, save, toJson, toMarkdown } from "./exchange.js";
import { readable } from "./markdown.js";

/** More conversations than a reader scrolls through; the search finds the others. */
const SHOWN_MAX = 300;

/**
 * @param {{
 *   onNew: () => void,
 *   onOpen: (conversation: import("./conversations.js").Conversation) => void,
 *   onClose: () => void,
 * }} props
 */
export function Sidebar({ onNew, onOpen, onClose }) {
  const [search, setSearch] = useState("");
  const [notice, setNotice] = useState("");
  const picker = useRef(/** @type {HTMLInputElement | null} */ (null));
  const all = useStore(conversations);
  const current = useStore(opened);
  const answering = useStore(running);
  const kept = useStore(isKept);
  const found = matching(all, search);

  /** @param {File[]} files */
  async function take(files) {
    let count = 0;
    for (const file of files) {
      try {
        for (const conversation of fromText(await file.text())) {
          changed(conversation, { touch: false });
          count += 1;
        }
      } catch {
        setNotice(t("chat.import.fault", { name: readable(file.name) }));
        return;
      }
    }
    setNotice(t("chat.import.done", { count }));
  }

  return html`
    <div class="sidebar">
      <div class="row">
        <button class="primary grow" onClick=${onNew}>${t("chat.new")}</button>
        <button class="plain from-side" onClick=${onClose} aria-label=${t("chat.close")}>✕</button>
      </div>
      <input
        type="search"
        id="search"
        aria-label=${t("chat.search")}
        placeholder=${t("chat.search")}
        value=${search}
        onInput=${(/** @type {any} */ event) => setSearch(event.target.value)}
      />
      ${!kept && html`<p class="quiet">${t("chat.not_kept")}</p>`}
      <ul class="conversations" aria-label=${t("chat.conversations")}>
        ${found.slice(0, SHOWN_MAX).map(
          (each) => html`
            <li key=${each.id} class=${each.id === current?.id ? "current" : ""}>
              <button class="plain title" aria-current=${each.id === current?.id ? "true" : null} onClick=${() => onOpen(each)}>
                <bdi>${readable(each.title) || t("chat.untitled")}</bdi>
                <span class="quiet">${answering.has(each.id) ? t("chat.writing") : when(each.updated)}</span>
              </button>
              <${Menu} conversation=${each} />
            </li>
          `,
        )}
      </ul>
      ${found.length === 0 && html`<p class="quiet">${t(search ? "chat.search.none" : "chat.none")}</p>`}
      <p class="quiet" role="status">${notice}</p>
      <div class="row foot">
        <input
          ref=${picker}
          class="hidden"
          type="file"
          multiple
          accept=".json,.md,.txt"
          onChange=${(/** @type {any} */ event) => {
            void take([...event.target.files]);
            event.target.value = "";
          }}
        />
        <button onClick=${() => picker.current?.click()}>${t("chat.import")}</button>
        <button disabled=${all.length === 0} onClick=${() => save("conversations.json", toJson(all), "application/json")}>
          ${t("chat.export.all")}
        </button>
        <button
          class="danger"
          disabled=${all.length === 0}
          onClick=${() => {
            if (confirm(t("chat.delete.all.sure", { count: all.length }))) void removeAll();
          }}
        >
          ${t("chat.delete.all")}
        </button>
      </div>
    </div>
  `;
}

/** What can be done with a conversation. @param {{conversation: import("./conversations.js").Conversation}} props */
function Menu({ conversation }) {
  const name = fileName(conversation.title);
  const answering = useStore(running).get(conversation.id);
  const title = readable(conversation.title) || t("chat.untitled");
  const close = (/** @type {any} */ event) => event.currentTarget.closest("details").removeAttribute("open");
  return html`
    <details class="menu">
      <summary aria-label=${t("chat.more", { title })}>⋯</summary>
      <div>
        <button
          class="plain"
          onClick=${(/** @type {Event} */ event) => {
            save(`${name}.md`, toMarkdown(conversation), "text/markdown");
            close(event);
          }}
        >
          ${t("chat.export.markdown")}
        </button>
        <button
          class="plain"
          onClick=${(/** @type {Event} */ event) => {
            save(`${name}.json`, toJson([conversation]), "application/json");
            close(event);
          }}
        >
          ${t("chat.export.json")}
        </button>
        <button
          class="plain danger"
          onClick=${() => {
            answering?.stop();
            void remove(conversation);
          }}
        >
          ${t("chat.delete")}
        </button>
      </div>
    </details>
  `;
}
