/**
 * The map: machines as cards, links as lines, tokens as dots that move along them while somebody is answered. It is
 * a picture; the table below it says the same to those who do not see it.
 */
import { bytes, t } from "../shell/i18n.js";
import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { lentBytes, milliseconds, power, speed, stateOf, usedBytes } from "../common/words.js";
import { arrange, way } from "./layout.js";

const ROWS_MAX = 4; // stages shown on a card; the table has all
const TRAVEL_SECONDS = 1.6; // of a dot along a link
const DOTS_MAX = 10; // on a link; a dot stands for several tokens where there are more
const ALL_LINKS_MAX = 5; // machines; with more of them only links that are in use are drawn
const COLOURS = 6;

/**
 * @typedef {{id: string, name: string, state: string, draining: boolean, self: boolean, watts: number | null,
 *   devices: any[], stages: any[]}} Machine
 * @typedef {{from: string, to: string, model: string, perSecond: number}} Flow
 */

/**
 * The links of a model's stages: from each to the next, and from the last back to the first.
 * @param {any[]} models with `placements`
 * @returns {Flow[]}
 */
export function flowsOf(models) {
  return models.flatMap((model) =>
    (model.placements ?? []).flatMap((/** @type {any} */ placement) => {
      const { stages } = placement;
      if (stages.length < 2) return [];
      const perSecond = placement.active > 0 ? placement.tokens_per_second : 0;
      return stages
        .map((/** @type {any} */ stage, /** @type {number} */ index) => ({
          from: stage.node,
          to: stages[(index + 1) % stages.length].node,
          model: model.name,
          perSecond,
        }))
        .filter((/** @type {Flow} */ flow) => flow.from !== flow.to);
    }),
  );
}

/** @param {{machines: Machine[], flows: Flow[], links: any[], models: string[]}} props */
export function ClusterMap({ machines, flows, links, models }) {
  const frame = useRef(/** @type {HTMLElement | null} */ (null));
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const element = /** @type {HTMLElement} */ (frame.current);
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  return html`<div class="map" ref=${frame}>
    ${width > 0 && html`<${Drawing} ...${{ machines, flows, links, models, width }} />`}
  </div>`;
}

/** @param {{machines: Machine[], flows: Flow[], links: any[], models: string[], width: number}} props */
function Drawing({ machines, flows, links, models, width }) {
  const rows = machines.map((each) => Math.min(ROWS_MAX, each.stages.length));
  const { boxes, height, isColumn } = arrange(rows, width);
  const boxOf = new Map(machines.map((each, index) => [each.id, boxes[index]]));
  const known = flows.filter((flow) => boxOf.has(flow.from) && boxOf.has(flow.to));
  const used = new Set(known.map((flow) => pair(flow.from, flow.to)));
  const times = new Map(links.map((each) => [pair(each.nodes[0], each.nodes[1]), each]));
  const drawn = [...times.values()].filter(
    (each) =>
      boxOf.has(each.nodes[0]) &&
      boxOf.has(each.nodes[1]) &&
      (used.has(pair(each.nodes[0], each.nodes[1])) || machines.length <= ALL_LINKS_MAX),
  );
  return html`
    <svg
      viewBox="0 0 ${width} ${Math.ceil(height)}"
      width=${width}
      height=${Math.ceil(height)}
      role="img"
      aria-label=${t("cluster.map.label", { count: machines.length })}
    >
      ${drawn.map((each) => html`<path class="link" d=${road(boxOf, each.nodes[0], each.nodes[1], isColumn).path} />`)}
      ${known.map((flow) => html`<${Road} ...${{ flow, boxOf, isColumn, models }} />`)}
      ${drawn.map((each) => {
        const { middle } = road(boxOf, each.nodes[0], each.nodes[1], isColumn);
        const busy = known.find((flow) => flow.perSecond > 0 && pair(flow.from, flow.to) === pair(...ends(each)));
        return html`<${Label} ...${middle} lines=${[milliseconds(each.rtt_seconds), busy ? speed(busy.perSecond) : ""]} />`;
      })}
      ${machines.map((each, index) => html`<${Card} key=${each.id} machine=${each} box=${boxes[index]} models=${models} />`)}
    </svg>
  `;
}

/** @param {any} link @returns {[string, string]} */
function ends(link) {
  return [link.nodes[0], link.nodes[1]];
}

/** @param {string} a @param {string} b */
function pair(a, b) {
  return a < b ? `${a} ${b}` : `${b} ${a}`;
}

/** @param {Map<string, import("./layout.js").Box>} boxOf @param {string} from @param {string} to @param {boolean} isColumn */
function road(boxOf, from, to, isColumn, aside = 0) {
  const [a, b] = [boxOf.get(from), boxOf.get(to)];
  return way(/** @type {any} */ (a), /** @type {any} */ (b), isColumn, aside);
}

/** A link that a model uses, with its tokens. @param {any} props */
function Road({ flow, boxOf, isColumn, models }) {
  const aside = isColumn ? (flow.from < flow.to ? 5 : -5) : 5;
  const { path } = road(boxOf, flow.from, flow.to, isColumn, aside);
  const colour = `m${models.indexOf(flow.model) % COLOURS}`;
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const count = isStill || flow.perSecond <= 0 ? 0 : Math.min(DOTS_MAX, Math.max(1, Math.round(flow.perSecond * TRAVEL_SECONDS)));
  return html`
    <g class=${colour}>
      <path class="road" d=${path} />
      ${Array.from(
        { length: count },
        (_, index) => html`
          <circle class="token" key=${`${count} ${index}`} r="4">
            <animateMotion
              path=${path}
              dur="${TRAVEL_SECONDS}s"
              begin="-${(index * TRAVEL_SECONDS) / count}s"
              repeatCount="indefinite"
            />
          </circle>
        `,
      )}
    </g>
  `;
}

/** @param {{x: number, y: number, lines: string[]}} props */
function Label({ x, y, lines }) {
  const shown = lines.filter(Boolean);
  return html`<text class="label" x=${x} y=${y - 7 * (shown.length - 1)} text-anchor="middle">
    ${shown.map((line, index) => html`<tspan x=${x} dy=${index === 0 ? 4 : 15}>${line}</tspan>`)}
  </text>`;
}

/** @param {{machine: Machine, box: import("./layout.js").Box, models: string[]}} props */
function Card({ machine, box, models }) {
  const state = stateOf(machine);
  const lent = lentBytes(machine);
  const share = lent ? Math.min(1, usedBytes(machine) / lent) : 0;
  const room = box.width - 24;
  const more = machine.stages.length - ROWS_MAX;
  const said = [
    t(`common.state.${state}`),
    power(machine.watts),
    // Last, since the bar below tells it, too, where there is no room for all.
    lent ? t("common.memory", { used: bytes(usedBytes(machine)), lent: bytes(lent) }) : "",
  ];
  return html`
    <g class="machine ${state}" transform="translate(${box.x} ${box.y})">
      <rect class="card" width=${box.width} height=${box.height} rx="10" />
      <circle class="lamp" cx="18" cy="20" r="5" />
      <text class="title" x="32" y="25">${cut(machine.name, room - 20, 8.6)}</text>
      ${machine.self && html`<text class="self" x=${box.width - 12} y="25" text-anchor="end">${t("cluster.here")}</text>`}
      <text class="said" x="12" y="46">${cut(said.filter(Boolean).join(" · "), room, 6.3)}</text>
      <rect class="lent" x="12" y="55" width=${room} height="6" rx="3" />
      ${share > 0 && html`<rect class="used" x="12" y="55" width=${Math.max(3, room * share)} height="6" rx="3" />`}
      ${machine.stages.slice(0, ROWS_MAX).map(
        (stage, index) => html`
          <g class="m${models.indexOf(stage.model) % COLOURS}" transform="translate(12 ${80 + 21 * index})">
            <rect class="colour" y="-10" width="10" height="10" rx="2" />
            <text class="stage" x="16">${stageText(stage, index === ROWS_MAX - 1 ? more : 0, room)}</text>
          </g>
        `,
      )}
    </g>
  `;
}

/** @param {any} stage @param {number} more @param {number} room */
function stageText(stage, more, room) {
  const layers = stage.layers ? ` ${stage.layers[0]}–${stage.layers[1] - 1}` : "";
  const rest = more > 0 ? ` +${more}` : "";
  return cut(stage.model, room - 16 - 7 * (layers.length + rest.length), 7) + layers + rest;
}

/** A text that fits, by the usual width of a letter. @param {string} text @param {number} room @param {number} letter */
function cut(text, room, letter) {
  const most = Math.max(3, Math.floor(room / letter));
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}
