/** The page `cluster`: the machines as they are connected, what runs where and why, and what changed lately. */
import { Asking } from "../common/ask.js";
import { isSilent, useOverview, useSnapshots } from "../common/live.js";
import { Said } from "../common/said.js";
import { Verdict } from "../common/verdict.js";
import {
  clock,
  day,
  layersText,
  listing,
  memoryText,
  milliseconds,
  modelState,
  power,
  speed,
  stateOf,
} from "../common/words.js";
import { bytes, t } from "../shell/i18n.js";
import { useStore } from "../shell/store.js";
import { html, useState } from "../vendor/preact.js";
import { changesOf } from "./events.js";
import { ClusterMap, flowsOf } from "./map.js";

const CHANGES_SHOWN = 30;

export default function Cluster() {
  const now = useOverview();
  const snapshots = useSnapshots();
  const silent = useStore(isSilent);
  const [at, setAt] = useState(/** @type {number | null} */ (null)); // the clock of the snapshot that is looked at
  if (now === null) {
    return html`<div class="page" aria-busy=${!silent}>
      <h1>${t("cluster.title")}</h1>
      <p>${t(silent ? "common.silent" : "common.waiting")}</p>
    </div>`;
  }
  const index = at === null ? -1 : snapshots.findIndex((snapshot) => snapshot.clock === at);
  const snapshot = index < 0 ? null : snapshots[index];
  return html`
    <div class="page">
      <h1>${t("cluster.title")}</h1>
      <p role="status" class="health">${silent ? t("common.silent") : health(now)}</p>
      ${now.warnings.map((/** @type {string} */ each) => html`<p class="fault"><${Said} text=${each} /></p>`)}
      ${snapshots.length > 1 && html`<${Timeline} snapshots=${snapshots} index=${index} choose=${setAt} />`}
      ${snapshot ? html`<${Past} snapshot=${snapshot} />` : html`<${Present} now=${now} />`}
      <${Models} now=${now} />
      <${UnderWay} now=${now} />
      <${Machines} now=${now} />
      <${Lately} snapshots=${snapshots} changes=${now.changes} choose=${setAt} />
      <${Asking} />
    </div>
  `;
}

/** Everything in a sentence. @param {any} now */
function health(now) {
  const lost = now.nodes.filter((/** @type {any} */ each) => each.state !== "alive").map((/** @type {any} */ each) => each.name);
  const count = now.nodes.length;
  const deployed = now.models.filter((/** @type {any} */ each) => each.deployed);
  const waiting = deployed.filter((/** @type {any} */ each) => each.state !== "serving").map((/** @type {any} */ each) => each.name);
  const machines = lost.length
    ? t("cluster.health.lost", { count: lost.length, names: listing(lost) })
    : t("cluster.health.all", { count });
  const models = waiting.length
    ? t("cluster.health.healing", { names: listing(waiting) })
    : t(deployed.length ? "cluster.health.serving" : "cluster.health.idle");
  const energy = now.watts === null ? "" : ` ${t("cluster.health.watts", { watts: power(now.watts) })}`;
  return `${machines} ${models}${energy}`;
}

/** @param {{now: any}} props */
function Present({ now }) {
  const machines = now.nodes.map((/** @type {any} */ each) => ({ ...each, devices: each.devices ?? [] }));
  const models = now.models.map((/** @type {any} */ each) => each.name);
  return html`<${ClusterMap} machines=${machines} flows=${flowsOf(now.models)} links=${now.links} models=${models} />`;
}

/** The map as it was. @param {{snapshot: any}} props */
function Past({ snapshot }) {
  const machines = snapshot.nodes.map((/** @type {any} */ node) => ({
    ...node,
    self: false,
    watts: null,
    devices: [],
    stages: snapshot.models.flatMap((/** @type {any} */ model) =>
      model.stages
        .filter((/** @type {any} */ each) => each[0] === node.id)
        .map((/** @type {any} */ each) => ({ model: model.name, layers: [each[1], each[2]] })),
    ),
  }));
  const models = snapshot.models.map((/** @type {any} */ model) => ({
    name: model.name,
    placements: [{ active: 0, stages: model.stages.map((/** @type {any} */ each) => ({ node: each[0] })) }],
  }));
  const names = models.map((/** @type {any} */ each) => each.name);
  return html`<div class="past">
    <p>${t("cluster.past", { clock: clock(snapshot.clock) })}</p>
    <${ClusterMap} machines=${machines} flows=${flowsOf(models)} links=${[]} models=${names} />
  </div>`;
}

/** @param {{snapshots: any[], index: number, choose: (at: number | null) => void}} props */
function Timeline({ snapshots, index, choose }) {
  const last = snapshots.length - 1;
  const shown = index < 0 ? last : index;
  const said = index < 0 ? t("cluster.now") : clock(snapshots[shown].clock);
  /** @param {number} to */
  const go = (to) => choose(to >= last ? null : snapshots[Math.max(0, to)].clock);
  return html`
    <div class="timeline">
      <label for="moment">${t("cluster.moment")} <strong>${said}</strong></label>
      <button aria-label=${t("cluster.earlier")} disabled=${shown === 0} onClick=${() => go(shown - 1)}>
        <span aria-hidden="true">◀</span>
      </button>
      <input
        id="moment"
        type="range"
        min="0"
        max=${last}
        value=${shown}
        aria-valuetext=${said}
        onInput=${(/** @type {any} */ event) => go(Number(event.target.value))}
      />
      <button aria-label=${t("cluster.later")} disabled=${index < 0} onClick=${() => go(shown + 1)}>
        <span aria-hidden="true">▶</span>
      </button>
      <button disabled=${index < 0} onClick=${() => choose(null)}>${t("cluster.now")}</button>
    </div>
  `;
}

/** @param {{now: any}} props */
function Models({ now }) {
  const deployed = now.models.filter((/** @type {any} */ each) => each.deployed);
  return html`
    <section aria-labelledby="models-title">
      <h2 id="models-title">${t("cluster.models")}</h2>
      ${deployed.length === 0 && html`<p class="quiet">${t("cluster.models.none")}</p>`}
      ${deployed.map((/** @type {any} */ model) => html`<${Model} key=${model.name} model=${model} />`)}
    </section>
  `;
}

/** @param {{model: any}} props */
function Model({ model }) {
  const [isAsked, setAsked] = useState(false);
  const state = modelState(model);
  return html`
    <div class="model">
      <h3>${model.name}</h3> <span class="chip ${state}">${t(`common.model.${state}`)}</span>
      ${model.placements.map(
        (/** @type {any} */ placement) => html`
          <p>
            ${placement.stages.map((/** @type {any} */ each) => `${each.name}: ${layersText(each.layers)}`).join(" → ")}
          </p>
          <p class="quiet">
            ${t("cluster.busy", { active: placement.active, waiting: placement.waiting, sequences: model.sequences })}
            ${placement.active > 0 && ` · ${t("cluster.rate", { speed: speed(placement.tokens_per_second) })}`}
            ${placement.predicted_tokens_per_second
              ? ` · ${t("cluster.predicted", { speed: speed(placement.predicted_tokens_per_second) })}`
              : ""}
          </p>
          ${placement.successor &&
          html`<p>
            ${t("cluster.successor", {
              names: listing(placement.successor.map((/** @type {any} */ each) => each.name)),
            })}
          </p>`}
        `,
      )}
      ${model.why && html`<p class="fault"><${Said} text=${model.why} /></p>`}
      ${model.reasons.map((/** @type {string} */ each) => html`<p class="quiet"><${Said} text=${each} /></p>`)}
      <details onToggle=${(/** @type {any} */ event) => event.target.open && setAsked(true)}>
        <summary>${t("cluster.why")}</summary>
        ${isAsked && html`<${Verdict} model=${model.name} />`}
      </details>
    </div>
  `;
}

/** What is being fetched, and read. @param {{now: any}} props */
function UnderWay({ now }) {
  const all = [
    ...now.fetching.map((/** @type {any} */ each) => ({
      ...each,
      text: t("cluster.fetching", { node: each.node, model: each.model, layers: layersText(each.layers) }),
    })),
    ...now.reading.map((/** @type {any} */ each) => ({
      ...each,
      text: t("cluster.reading", { node: each.node, model: each.name }),
    })),
  ];
  if (all.length === 0) return null;
  return html`
    <section aria-labelledby="way-title">
      <h2 id="way-title">${t("cluster.under_way")}</h2>
      ${all.map(
        (each) => html`
          <label>
            ${each.text} (${t("common.of", { done: bytes(each.done_bytes), total: bytes(each.total_bytes) })})
            <progress max=${each.total_bytes || 1} value=${each.done_bytes}></progress>
          </label>
        `,
      )}
    </section>
  `;
}

/** The map as a table, for everybody. @param {{now: any}} props */
function Machines({ now }) {
  const hasPower = now.nodes.some((/** @type {any} */ each) => each.watts !== null);
  return html`
    <section aria-labelledby="table-title">
      <h2 id="table-title">${t("cluster.table")}</h2>
      <div class="wide" role="group" aria-labelledby="table-title" tabindex="0">
        <table>
          <thead>
            <tr>
              <th scope="col">${t("cluster.machine")}</th>
              <th scope="col">${t("cluster.state")}</th>
              <th scope="col">${t("cluster.memory")}</th>
              <th scope="col">${t("cluster.holds")}</th>
              <th scope="col">${t("cluster.rtt")}</th>
              ${hasPower && html`<th scope="col">${t("cluster.power")}</th>`}
            </tr>
          </thead>
          <tbody>
            ${now.nodes.map(
              (/** @type {any} */ node) => html`
                <tr key=${node.id}>
                  <th scope="row">${node.name}${node.self && html` <span class="quiet">(${t("cluster.here")})</span>`}</th>
                  <td>
                    <span class="chip ${stateOf(node)}">${t(`common.state.${stateOf(node)}`)}</span>
                    ${node.state !== "alive" &&
                    node.last_heard &&
                    html`<br /><span class="quiet">${t("cluster.heard", { when: day(node.last_heard) })}</span>`}
                  </td>
                  <td>${memoryText(node) || "–"}</td>
                  <td>
                    ${node.stages.length === 0
                      ? "–"
                      : node.stages.map(
                          (/** @type {any} */ each) => html`<div>${each.model}: ${layersText(each.layers)}</div>`,
                        )}
                  </td>
                  <td>${roundTrips(now, node)}</td>
                  ${hasPower && html`<td>${power(node.watts) || "–"}</td>`}
                </tr>
              `,
            )}
          </tbody>
        </table>
      </div>
    </section>
  `;
}

/** @param {any} now @param {any} node */
function roundTrips(now, node) {
  const names = new Map(now.nodes.map((/** @type {any} */ each) => [each.id, each.name]));
  const found = now.links.filter((/** @type {any} */ each) => each.nodes.includes(node.id));
  if (found.length === 0) return "–";
  return found.map((/** @type {any} */ each) => {
    const other = each.nodes[0] === node.id ? each.nodes[1] : each.nodes[0];
    return html`<div>${names.get(other)}: ${milliseconds(each.rtt_seconds)}</div>`;
  });
}

/** Why something changed, of what history.py says: `placed: where (why)`, `interrupted: why`. @param {string} text */
function reasonOf(text) {
  const [what, ...rest] = text.split(": ");
  if (what !== "placed") return rest.join(": ");
  return /\((.*)\)$/.exec(text)?.[1] ?? "";
}

/** @param {{snapshots: any[], changes: any[], choose: (at: number | null) => void}} props */
function Lately({ snapshots, changes, choose }) {
  const found = changesOf(snapshots).slice(-CHANGES_SHOWN).reverse();
  return html`
    <section aria-labelledby="lately-title">
      <h2 id="lately-title">${t("cluster.lately")}</h2>
      ${found.length === 0 && html`<p class="quiet">${t("cluster.lately.none")}</p>`}
      <ol class="changes" reversed>
        ${found.map((each) => {
          const { where, ...rest } = each.values;
          const reason = changes.find((/** @type {any} */ one) => one.clock === each.clock && one.model === each.model);
          const why = each.key === "serves" ? "" : reasonOf(reason?.text ?? "");
          return html`<li>
            <button class="plain" onClick=${() => choose(each.clock)} aria-label=${t("cluster.look", { clock: clock(each.clock) })}>
              <time>${clock(each.clock)}</time>
            </button>
            ${t(`cluster.change.${each.key}`, { ...rest, where: where ? listing(where) : "" })}
            ${why && html` <span class="quiet"><${Said} text=${why} /></span>`}
          </li>`;
        })}
      </ol>
    </section>
  `;
}
