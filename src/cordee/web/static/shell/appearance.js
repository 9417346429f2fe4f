/** Dark or light: as the system has it, unless somebody chose. */
import { makeStore } from "./store.js";

const KEPT = "cordee-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

/** @type {import("./store.js").Store<"dark" | "light">} */
export const theme = makeStore(current());

system.addEventListener("change", () => theme.set(current()));

/** @returns {"dark" | "light"} */
function current() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen === "dark" || chosen === "light") return chosen;
  return system.matches ? "dark" : "light";
}

/** The other theme from now on. */
export function switchTheme() {
  const next = theme.get() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem(KEPT, next);
  theme.set(next);
}
