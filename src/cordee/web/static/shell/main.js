/**
 * The frame around all pages: header, navigation, the form for a key. Each page is a module `NAME/NAME.js` with words
 * in `i18n/NAME.*.json` and a style `NAME/NAME.css`, loaded when somebody goes there. Its default export is a
 * component; it is drawn once the server has said who is there.
 */
import { switchTheme, theme } from "./appearance.js";
import { ApiError } from "./api.js";
import { choose, language, LANGUAGES, loadWords, t } from "./i18n.js";
import { refresh, session, SignIn, signOut } from "./session.js";
import { makeStore, useStore } from "./store.js";
import { html, render } from "../vendor/preact.js";

const PAGES = { "/": "chat", "/cluster": "cluster", "/models": "models", "/admin": "admin" };

/** @typedef {keyof typeof PAGES} Path */
/** @typedef {{path: Path, component: any}} Shown */

/** @type {import("./store.js").Store<Shown | null>} */
const shown = makeStore(/** @type {Shown | null} */ (null));
/** What keeps the page from being drawn, if anything does. */
const fault = makeStore("");

/** @returns {Path} */
function path() {
  return location.pathname in PAGES ? /** @type {Path} */ (location.pathname) : "/";
}

/** Load the page of the address, and show it. */
async function open() {
  const wanted = path();
  const name = PAGES[wanted];
  const style = new URL(`../${name}/${name}.css`, import.meta.url).href;
  try {
    const [module] = await Promise.all([import(`../${name}/${name}.js`), loadWords(name), loadStyle(style)]);
    if (wanted !== path()) return; // somebody went on meanwhile
    for (const link of document.querySelectorAll("link.of-page")) {
      /** @type {HTMLLinkElement} */ (link).disabled = /** @type {HTMLLinkElement} */ (link).href !== style;
    }
    fault.set("");
    shown.set({ path: wanted, component: module.default });
    document.title = `${t(`shell.page.${name}`)} · Cordée`;
  } catch (error) {
    console.error(error);
    fault.set(t("shell.error.page"));
  }
}

/**
 * @param {string} url
 * @returns {Promise<void>}
 */
function loadStyle(url) {
  if (document.querySelector(`link[href="${CSS.escape(url)}"]`)) return Promise.resolve();
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.className = "of-page"; // and of no other: pages use the same names for different things
  link.href = url;
  return new Promise((resolve, reject) => {
    link.onload = () => resolve();
    link.onerror = reject;
    document.head.append(link);
  });
}

/**
 * Go to another page without leaving the document: an answer that comes goes on.
 * @param {MouseEvent} event
 */
function follow(event) {
  const link = /** @type {HTMLAnchorElement} */ (event.currentTarget);
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
  event.preventDefault();
  if (link.pathname !== location.pathname) history.pushState(null, "", link.pathname);
  void open();
}

function Header() {
  const who = useStore(session);
  const current = useStore(shown)?.path;
  const inUse = useStore(language);
  const look = useStore(theme);
  return html`
    <header class="bar">
      <a class="skip" href="#main">${t("shell.skip")}</a>
      <span class="name" aria-hidden="true">Cordée</span>
      <nav aria-label=${t("shell.navigation")}>
        ${Object.entries(PAGES).map(
          ([to, name]) => html`
            <a href=${to} onClick=${follow} aria-current=${to === current ? "page" : null}>
              ${t(`shell.page.${name}`)}
            </a>
          `,
        )}
      </nav>
      <div class="choices">
        ${who?.name && html`<button onClick=${signOut}>${t("shell.sign_out", { name: who.name })}</button>`}
        <button onClick=${switchTheme} aria-label=${t(look === "dark" ? "shell.light" : "shell.dark")}>
          <span aria-hidden="true">${look === "dark" ? "☀" : "☾"}</span>
        </button>
        ${Object.entries(LANGUAGES)
          .filter(([each]) => each !== inUse)
          .map(
            ([each, name]) => html`
              <button lang=${each} onClick=${() => void choose(/** @type {any} */ (each))}>${name}</button>
            `,
          )}
      </div>
    </header>
  `;
}

function Page() {
  const who = useStore(session);
  const page = useStore(shown);
  const broken = useStore(fault);
  useStore(language);
  if (broken) {
    const again = () => location.reload();
    return html`<main id="main" class="panel">
      <p role="alert">${broken}</p>
      <button class="primary" onClick=${again}>${t("shell.reload")}</button>
    </main>`;
  }
  if (who === null || page === null) return html`<main id="main" aria-busy="true"></main>`;
  if (who.key_needed) return html`<main id="main"><${SignIn} why=${t("shell.sign_in.why")} /></main>`;
  return html`<main id="main" tabindex="-1"><${page.component} session=${who} /></main>`;
}

async function start() {
  const root = /** @type {HTMLElement} */ (document.getElementById("page"));
  addEventListener("popstate", () => void open());
  language.watch(() => {
    if (shown.get()) document.title = `${t(`shell.page.${PAGES[path()]}`)} · Cordée`;
  });
  await loadWords("shell");
  root.replaceChildren();
  render(html`<${Header} /><${Page} />`, root);
  await Promise.all([
    open(),
    refresh().catch((error) => fault.set(error instanceof ApiError ? error.words : String(error))),
  ]);
}

void start();
