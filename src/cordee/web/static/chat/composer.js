/** Where a question is written, with files dropped into it. */
import { t } from "../shell/i18n.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact.js";
import { FileFault, readFile } from "./files.js";
import { readable } from "./markdown.js";

/** @typedef {import("./conversations.js").Attached} Attached */

const FILES_MAX = 20;

/**
 * @param {{
 *   isBusy: boolean,
 *   canSend: boolean,
 *   dropped: File[],
 *   onTaken: () => void,
 *   onSend: (text: string, files: Attached[]) => void,
 *   onStop: () => void,
 * }} props `dropped`: files that were dropped on the page, until they are taken
 */
export function Composer({ isBusy, canSend, dropped, onTaken, onSend, onStop }) {
  const [text, setText] = useState("");
  const [files, setFiles] = useState(/** @type {Attached[]} */ ([]));
  const [fault, setFault] = useState("");
  const [reading, setReading] = useState(0);
  const [waits, setWaits] = useState(false); // to be sent as soon as a model is known and all files are read
  const area = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  const picker = useRef(/** @type {HTMLInputElement | null} */ (null));

  useEffect(() => area.current?.focus(), []);
  useLayoutEffect(() => {
    const element = /** @type {HTMLTextAreaElement} */ (area.current);
    element.style.height = "auto";
    element.style.height = `${element.scrollHeight + 2}px`;
  }, [text]);
  useEffect(() => {
    if (dropped.length === 0) return;
    onTaken();
    void take(dropped);
  }, [dropped]);

  /** @param {File[]} given */
  async function take(given) {
    setFault("");
    setReading((count) => count + 1);
    for (const file of given.slice(0, FILES_MAX)) {
      try {
        const read = await readFile(file);
        setFiles((held) => [...held, read].slice(0, FILES_MAX));
      } catch (error) {
        const code = error instanceof FileFault ? error.code : "damaged";
        if (!(error instanceof FileFault)) console.warn(error);
        setFault(t(`chat.file.${code}`, { name: readable(file.name) }));
      }
    }
    setReading((count) => count - 1);
    area.current?.focus();
  }

  const isReady = canSend && !isBusy && reading === 0 && (text.trim() !== "" || files.length > 0);
  const send = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!isBusy && (area.current?.value.trim() || files.length > 0)) setWaits(true);
  };
  useEffect(() => {
    if (!waits || !isReady) return;
    setWaits(false);
    onSend(text.trim(), files);
    setText("");
    setFiles([]);
    setFault("");
  }, [waits, isReady]);
  /** @param {KeyboardEvent} event */
  const press = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  };
  /** @param {ClipboardEvent} event */
  const paste = (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])];
    if (pasted.length === 0) return;
    event.preventDefault();
    void take(pasted);
  };

  return html`
    <form class="composer" onSubmit=${send}>
      ${fault && html`<p class="fault" role="alert">${fault}</p>`}
      ${reading > 0 && html`<p class="quiet" role="status">${t("chat.file.reading")}</p>`}
      ${files.length > 0 &&
      html`
        <ul class="files" aria-label=${t("chat.files")}>
          ${files.map(
            (file, at) => html`
              <li>
                <bdi>${readable(file.name)}</bdi>
                <span class="quiet">${t("chat.file.words", { count: words(file.text) })}</span>
                <button
                  type="button"
                  class="plain"
                  aria-label=${t("chat.file.remove", { name: file.name })}
                  onClick=${() => setFiles(files.filter((_, other) => other !== at))}
                >
                  ✕
                </button>
              </li>
            `,
          )}
        </ul>
      `}
      <div class="row">
        <input
          ref=${picker}
          class="hidden"
          type="file"
          multiple
          onChange=${(/** @type {any} */ event) => {
            void take([...event.target.files]);
            event.target.value = "";
          }}
        />
        <button type="button" aria-label=${t("chat.file.add")} title=${t("chat.file.add")} onClick=${() => picker.current?.click()}>
          +
        </button>
        <textarea
          ref=${area}
          rows="1"
          dir="auto"
          aria-label=${t("chat.question")}
          placeholder=${t("chat.question.placeholder")}
          value=${text}
          onInput=${(/** @type {any} */ event) => {
            setText(event.target.value);
            setWaits(false);
          }}
          onKeyDown=${press}
          onPaste=${paste}
        ></textarea>
        ${isBusy
          ? html`<button type="button" class="primary" onClick=${onStop}>${t("chat.stop")}</button>`
          : html`<button class="primary" disabled=${!isReady}>${t("chat.send")}</button>`}
      </div>
    </form>
  `;
}

/** About as many words as a text has, for people. @param {string} text */
function words(text) {
  return text.split(/\s+/).length;
}
