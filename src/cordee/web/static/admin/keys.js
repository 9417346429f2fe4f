/** People's keys: made, shown once, bounded, revoked; and what each has used. */
import { ask } from "../common/ask.js";
import { day } from "../common/words.js";
import { number, t } from "../shell/i18n.js";
import { html, useState } from "../vendor/preact.js";
import { Secret } from "./secret.js";

const KWH_JOULES = 3.6e6;

/** Whom a button of many alike is about, for those who do not see its row. @param {{name: string}} props */
export function Of({ name }) {
  return html`<span class="unseen">: ${name}</span>`;
}

/** @param {{keys: any[], onChange: () => void}} props */
export function Keys({ keys, onChange }) {
  const [made, setMade] = useState(/** @type {{name: string, key: string} | null} */ (null));
  /** @param {string} name */
  const revoke = (name) =>
    ask({
      title: t("admin.revoke.title", { name }),
      body: html`<p>${t("admin.revoke.body")}</p>`,
      action: t("admin.revoke"),
      danger: true,
      path: "key/remove",
      data: { name },
      said: () => t("admin.revoke.said", { name }),
      done: onChange,
    });
  /** @param {any} key */
  const limit = (key) => {
    const [requests, tokens] = [/requests=(\d+)/, /tokens=(\d+)/].map((each) => each.exec(key.limit ?? "")?.[1] ?? "");
    const draft = { requests: requests ?? "", tokens: tokens ?? "" };
    ask({
      title: t("admin.limit.title", { name: key.name }),
      body: html`<p>${t("admin.limit.body")}</p><${Bounds} draft=${draft} />`,
      action: t("admin.limit"),
      path: "key/limit",
      data: () => ({ name: key.name, limit: written(draft) }),
      said: () => t(written(draft) ? "admin.limit.said" : "admin.limit.none", { name: key.name, limit: limitText(written(draft)) }),
      done: onChange,
    });
  };
  return html`
    <section aria-labelledby="keys-title">
      <h2 id="keys-title">${t("admin.keys")}</h2>
      <p class="quiet">${t("admin.keys.why")}</p>
      <${NewKey}
        onMade=${(/** @type {any} */ got) => {
          setMade(got);
          onChange();
        }}
      />
      ${made &&
      html`<${Secret}
        title=${t("admin.key.once", { name: made.name })}
        text=${made.key}
        label=${t("admin.key.qr", { name: made.name })}
        onClose=${() => setMade(null)}
      />`}
      ${keys.length === 0
        ? html`<p class="quiet">${t("admin.keys.none")}</p>`
        : html`<div class="wide" role="group" aria-labelledby="keys-title" tabindex="0">
            <table>
              <thead>
                <tr>
                  <th scope="col">${t("admin.key.name")}</th>
                  <th scope="col">${t("admin.key.may")}</th>
                  <th scope="col">${t("admin.key.limit")}</th>
                  <th scope="col">${t("admin.key.made")}</th>
                  <th scope="col">${t("admin.key.expires")}</th>
                  <td></td>
                </tr>
              </thead>
              <tbody>
                ${keys.map(
                  (each) => html`<tr key=${each.id}>
                    <th scope="row">${each.name}</th>
                    <td>${t(each.admin ? "admin.may.all" : "admin.may.ask")}</td>
                    <td>${limitText(each.limit) || "–"}</td>
                    <td>${day(each.created)}</td>
                    <td>
                      ${each.expires ? day(each.expires) : t("admin.never")}
                      ${each.state === "expired" && html` <span class="chip gone">${t("admin.expired")}</span>`}
                    </td>
                    <td>
                      <div class="actions">
                        <button onClick=${() => limit(each)}>${t("admin.limit")}<${Of} name=${each.name} /></button>
                        <button class="danger" onClick=${() => revoke(each.name)}>
                          ${t("admin.revoke")}<${Of} name=${each.name} />
                        </button>
                      </div>
                    </td>
                  </tr>`,
                )}
              </tbody>
            </table>
          </div>`}
    </section>
  `;
}

/** @typedef {{requests: string, tokens: string}} Draft bounds as somebody types them; empty: none */

/** Bounds as the server takes them. @param {Draft} draft */
function written({ requests, tokens }) {
  return [requests && `requests=${requests}`, tokens && `tokens=${tokens}/min`].filter(Boolean).join(",");
}

/** Bounds as the server writes them, in words. @param {string | null} limit */
function limitText(limit) {
  const [, requests] = /requests=(\d+)/.exec(limit ?? "") ?? [];
  const [, tokens] = /tokens=(\d+)/.exec(limit ?? "") ?? [];
  return [
    requests && t("admin.limit.requests", { count: Number(requests) }),
    tokens && t("admin.limit.tokens", { count: Number(tokens) }),
  ]
    .filter(Boolean)
    .join(", ");
}

/** Fields for the bounds of a key; what is typed is put into `draft`. @param {{draft: Draft}} props */
function Bounds({ draft }) {
  const [, redraw] = useState(0);
  /** @param {keyof Draft} name @param {string} max */
  const field = (name, max) => ({
    type: "number",
    min: "1",
    max,
    value: draft[name],
    onInput: (/** @type {any} */ event) => {
      draft[name] = event.target.value;
      redraw((count) => count + 1);
    },
  });
  return html`
    <label>${t("admin.key.requests")} <input ...${field("requests", "999999")} /></label>
    <label>${t("admin.key.tokens")} <input ...${field("tokens", "999999999999")} /></label>
  `;
}

/** @param {{onMade: (made: {name: string, key: string}) => void}} props */
function NewKey({ onMade }) {
  const [name, setName] = useState("");
  const [admin, setAdmin] = useState(false);
  const [draft] = useState({ requests: "", tokens: "" });
  const [days, setDays] = useState("");
  /** @param {Event} event */
  const send = (event) => {
    event.preventDefault();
    ask({
      title: t("admin.key.title", { name }),
      body: html`<p>${t(admin ? "admin.key.body.admin" : "admin.key.body")}</p>`,
      action: t("admin.key.make"),
      path: "key/add",
      data: { name, admin, limit: written(draft), days: Number(days) || 0 },
      said: () => t("admin.key.said", { name }),
      done: (found) => {
        onMade({ name, key: found.key });
        setName("");
        setAdmin(false);
      },
    });
  };
  return html`
    <form class="new-key" onSubmit=${send}>
      <label>
        ${t("admin.key.for")}
        <input
          required
          maxlength="64"
          autocomplete="off"
          spellcheck="false"
          pattern="[\\w.@+\\-]+"
          title=${t("admin.key.letters")}
          value=${name}
          onInput=${(/** @type {any} */ event) => setName(event.target.value)}
        />
      </label>
      <${Bounds} draft=${draft} />
      <label>
        ${t("admin.key.days")}
        <input type="number" min="1" max="36500" value=${days} onInput=${(/** @type {any} */ event) => setDays(event.target.value)} />
      </label>
      <label class="tick">
        <input type="checkbox" checked=${admin} onChange=${(/** @type {any} */ event) => setAdmin(event.target.checked)} />
        ${" "}${t("admin.key.admin")}
      </label>
      <button class="primary">${t("admin.key.make")}</button>
    </form>
  `;
}

/** @param {{usage: any[], machine: string}} props */
export function Usage({ usage, machine }) {
  const hasEnergy = usage.some((each) => each.joules !== null);
  const names = { "(this machine)": t("admin.usage.local"), "(others)": t("admin.usage.others") };
  return html`
    <section aria-labelledby="usage-title">
      <h2 id="usage-title">${t("admin.usage")}</h2>
      <p class="quiet">${t("admin.usage.why", { machine })}</p>
      ${usage.length === 0
        ? html`<p class="quiet">${t("admin.usage.none")}</p>`
        : html`<div class="wide" role="group" aria-labelledby="usage-title" tabindex="0">
            <table>
              <thead>
                <tr>
                  <th scope="col">${t("admin.key.name")}</th>
                  <th scope="col">${t("admin.usage.requests")}</th>
                  <th scope="col">${t("admin.usage.in")}</th>
                  <th scope="col">${t("admin.usage.out")}</th>
                  ${hasEnergy && html`<th scope="col">${t("admin.usage.energy")}</th>`}
                  <th scope="col">${t("admin.usage.last")}</th>
                </tr>
              </thead>
              <tbody>
                ${usage.map(
                  (each) => html`<tr key=${each.key}>
                    <th scope="row">${/** @type {any} */ (names)[each.key] ?? each.key}</th>
                    <td>${number(each.requests)}</td>
                    <td>${number(each.tokens_in)}</td>
                    <td>${number(each.tokens_out)}</td>
                    ${hasEnergy &&
                    html`<td>
                      ${each.joules === null
                        ? "–"
                        : t("admin.usage.kwh", { value: number(each.joules / KWH_JOULES, { maximumSignificantDigits: 3 }) })}
                    </td>`}
                    <td>${each.last ? day(each.last) : "–"}</td>
                  </tr>`,
                )}
              </tbody>
            </table>
          </div>`}
    </section>
  `;
}
