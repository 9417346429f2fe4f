/** How machines and models are spoken of, in the reader's language. */
import { bytes, language, number, t } from "../shell/i18n.js";

/** Names in a sentence: "a, b and c". @param {string[]} names */
export function listing(names) {
  return new Intl.ListFormat(language.get(), { type: "conjunction" }).format(names);
}

/** Layers [first, last), counted as the planner counts them. @param {number[] | null} layers */
export function layersText(layers) {
  if (!layers) return "";
  const [first, last] = [layers[0], layers[1] - 1];
  return t(first === last ? "common.layer" : "common.layers", { first, last });
}

/** @param {number | null | undefined} value */
export function speed(value) {
  if (value === null || value === undefined) return "";
  return t("common.speed", { speed: number(value, { maximumFractionDigits: value < 10 ? 1 : 0 }) });
}

/** @param {number | null | undefined} seconds */
export function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const value = seconds * 1000;
  return t("common.milliseconds", { value: number(value, { maximumFractionDigits: value < 10 ? 1 : 0 }) });
}

/** @param {number | null | undefined} watts */
export function power(watts) {
  return watts === null || watts === undefined ? "" : t("common.watts", { value: number(watts, { maximumFractionDigits: 0 }) });
}

/** Whether a machine answers, or works. @param {any} node */
export function stateOf(node) {
  return node.state === "alive" && node.draining ? "draining" : node.state;
}

/** The memory that a machine lends to models. @param {any} node */
export function lentBytes(node) {
  return (node.devices ?? []).reduce((/** @type {number} */ sum, /** @type {any} */ each) => sum + each.memory_bytes, 0);
}

/** What models take of it. @param {any} node */
export function usedBytes(node) {
  return (node.stages ?? []).reduce((/** @type {number} */ sum, /** @type {any} */ each) => sum + (each.bytes ?? 0), 0);
}

/** @param {any} node */
export function memoryText(node) {
  const lent = lentBytes(node);
  return lent ? t("common.memory", { used: bytes(usedBytes(node)), lent: bytes(lent) }) : "";
}

/** What is wrong with a model, or how it is. @param {any} model */
export function modelState(model) {
  return model.deployed ? model.state : "offered";
}

/** A day and a time. @param {number} seconds since 1970 */
export function day(seconds) {
  return new Date(seconds * 1000).toLocaleString(language.get(), { dateStyle: "medium", timeStyle: "short" });
}

/** A time to the second. @param {number} seconds since 1970 */
export function clock(seconds) {
  const date = new Date(seconds * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return date.toLocaleString(language.get(), isToday ? { timeStyle: "medium" } : { dateStyle: "short", timeStyle: "medium" });
}
