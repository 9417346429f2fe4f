/** Who uses the page: whether a key has to be typed first, and what its holder may do. */
import { ApiError, json, request, signedOut } from "./api.js";
import { t } from "./i18n.js";
import { makeStore } from "./store.js";
import { html, useEffect, useRef, useState } from "../vendor/preact.js";

/** @typedef {{key_needed: boolean, name: string, is_admin: boolean}} Session */

/** @type {import("./store.js").Store<Session | null>} null: not known yet */
export const session = makeStore(/** @type {Session | null} */ (null));

signedOut.watch(() => {
  void refresh();
});

/** Ask the server who is there. */
export async function refresh() {
  session.set(await json("/session"));
}

/** Forget the key here and at the server. */
export async function signOut() {
  await request("/session", { method: "DELETE" });
  await refresh();
}

/**
 * The form for a key. `why` says what it is for.
 * @param {{why: string, onDone?: () => void}} props
 */
export function SignIn({ why, onDone }) {
  const [key, setKey] = useState("");
  const [fault, setFault] = useState("");
  const [isBusy, setBusy] = useState(false);
  const field = useRef(/** @type {HTMLInputElement | null} */ (null));
  useEffect(() => field.current?.focus(), []);

  /** @param {Event} event */
  const send = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      await request("/session", { body: { key } });
      setFault("");
      await refresh();
      onDone?.();
    } catch (error) {
      setFault(error instanceof ApiError ? error.words : String(error));
      field.current?.focus();
    } finally {
      setBusy(false);
    }
  };

  return html`
    <form class="sign-in panel" onSubmit=${send}>
      <h1>${t("shell.sign_in.title")}</h1>
      <p>${why}</p>
      <input type="text" class="hidden" autocomplete="username" value="cordee" tabindex="-1" aria-hidden="true" />
      <label>
        ${t("shell.sign_in.key")}
        <input
          ref=${field}
          type="password"
          autocomplete="current-password"
          spellcheck="false"
          required
          value=${key}
          onInput=${(/** @type {any} */ event) => setKey(event.target.value)}
          aria-describedby="sign-in-fault"
        />
      </label>
      <p id="sign-in-fault" class="fault" role="alert">${fault}</p>
      <button class="primary" disabled=${isBusy}>${t("shell.sign_in.send")}</button>
      <p class="quiet">${t("shell.sign_in.kept")}</p>
    </form>
  `;
}
