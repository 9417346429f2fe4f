/**
 * What is to be done is asked once more, done, and then said: a dialog with what will happen, and a line that says
 * what did. The line is read by screen readers.
 */
import { ApiError, json } from "../shell/api.js";
import { t } from "../shell/i18n.js";
import { makeStore, useStore } from "../shell/store.js";
import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { hurry } from "./live.js";
import { Said } from "./said.js";

/**
 * `body` is shown in the dialog; `path` below /console/ and `data` are what is sent; where people fill something in,
 * `data` is a function. `said` makes of the answer what people are told.
 * @typedef {{title: string, body: any, action: string, path: string, data: any, said: (found: any) => any,
 *   danger?: boolean, done?: (found: any) => void}} Question
 */

/** @type {import("../shell/store.js").Store<Question | null>} */
const question = makeStore(/** @type {Question | null} */ (null));
/** What was done last. */
const told = makeStore(/** @type {any} */ (""));

/** @param {Question} asked */
export function ask(asked) {
  question.set(asked);
}

/** What went wrong, in the reader's language, and as the server said it. @param {unknown} error */
export function faultOf(error) {
  if (!(error instanceof ApiError)) return String(error);
  const isPlain = error.code === "unreachable" || error.words !== t("shell.error.other");
  if (isPlain || !error.message) return error.words;
  return html`${t("common.fault")} <${Said} text=${error.message} />`;
}

/** The dialog and the line; one of them on each page. */
export function Asking() {
  const asked = useStore(question);
  const last = useStore(told);
  useEffect(() => () => told.set(""), []);
  return html`
    <p class="told" role="status">${last}</p>
    ${asked && html`<${Dialog} asked=${asked} />`}
  `;
}

/** @param {{asked: Question}} props */
function Dialog({ asked }) {
  const dialog = useRef(/** @type {HTMLDialogElement | null} */ (null));
  const [fault, setFault] = useState(/** @type {any} */ (""));
  const [isBusy, setBusy] = useState(false);
  useEffect(() => dialog.current?.showModal(), []);

  const act = async () => {
    setBusy(true);
    setFault("");
    try {
      const found = await json(`/console/${asked.path}`, { body: typeof asked.data === "function" ? asked.data() : asked.data });
      told.set(asked.said(found));
      asked.done?.(found);
      question.set(null);
      void hurry();
    } catch (error) {
      setFault(faultOf(error));
      setBusy(false);
    }
  };

  return html`
    <dialog ref=${dialog} class="question" aria-labelledby="question-title" onClose=${() => question.set(null)}>
      <h2 id="question-title">${asked.title}</h2>
      ${asked.body}
      <p class="fault" role="alert">${fault}</p>
      <div class="answers">
        <button onClick=${() => dialog.current?.close()}>${t("common.cancel")}</button>
        <button class=${asked.danger ? "danger" : "primary"} disabled=${isBusy} onClick=${act}>${asked.action}</button>
      </div>
    </dialog>
  `;
}
