/** What changed from one snapshot to the next, for people; pure. */

/** @typedef {{clock: number, key: string, values: Record<string, any>, model: string}} Change */

/**
 * All changes, the oldest first.
 * @param {any[]} snapshots the oldest first
 * @returns {Change[]}
 */
export function changesOf(snapshots) {
  return snapshots.flatMap((snapshot, index) => (index === 0 ? [] : between(snapshots[index - 1], snapshot)));
}

/**
 * @param {any} before
 * @param {any} now
 * @returns {Change[]}
 */
export function between(before, now) {
  const found = [...nodeChanges(before, now), ...modelChanges(before, now)];
  return found.map((each) => ({ model: "", ...each, clock: now.clock }));
}

/** @param {any} before @param {any} now */
function* nodeChanges(before, now) {
  const old = new Map(before.nodes.map((/** @type {any} */ each) => [each.id, each]));
  for (const node of now.nodes) {
    const was = old.get(node.id);
    const values = { name: node.name };
    old.delete(node.id);
    if (was === undefined) {
      if (node.state === "alive") yield { key: "came", values };
      continue;
    }
    if (was.state !== node.state) {
      const key = node.state === "alive" ? "back" : node.state;
      yield { key, values };
    }
    if (was.draining !== node.draining) yield { key: node.draining ? "drained" : "undrained", values };
  }
  for (const node of old.values()) yield { key: "left", values: { name: node.name } };
}

/** @param {any} before @param {any} now */
function* modelChanges(before, now) {
  const names = new Map(now.nodes.map((/** @type {any} */ each) => [each.id, each.name]));
  const old = new Map(before.models.map((/** @type {any} */ each) => [each.name, each]));
  for (const model of now.models) {
    const was = old.get(model.name);
    const where = model.stages.map((/** @type {any} */ each) => names.get(each[0]) ?? each[0]);
    const values = { name: model.name, where: [...new Set(where)] };
    old.delete(model.name);
    const moved = JSON.stringify(was?.stages ?? []) !== JSON.stringify(model.stages);
    if (moved) yield { key: where.length ? "placed" : "nowhere", values, model: model.name };
    if (model.serves && !(was?.serves && !moved)) yield { key: "serves", values, model: model.name };
    if (was?.serves && !model.serves && !moved) yield { key: "interrupted", values, model: model.name };
  }
  for (const model of old.values()) yield { key: "undeployed", values: { name: model.name }, model: model.name };
}
