/**
 * Where else the models can be asked, when the machine that this page came from is gone. The page learns the addresses
 * of the other machines while it can, and keeps them in this browser.
 */
import { json } from "../shell/api.js";
import { t } from "../shell/i18n.js";
import { html } from "../vendor/preact.js";

const KEPT = "cordee-elsewhere";

/** @typedef {{name: string, url: string}} Other */

/** Ask which other machines have this page. */
export async function learn() {
  try {
    const { others } = await json("/elsewhere");
    localStorage.setItem(KEPT, JSON.stringify(others));
  } catch {
    // What was learned before stays.
  }
}

/** @returns {Other[]} */
function known() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
    return Array.isArray(kept) ? kept.filter((each) => /^https?:\/\//.test(each?.url)) : [];
  } catch {
    return [];
  }
}

export function Elsewhere() {
  const others = known();
  if (others.length === 0) return html`<p>${t("chat.elsewhere.none")}</p>`;
  return html`
    <p>${t("chat.elsewhere")}</p>
    <ul>
      ${others.map((each) => html`<li><a href=${each.url} rel="noreferrer">${each.name}</a> <span class="quiet">${each.url}</span></li>`)}
    </ul>
  `;
}
