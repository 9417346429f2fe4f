/** The page `admin`. */
import { t } from "../shell/i18n.js";
import { html } from "../vendor/preact.js";

export default function Admin() {
  return html`<div class="page"><h1>${t("admin.title")}</h1></div>`;
}
