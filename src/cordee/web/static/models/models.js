/** The page `models`. */
import { t } from "../shell/i18n.js";
import { html } from "../vendor/preact.js";

export default function Models() {
  return html`<div class="page"><h1>${t("models.title")}</h1></div>`;
}
