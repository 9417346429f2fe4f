/**
 * A value that parts of the page watch: when it is set, whoever uses it is drawn again. What outlives a page, such
 * as an answer that comes while somebody looks at the cluster, is kept in one of these and not in a component.
 */
import { useEffect, useState } from "../vendor/preact.js";

/**
 * @template T
 * @typedef {{get: () => T, set: (value: T) => void, watch: (listener: () => void) => () => void}} Store
 */

/**
 * @template T
 * @param {T} first
 * @returns {Store<T>}
 */
export function makeStore(first) {
  let value = first;
  /** @type {Set<() => void>} */
  const listeners = new Set();
  return {
    get: () => value,
    set(next) {
      value = next;
      for (const listener of [...listeners]) listener();
    },
    watch(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/**
 * The value of a store, in a component.
 * @template T
 * @param {Store<T>} store
 * @returns {T}
 */
export function useStore(store) {
  const [, redraw] = useState(0);
  useEffect(() => {
    let seen = store.get();
    const watching = store.watch(() => {
      seen = store.get();
      redraw((count) => count + 1);
    });
    if (seen !== store.get()) redraw((count) => count + 1);
    return watching;
  }, [store]);
  return store.get();
}
