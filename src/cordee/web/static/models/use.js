/** Having the machines use a model: how often, and on which of them; also one of the hub that none has whole. */
import { ask } from "../common/ask.js";
import { Said } from "../common/said.js";
import { Verdict } from "../common/verdict.js";
import { t } from "../shell/i18n.js";
import { html, useState } from "../vendor/preact.js";

const COPIES_MAX = 64; // as many as `cordee deploy --replicas` takes

/** @typedef {{replicas: number, only: string[]}} Draft `only`: ids of machines; none: all of them */

/**
 * Ask how a model is to be used, and have it used so.
 * @param {{name: string, nodes: any[], model?: any, isOnHub?: boolean}} what `model`: as it is used now
 */
export function use({ name, nodes, model, isOnHub = false }) {
  const before = nodes.filter((each) => model?.only?.includes(each.name)).map((each) => each.id);
  /** @type {Draft} */
  const draft = { replicas: model?.replicas ?? 1, only: before };
  ask({
    title: t(model?.deployed ? "models.change.title" : "models.deploy.title", { name }),
    body: html`
      <${Verdict} model=${name} />
      ${isOnHub && html`<p>${t("models.hub.body")}</p>`}
      ${nodes.length > 1 && html`<${Choices} draft=${draft} nodes=${nodes} isKept=${before.length > 0} />`}
    `,
    action: t(model?.deployed ? "models.change" : "models.deploy"),
    path: "deploy",
    data: () => ({ model: name, ...draft }),
    said,
  });
}

/** What people are told, of Deployed in src/cordee/agent/control.py. @param {any} found */
function said({ name, why, lacks, reading }) {
  if (reading) return t("models.hub.said", { name });
  if (why) return html`${t("models.deploy.waits", { name })} <${Said} text=${why} />`;
  return html`${t("models.deploy.said", { name })}${lacks && html` ${t("models.deploy.lacks")} <${Said} text=${lacks} />.`}`;
}

/** @param {{draft: Draft, nodes: any[], isKept: boolean}} props what is chosen is put into `draft` */
function Choices({ draft, nodes, isKept }) {
  const [, redraw] = useState(0);
  /** @param {Partial<Draft>} some */
  const set = (some) => {
    Object.assign(draft, some);
    redraw((count) => count + 1);
  };
  return html`
    <label>
      ${t("models.copies.label")}
      <input
        type="number"
        min="1"
        max=${COPIES_MAX}
        value=${draft.replicas}
        onInput=${(/** @type {any} */ event) => set({ replicas: Math.max(1, Number(event.target.value) || 1) })}
      />
    </label>
    <fieldset>
      <legend>${t("models.only.label")}</legend>
      ${nodes.map(
        (each) => html`<label class="tick" key=${each.id}>
          <input
            type="checkbox"
            checked=${draft.only.includes(each.id)}
            onChange=${(/** @type {any} */ event) =>
              set({
                only: event.target.checked ? [...draft.only, each.id] : draft.only.filter((other) => other !== each.id),
              })}
          />
          ${" "}${each.name}
        </label>`,
      )}
      <p class="quiet">${t(isKept ? "models.only.kept" : "models.only.about")}</p>
    </fieldset>
  `;
}
