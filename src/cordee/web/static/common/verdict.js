/** Whether a model fits, on each machine by itself and on all together, and how fast it would be. */
import { json } from "../shell/api.js";
import { bytes, t } from "../shell/i18n.js";
import { html, useEffect, useState } from "../vendor/preact.js";
import { faultOf } from "./ask.js";
import { Said } from "./said.js";
import { layersText, speed } from "./words.js";

/** @param {{model: string}} props */
export function Verdict({ model }) {
  const [found, setFound] = useState(/** @type {any} */ (null));
  const [fault, setFault] = useState(/** @type {any} */ (""));
  useEffect(() => {
    let isThere = true;
    setFound(null);
    json("/console/fit", { body: { model } }).then(
      (got) => isThere && setFound(got),
      (error) => isThere && setFault(faultOf(error)),
    );
    return () => {
      isThere = false;
    };
  }, [model]);
  if (fault) return html`<p class="fault" role="alert">${fault}</p>`;
  if (!found) return html`<p class="quiet" aria-busy="true">${t("common.fit.looking")}</p>`;
  const { together, machines } = found;
  return html`
    <div class="verdict">
      <p class=${together.fits ? "good" : "fault"}>${sentence(together)}</p>
      ${together.fits && together.lacks && html`<p class="quiet">${t("common.fit.lacks")} <${Said} text=${together.lacks} />.</p>`}
      <table>
        <caption>${t("common.fit.caption", { size: bytes(found.weights_bytes) })}</caption>
        <thead>
          <tr>
            <th scope="col">${t("common.fit.where")}</th>
            <th scope="col">${t("common.fit.fits")}</th>
            <th scope="col">${t("common.fit.speed")}</th>
          </tr>
        </thead>
        <tbody>
          ${machines.map((/** @type {any} */ each) => html`<${Row} name=${each.name} found=${each} />`)}
          ${machines.length > 1 &&
          html`<${Row} name=${t("common.fit.together")} found=${together} />`}
        </tbody>
      </table>
      <details>
        <summary>${t("common.fit.why")}</summary>
        <p><${Said} text=${together.why} /></p>
        <ul>
          ${together.machines.map((/** @type {any} */ each) => html`<li><strong>${each.name}</strong>: <${Said} text=${each.why} /></li>`)}
        </ul>
      </details>
    </div>
  `;
}

/** @param {any} together */
function sentence(together) {
  if (!together.fits) return t("common.fit.no");
  if (together.stages.length === 1) return t("common.fit.alone", { speed: speed(together.tokens_per_second) });
  return t("common.fit.shared", { count: together.stages.length, speed: speed(together.tokens_per_second) });
}

/** @param {{name: string, found: any}} props */
function Row({ name, found }) {
  const parts = found.fits && found.stages.length > 1;
  return html`
    <tr>
      <th scope="row">${name}</th>
      <td>
        ${t(found.fits ? "common.yes" : "common.no")}
        ${parts &&
        html`<br /><span class="quiet">
            ${found.stages.map((/** @type {any} */ each) => `${each.name}: ${layersText(each.layers)}`).join(", ")}
          </span>`}
      </td>
      <td>${found.fits ? speed(found.tokens_per_second) : "–"}</td>
    </tr>
  `;
}
