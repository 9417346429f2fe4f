/** What is shown this once, and then nowhere again: an invitation, or somebody's key. */
import { t } from "../shell/i18n.js";
import { html, useState } from "../vendor/preact.js";
import { QrCode } from "./qr.js";

/** @param {{title: string, text: string, label: string, children?: any, onClose: () => void}} props */
export function Secret({ title, text, label, children, onClose }) {
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
  };
  return html`
    <div class="secret" role="group" aria-label=${title}>
      <div>
        <p><strong>${title}</strong></p>
        <p><code>${text}</code></p>
        ${children}
        <div class="actions">
          ${navigator.clipboard && html`<button onClick=${copy}>${t(isCopied ? "admin.copied" : "admin.copy")}</button>`}
          <button onClick=${onClose}>${t("admin.hide")}</button>
        </div>
      </div>
      <${QrCode} text=${text} label=${label} />
    </div>
  `;
}
