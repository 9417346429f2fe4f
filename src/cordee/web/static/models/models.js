/** The page `models`: what the machines serve and have, and what could be fetched, with the verdict before it is. */
import { ask, Asking } from "../common/ask.js";
import { isSilent, me, useOverview } from "../common/live.js";
import { Said } from "../common/said.js";
import { Verdict } from "../common/verdict.js";
import { layersText, listing, modelState } from "../common/words.js";
import { json } from "../shell/api.js";
import { bytes, number, t } from "../shell/i18n.js";
import { useStore } from "../shell/store.js";
import { html, useEffect, useState } from "../vendor/preact.js";
import { use } from "./use.js";

export default function Models() {
  const now = useOverview();
  const silent = useStore(isSilent);
  const { admin } = useStore(me);
  const [known, setKnown] = useState(/** @type {any} */ (null));
  // The list is read again when a model has come or gone.
  const seen = now ? JSON.stringify([now.models.map((/** @type {any} */ m) => m.name), now.pulls.map((/** @type {any} */ p) => p.state)]) : "";
  useEffect(() => {
    if (seen) json("/console/models").then(setKnown, () => {});
  }, [seen]);
  if (now === null || known === null) {
    return html`<div class="page" aria-busy=${!silent}>
      <h1>${t("models.title")}</h1>
      <p>${t(silent ? "common.silent" : "common.waiting")}</p>
    </div>`;
  }
  const served = now.models.filter((/** @type {any} */ each) => each.deployed);
  const names = new Set(now.models.map((/** @type {any} */ each) => each.name));
  const idle = [
    ...now.models.filter((/** @type {any} */ each) => !each.deployed),
    ...known.stored
      .filter((/** @type {any} */ each) => !names.has(each.name))
      .map((/** @type {any} */ each) => ({
        name: each.name,
        weights_bytes: each.bytes,
        offered_by: [],
        offered_here: true,
        deployed: false,
      })),
  ];
  const here = new Set([...names, ...known.stored.map((/** @type {any} */ each) => each.name)]);
  const more = known.cards.filter((/** @type {any} */ card) => !here.has(card.name));
  return html`
    <div class="page">
      <h1>${t("models.title")}</h1>
      ${silent && html`<p role="alert" class="fault">${t("common.silent")}</p>`}
      ${!admin && html`<p class="quiet">${t("models.only_look")}</p>`}
      <${Asking} />
      <${Pulls} pulls=${now.pulls} reading=${now.reading} admin=${admin} />
      <${List} id="served" title=${t("models.served")} none=${t("models.served.none")}>
        ${served.map((/** @type {any} */ each) => html`<${Here} key=${each.name} ...${{ model: each, admin, stored: known.stored, now }} />`)}
      <//>
      <${List} id="idle" title=${t("models.idle")} none=${t("models.idle.none")}>
        ${idle.map((/** @type {any} */ each) => html`<${Here} key=${each.name} ...${{ model: each, admin, stored: known.stored, now }} />`)}
      <//>
      <${List} id="more" title=${t("models.more")} none=${t("models.more.none")}>
        ${more.map((/** @type {any} */ card) => html`<${Known} key=${card.name} card=${card} admin=${admin} />`)}
      <//>
      ${admin && html`<${Another} now=${now} />`}
    </div>
  `;
}

/** @param {{id: string, title: string, none: string, children?: any}} props */
function List({ id, title, none, children }) {
  const count = [children].flat(2).filter(Boolean).length;
  return html`
    <section aria-labelledby=${id}>
      <h2 id=${id}>${title}</h2>
      ${count === 0 ? html`<p class="quiet">${none}</p>` : html`<ul class="models">${children}</ul>`}
    </section>
  `;
}

/** A model that is in the house. @param {{model: any, admin: boolean, stored: any[], now: any}} props */
function Here({ model, admin, stored, now }) {
  const state = modelState(model);
  const isStored = stored.some((each) => each.name === model.name);
  const placements = model.placements ?? [];
  const isCluster = now.kind === "cluster";
  return html`
    <li>
      <div>
        <h3>${model.name} <span class="chip ${state}">${t(`common.model.${state}`)}</span></h3>
        <p class="quiet">
          ${bytes(model.weights_bytes)}
          ${model.offered_by.length > 0 && ` · ${t("models.whole_on", { names: listing(model.offered_by) })}`}
          ${model.deployed && ` · ${t("models.sized", { sequences: model.sequences, context: model.context })}`}
          ${model.replicas > 1 && ` · ${t("models.copies", { count: model.replicas })}`}
          ${model.only?.length > 0 && ` · ${t("models.only", { names: listing(model.only) })}`}
        </p>
        ${placements.map(
          (/** @type {any} */ placement) => html`<p>
            ${placement.stages.map((/** @type {any} */ each) => `${each.name}: ${layersText(each.layers)}`).join(" → ")}
          </p>`,
        )}
        ${model.why && html`<p class="fault"><${Said} text=${model.why} /></p>`}
      </div>
      ${admin &&
      html`<div class="actions">
        ${model.deployed
          ? isCluster &&
            html`
              <button onClick=${() => use({ name: model.name, nodes: now.nodes, model })}>${t("models.change")}</button>
              <button onClick=${() => stopServing(model.name)}>${t("models.undeploy")}</button>
            `
          : html`<button class="primary" onClick=${() => use({ name: model.name, nodes: now.nodes })}>${t("models.deploy")}</button>`}
        ${isStored && html`<button class="danger" onClick=${() => remove(model, stored)}>${t("models.remove")}</button>`}
      </div>`}
    </li>
  `;
}

/** A model that could be fetched. @param {{card: any, admin: boolean}} props */
function Known({ card, admin }) {
  const [isAsked, setAsked] = useState(false);
  const languages = card.languages.slice(0, 4).join(", ");
  const rest = card.language_count - Math.min(4, card.languages.length);
  return html`
    <li>
      <div>
        <h3>${card.title} <span class="quiet">${card.name}</span></h3>
        <p><${Said} text=${card.purpose} /></p>
        <p class="quiet">
          ${bytes(card.bytes)} · ${t("models.parameters", { count: number(card.parameters, { notation: "compact", maximumFractionDigits: 1 }) })}
          ${" · "}${t("models.languages", { languages: rest > 0 ? `${languages} +${rest}` : languages })}
          ${" · "}${t("models.licence", { licence: card.license })}
        </p>
      </div>
      ${admin &&
      html`<div class="actions">
        <button class="primary" onClick=${() => fetchModel(card.name, card)}>${t("models.pull")}</button>
      </div>`}
      <details class="wide-line" onToggle=${(/** @type {any} */ event) => event.target.open && setAsked(true)}>
        <summary>${t("models.fits")}</summary>
        ${isAsked && html`<${Verdict} model=${card.name} />`}
      </details>
    </li>
  `;
}

/** A model of the hub by its name there. @param {{now: any}} props */
function Another({ now }) {
  const [name, setName] = useState("");
  /** @param {Event} event */
  const send = (event) => {
    event.preventDefault();
    fetchModel(name.trim(), null);
  };
  return html`
    <section aria-labelledby="another-title">
      <h2 id="another-title">${t("models.another")}</h2>
      <p class="quiet">${t("models.another.why")}</p>
      <form class="another" onSubmit=${send}>
        <label>
          ${t("models.another.name")}
          <input
            required
            spellcheck="false"
            autocomplete="off"
            pattern="[^\\s\\/]+\\/\\S+"
            placeholder="owner/name"
            value=${name}
            onInput=${(/** @type {any} */ event) => setName(event.target.value)}
          />
        </label>
        <div class="actions">
          <button class="primary">${t("models.pull")}</button>
          ${now.kind === "cluster" &&
          html`<button type="button" onClick=${(/** @type {any} */ event) => {
            if (!event.currentTarget.form.reportValidity()) return;
            use({ name: name.trim(), nodes: now.nodes, isOnHub: true });
          }}>${t("models.hub")}</button>`}
        </div>
      </form>
      ${now.kind === "cluster" && html`<p class="quiet">${t("models.hub.why")}</p>`}
    </section>
  `;
}

/** @param {{pulls: any[], reading: any[], admin: boolean}} props */
function Pulls({ pulls, reading, admin }) {
  if (pulls.length + reading.length === 0) return null;
  return html`
    <section aria-labelledby="pulls">
      <h2 id="pulls">${t("models.pulls")}</h2>
      <ul class="models">
        ${pulls.map((each) => html`<${Pull} key=${each.number} pull=${each} admin=${admin} />`)}
        ${reading.map((each) => html`<${Reading} key=${each.name} reading=${each} admin=${admin} />`)}
      </ul>
    </section>
  `;
}

/** @param {{pull: any, admin: boolean}} props */
function Pull({ pull, admin }) {
  const isRunning = pull.state === "running";
  const stop = () =>
    ask({
      title: t("models.stop.title", { name: pull.source }),
      body: html`<p>${t("models.stop.body")}</p>`,
      action: t("models.stop"),
      path: "pull/stop",
      data: { number: pull.number },
      said: () => t("models.stop.said", { name: pull.source }),
    });
  return html`
    <li>
      <div>
        <h3>${pull.source}</h3>
        <p class=${pull.state === "failed" ? "fault" : "quiet"}>${t(`models.pull.${pull.state}`, { name: pull.model })}</p>
        ${pull.error && html`<p class="quiet"><${Said} text=${pull.error} /></p>`}
      </div>
      ${admin && isRunning && html`<button onClick=${stop}>${t("models.stop")}</button>`}
      ${isRunning &&
      html`<label class="wide-line">
        ${pull.total_bytes
          ? t("common.of", { done: bytes(pull.done_bytes), total: bytes(pull.total_bytes) })
          : t("models.pull.begins")}
        <progress max=${pull.total_bytes || 1} value=${pull.done_bytes}></progress>
      </label>`}
    </li>
  `;
}

/** A model that a machine reads from the hub, to be used then. @param {{reading: any, admin: boolean}} props */
function Reading({ reading, admin }) {
  const { name, node, done_bytes, total_bytes } = reading;
  return html`
    <li>
      <div>
        <h3>${name}</h3>
        <p class="quiet">${t("models.hub.reading", { node })}</p>
      </div>
      ${admin && reading.source && html`<button onClick=${() => stopServing(name)}>${t("models.stop")}</button>`}
      <label class="wide-line">
        ${t("common.of", { done: bytes(done_bytes), total: bytes(total_bytes) })}
        <progress max=${total_bytes || 1} value=${done_bytes}></progress>
      </label>
    </li>
  `;
}

/** @param {string} name @param {any} card */
function fetchModel(name, card) {
  const comes = card?.here ?? false; // with the program
  ask({
    title: t("models.pull.title", { name: card?.title ?? name }),
    body: html`
      <${Verdict} model=${name} />
      <p>${comes ? t("models.pull.inside") : t("models.pull.body", { size: card ? bytes(card.bytes) : "" })}</p>
      ${card && html`<p class="quiet">${t("models.licence", { licence: card.license })}</p>`}
    `,
    action: t("models.pull"),
    path: "pull",
    data: { source: name },
    said: () => t("models.pull.said", { name }),
  });
}

/** @param {string} name */
function stopServing(name) {
  ask({
    title: t("models.undeploy.title", { name }),
    body: html`<p>${t("models.undeploy.body")}</p>`,
    action: t("models.undeploy"),
    danger: true,
    path: "undeploy",
    data: { model: name },
    said: () => t("models.undeploy.said", { name }),
  });
}

/** @param {any} model @param {any[]} stored */
function remove(model, stored) {
  const { name } = model;
  const found = stored.find((each) => each.name === name);
  const isLast = model.offered_by.length <= 1;
  ask({
    title: t("models.remove.title", { name }),
    body: html`
      <p>${t("models.remove.body", { size: bytes(found?.bytes ?? model.weights_bytes) })}</p>
      ${isLast && html`<p class="fault">${t("models.remove.last")}</p>`}
      ${model.deployed && html`<p class="fault">${t("models.remove.deployed")}</p>`}
    `,
    action: t("models.remove"),
    danger: true,
    path: "model/remove",
    data: { name, last: true },
    said: () => t("models.remove.said", { name }),
  });
}
