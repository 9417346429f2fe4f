/** The models that can be asked, and how they are. */
import { json } from "../shell/api.js";
import { makeStore } from "../shell/store.js";

/** A machine that has not answered by then is asked again later. */
const ANSWER_MS = 10_000;

/** @typedef {{id: string, state: string, context_length?: number, capabilities?: string[]}} Model */

/** null: not known yet. */
export const models = makeStore(/** @type {Model[] | null} */ (null));

/** Ask which there are; those that only make vectors are left out. */
export async function look() {
  const { data } = await json("/v1/models", { signal: AbortSignal.timeout(ANSWER_MS) });
  const found = /** @type {Model[]} */ (data);
  models.set(found.filter((each) => !each.capabilities || each.capabilities.includes("completion")));
}

/** @param {string} name */
export function stateOf(name) {
  return models.get()?.find((each) => each.id === name)?.state ?? "";
}
