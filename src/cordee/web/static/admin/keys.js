/** People's keys: made, shown once, bounded, revoked; and what each has used at this machine. */
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
                    <td>${each.limit ? html`<code>${each.limit}</code>` : "–"}</td>
                    <td>${day(each.created)}</td>
                    <td>
                      ${each.expires ? day(each.expires) : t("admin.never")}
                      ${each.state === "expired" && html` <span class="chip gone">${t("admin.expired")}</span>`}
                    </td>
                    <td>
                      <button class="danger" onClick=${() => revoke(each.name)}>
                        ${t("admin.revoke")}<${Of} name=${each.name} />
                      </button>
                    </td>
                  </tr>`,
                )}
              </tbody>
            </table>
          </div>`}
    </section>
  `;
}

/** @param {{onMade: (made: {name: string, key: string}) => void}} props */
function NewKey({ onMade }) {
  const [name, setName] = useState("");
  const [admin, setAdmin] = useState(false);
  const [requests, setRequests] = useState("");
  const [tokens, setTokens] = useState("");
  const [days, setDays] = useState("");
  /** @param {Event} event */
  const send = (event) => {
    event.preventDefault();
    const limit = [requests && `requests=${requests}`, tokens && `tokens=${tokens}/min`].filter(Boolean).join(",");
    ask({
      title: t("admin.key.title", { name }),
      body: html`<p>${t(admin ? "admin.key.body.admin" : "admin.key.body")}</p>`,
      action: t("admin.key.make"),
      path: "key/add",
      data: { name, admin, limit, days: Number(days) || 0 },
      said: () => t("admin.key.said", { name }),
      done: (found) => {
        onMade({ name, key: found.key });
        setName("");
        setAdmin(false);
      },
    });
  };
  /** @param {string} value @param {(next: string) => void} set */
  const bound = (value, set) => ({ value, type: "number", min: "1", onInput: (/** @type {any} */ event) => set(event.target.value) });
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
      <label>${t("admin.key.requests")} <input ...${bound(requests, setRequests)} max="999999" /></label>
      <label>${t("admin.key.tokens")} <input ...${bound(tokens, setTokens)} /></label>
      <label>${t("admin.key.days")} <input ...${bound(days, setDays)} max="36500" /></label>
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
  const names = { "(this machine)": t("admin.usage.here"), "(others)": t("admin.usage.others") };
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
