/** The page `cluster`. */
import { t } from "../shell/i18n.js";
import { html } from "../vendor/preact.js";

export default function Cluster() {
  return html`<div class="page"><h1>${t("cluster.title")}</h1></div>`;
}
