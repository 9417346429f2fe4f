/** A text as a QR code: dark squares of an SVG, with the white margin that readers want (4 modules). */
import { html, useMemo } from "../vendor/preact.js";
import { encode } from "../vendor/uqr.js";

/** @param {{text: string, label: string}} props */
export function QrCode({ text, label }) {
  const { size, path } = useMemo(() => drawn(text), [text]);
  return html`
    <svg class="qr" viewBox="0 0 ${size} ${size}" role="img" aria-label=${label} shape-rendering="crispEdges">
      <path d=${path} />
    </svg>
  `;
}

/** @param {string} text */
function drawn(text) {
  const { size, data } = encode(text, { ecc: "M", border: 4 });
  const path = data
    .flatMap((row, y) => row.map((isDark, x) => (isDark ? `M${x} ${y}h1v1h-1z` : "")))
    .join("");
  return { size, path };
}
