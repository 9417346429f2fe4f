/** How answers are made: of each conversation its own; a new one begins with what was chosen last. */
import { t, number } from "../shell/i18n.js";
import { html } from "../vendor/preact.js";

/** The default of `cordee run`. */
export const TEMPERATURE = 0.5;
const TEMPERATURE_MAX = 1.5;
const KEPT = "cordee-settings";
/** Tokens, as a length is offered: a paragraph, a page, several. */
const LENGTHS = [150, 700, 3000];

/** @typedef {Pick<import("./conversations.js").Conversation, "model" | "system" | "temperature" | "max_tokens">} Settings */

/** @returns {Settings} */
export function lastChosen() {
  /** @type {Partial<Settings>} */
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  } catch {
    // Somebody else wrote there.
  }
  return {
    model: String(kept.model ?? ""),
    system: String(kept.system ?? ""),
    temperature: typeof kept.temperature === "number" ? kept.temperature : TEMPERATURE,
    max_tokens: typeof kept.max_tokens === "number" ? kept.max_tokens : null,
  };
}

/** @param {Settings} settings */
export function remember({ model, system, temperature, max_tokens }) {
  localStorage.setItem(KEPT, JSON.stringify({ model, system, temperature, max_tokens }));
}

/**
 * The drawer.
 * @param {{settings: Settings, onChange: (settings: Settings) => void, onClose: () => void}} props
 */
export function Drawer({ settings, onChange, onClose }) {
  /** @param {Partial<Settings>} some */
  const set = (some) => onChange({ ...settings, ...some });
  const lengths = LENGTHS.includes(settings.max_tokens ?? 0) || settings.max_tokens === null ? LENGTHS : [...LENGTHS, settings.max_tokens];
  return html`
    <aside class="drawer" id="drawer" aria-label=${t("chat.settings")}>
      <div class="row">
        <h2>${t("chat.settings")}</h2>
        <button class="plain" onClick=${onClose} aria-label=${t("chat.close")}>✕</button>
      </div>
      <label>
        ${t("chat.system")}
        <textarea
          rows="6"
          value=${settings.system}
          placeholder=${t("chat.system.example")}
          onInput=${(/** @type {any} */ event) => set({ system: event.target.value })}
        ></textarea>
      </label>
      <label>
        ${t("chat.temperature")}: ${number(settings.temperature, { minimumFractionDigits: 1 })}
        <input
          class="wide"
          type="range"
          min="0"
          max=${TEMPERATURE_MAX}
          step="0.1"
          value=${settings.temperature}
          aria-describedby="about-temperature"
          onInput=${(/** @type {any} */ event) => set({ temperature: Number(event.target.value) })}
        />
      </label>
      <p class="quiet" id="about-temperature">${t("chat.temperature.about")}</p>
      <label>
        ${t("chat.length")}
        <select
          value=${String(settings.max_tokens ?? "")}
          onChange=${(/** @type {any} */ event) => set({ max_tokens: event.target.value ? Number(event.target.value) : null })}
        >
          <option value="">${t("chat.length.any")}</option>
          ${lengths.map((each) => html`<option value=${String(each)}>${t("chat.length.words", { words: Math.round((each ?? 0) * 0.7) })}</option>`)}
        </select>
      </label>
    </aside>
  `;
}
