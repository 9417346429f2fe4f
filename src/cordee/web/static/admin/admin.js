/** The page `admin`: letting machines and people in and out, what was used, and what went wrong. */
import { ask, Asking, faultOf } from "../common/ask.js";
import { isSilent, me, refreshMe, useOverview } from "../common/live.js";
import { Said } from "../common/said.js";
import { day, layersText, listing, stateOf } from "../common/words.js";
import { json } from "../shell/api.js";
import { t } from "../shell/i18n.js";
import { SignIn } from "../shell/session.js";
import { useStore } from "../shell/store.js";
import { html, useEffect, useState } from "../vendor/preact.js";
import { Keys, Of, Usage } from "./keys.js";
import { Secret } from "./secret.js";

const EVERY_MILLISECONDS = 5000;

/** @param {{session: any}} props */
export default function Admin({ session }) {
  const now = useOverview();
  const silent = useStore(isSilent);
  const { admin } = useStore(me);
  const [facts, setFacts] = useState(/** @type {any} */ (null));
  const [fault, setFault] = useState(/** @type {any} */ (""));
  const look = () =>
    json("/console/admin").then(
      (got) => {
        setFacts(got);
        setFault("");
      },
      (error) => setFault(faultOf(error)),
    );
  useEffect(() => void refreshMe(), [session]);
  useEffect(() => {
    if (!admin) return undefined;
    void look();
    const timer = setInterval(look, EVERY_MILLISECONDS);
    return () => clearInterval(timer);
  }, [admin]);
  if (now === null) {
    return html`<div class="page" aria-busy=${!silent}>
      <h1>${t("admin.title")}</h1>
      <p>${t(silent ? "common.silent" : "common.waiting")}</p>
    </div>`;
  }
  if (!admin) {
    return html`<div class="page">
      <h1>${t("admin.title")}</h1>
      ${session?.name && html`<p class="fault">${t("admin.not_yours", { name: session.name })}</p>`}
      <${SignIn} why=${t("admin.sign_in")} onDone=${refreshMe} />
    </div>`;
  }
  return html`
    <div class="page">
      <h1>${t("admin.title")}</h1>
      ${silent && html`<p role="alert" class="fault">${t("common.silent")}</p>`}
      ${fault && html`<p role="alert" class="fault">${fault}</p>`}
      <${Asking} />
      ${facts && html`<${Administration} now=${now} facts=${facts} look=${look} />`}
    </div>
  `;
}

/** @param {{now: any, facts: any, look: () => void}} props */
function Administration({ now, facts, look }) {
  const isCluster = now.kind === "cluster";
  const elsewhere = !facts.here.is_admin && isCluster;
  return html`
    ${elsewhere &&
    html`<p class="fault">
      ${facts.here.admins.length
        ? t("admin.elsewhere", { names: listing(facts.here.admins) })
        : t("admin.elsewhere.none")}
    </p>`}
    ${isCluster ? html`<${Invitation} />` : html`<p>${t("admin.single")}</p>`}
    ${isCluster && html`<${Machines} nodes=${now.nodes} />`}
    <${Keys} keys=${facts.keys} onChange=${look} />
    <${Usage} usage=${facts.usage} machine=${facts.here.name} />
    <${Log} id="errors" title=${t("admin.errors")} none=${t("admin.errors.none")}>
      ${facts.errors.map(
        (/** @type {any} */ each) => html`<li>
          <time>${day(each.clock)}</time>
          <span class=${each.is_error ? "fault" : ""} lang="en">${each.text}</span>
        </li>`,
      )}
    <//>
    <${Log} id="actions" title=${t("admin.actions")} none=${t("admin.actions.none")}>
      ${facts.actions.map(
        (/** @type {any} */ each) => html`<li>
          <time>${day(each.clock)}</time>
          ${t(`admin.action.${each.what}`, { who: each.who === "(this machine)" ? t("admin.usage.here") : each.who, about: each.about })}
        </li>`,
      )}
    <//>
  `;
}

function Invitation() {
  const [made, setMade] = useState(/** @type {any} */ (null));
  const invite = () =>
    ask({
      title: t("admin.invite.title"),
      body: html`<p>${t("admin.invite.body")}</p>`,
      action: t("admin.invite"),
      path: "invite",
      data: {},
      said: () => t("admin.invite.said"),
      done: setMade,
    });
  return html`
    <section aria-labelledby="invite-title">
      <h2 id="invite-title">${t("admin.machine.add")}</h2>
      <p class="quiet">${t("admin.machine.add.why")}</p>
      ${made
        ? html`<${Secret}
            title=${t("admin.invite.code")}
            text=${made.code}
            label=${t("admin.invite.qr")}
            onClose=${() => setMade(null)}
          >
            <p>${t("admin.invite.how")}</p>
            <p><code>cordee join ${made.code.slice(0, 12)}…</code><br /><code>cordee up</code></p>
            ${made.advice && html`<p class="quiet"><${Said} text=${made.advice} /></p>`}
          <//>`
        : html`<button class="primary" onClick=${invite}>${t("admin.invite")}</button>`}
    </section>
  `;
}

/** @param {{nodes: any[]}} props */
function Machines({ nodes }) {
  return html`
    <section aria-labelledby="machines-title">
      <h2 id="machines-title">${t("admin.machines")}</h2>
      <div class="wide" role="group" aria-labelledby="machines-title" tabindex="0">
        <table>
          <thead>
            <tr>
              <th scope="col">${t("admin.machine")}</th>
              <th scope="col">${t("admin.machine.state")}</th>
              <th scope="col">${t("admin.machine.runs")}</th>
              <td></td>
            </tr>
          </thead>
          <tbody>
            ${nodes.map((node) => html`<${Machine} key=${node.id} node=${node} />`)}
          </tbody>
        </table>
      </div>
    </section>
  `;
}

/** @param {{node: any}} props */
function Machine({ node }) {
  const { name } = node;
  const drain = (/** @type {boolean} */ on) =>
    ask({
      title: t(on ? "admin.drain.title" : "admin.undrain.title", { name }),
      body: html`<p>${t(on ? "admin.drain.body" : "admin.undrain.body")}</p>`,
      action: t(on ? "admin.drain" : "admin.undrain"),
      path: "node/drain",
      data: { node: node.id, on },
      said: (found) => (on ? drained(name, found.stays) : t("admin.undrain.said", { name })),
    });
  const remove = () =>
    ask({
      title: t("admin.remove.title", { name }),
      body: html`
        <p>${t("admin.remove.body")}</p>
        ${node.admin && html`<p class="fault">${t("admin.remove.admin")}</p>`}
      `,
      action: t("admin.remove"),
      danger: true,
      path: "node/remove",
      data: { node: node.id },
      said: () => t("admin.remove.said", { name }),
    });
  return html`
    <tr>
      <th scope="row">
        ${name} ${node.self && html`<span class="quiet">(${t("admin.here")})</span>`}
        ${node.admin && html` <span class="quiet">${t("admin.is_admin")}</span>`}
      </th>
      <td><span class="chip ${stateOf(node)}">${t(`common.state.${stateOf(node)}`)}</span></td>
      <td>
        ${node.stages.length === 0
          ? "–"
          : node.stages.map((/** @type {any} */ each) => html`<div>${each.model}: ${layersText(each.layers)}</div>`)}
      </td>
      <td>
        <div class="actions">
          ${node.state === "alive" &&
          (node.draining
            ? html`<button onClick=${() => drain(false)}>${t("admin.undrain")}<${Of} name=${name} /></button>`
            : html`<button onClick=${() => drain(true)}>${t("admin.drain")}<${Of} name=${name} /></button>`)}
          ${!node.self &&
          html`<button class="danger" onClick=${remove}>${t("admin.remove")}<${Of} name=${name} /></button>`}
        </div>
      </td>
    </tr>
  `;
}

/** What people are told of a machine that is drained. @param {string} name @param {any[]} stays */
function drained(name, stays) {
  if (stays.length === 0) return t("admin.drain.empty", { name });
  const parts = stays.map((each) => `${each.model} (${layersText(each.layers)})`);
  const stuck = [...new Set(stays.map((each) => each.why).filter(Boolean))];
  return html`${t("admin.drain.said", { name, parts: listing(parts) })}
  ${stuck.map((why) => html` <${Said} text=${why} />`)}`;
}

/** @param {{id: string, title: string, none: string, children?: any}} props */
function Log({ id, title, none, children }) {
  const count = [children].flat(2).filter(Boolean).length;
  return html`
    <section aria-labelledby=${id}>
      <h2 id=${id}>${title}</h2>
      ${count === 0 ? html`<p class="quiet">${none}</p>` : html`<ol class="log">${children}</ol>`}
    </section>
  `;
}
