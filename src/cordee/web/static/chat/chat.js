/** The page `chat`. */
import { t } from "../shell/i18n.js";
import { html } from "../vendor/preact.js";

export default function Chat() {
  return html`<div class="page"><h1>${t("chat.title")}</h1></div>`;
}
