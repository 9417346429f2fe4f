/**
 * What the node tells of the machines: asked once a second while somebody looks at it. What has not changed is not
 * sent again.
 */
import { json, PAGE_HEADER, signedOut } from "../shell/api.js";
import { loadWords } from "../shell/i18n.js";
import { makeStore, useStore } from "../shell/store.js";
import { useEffect } from "../vendor/preact.js";

const EVERY_MILLISECONDS = 1000;
const ANSWER_MILLISECONDS = 10_000; // a node that has not answered by then is said not to answer

await loadWords("common");

/** Whether the node does not answer at the moment. */
export const isSilent = makeStore(false);
/** Whether who looks may change something: see src/cordee/console/who.py. */
export const me = makeStore({ name: "", admin: false });

/** A value of the server that is asked for again and again while it is watched. */
class Watched {
  /** @param {string} path */
  constructor(path) {
    this.path = path;
    /** @type {import("../shell/store.js").Store<any>} null: nothing was heard yet */
    this.store = makeStore(/** @type {any} */ (null));
    this.watching = 0;
    this.timer = 0;
    this.tag = "";
    this.isAsking = false;
    document.addEventListener("visibilitychange", () => void this.ask());
  }

  /** Ask now, if somebody looks. */
  async ask() {
    if (this.watching === 0 || this.isAsking || document.hidden) return;
    this.isAsking = true;
    clearTimeout(this.timer);
    try {
      const response = await fetch(this.path, {
        headers: this.tag ? { ...PAGE_HEADER, "If-None-Match": this.tag } : PAGE_HEADER,
        cache: "no-store",
        signal: AbortSignal.timeout(ANSWER_MILLISECONDS),
      });
      if (response.ok) {
        this.tag = response.headers.get("etag") ?? "";
        this.store.set(await response.json());
      }
      if (response.status === 401) signedOut.set(signedOut.get() + 1); // the shell asks for a key
      hear(response.status < 500);
    } catch {
      hear(false);
    } finally {
      this.isAsking = false;
      this.timer = setTimeout(() => void this.ask(), EVERY_MILLISECONDS);
    }
  }

  /** The value, in a component; it is kept up to date as long as that is there. */
  use() {
    useEffect(() => {
      this.watching += 1;
      void this.ask();
      return () => {
        this.watching -= 1;
        if (this.watching === 0) clearTimeout(this.timer);
      };
    }, []);
    return useStore(this.store);
  }
}

/** @param {boolean} answers */
function hear(answers) {
  if (isSilent.get() === answers) isSilent.set(!answers);
}

const overview = new Watched("/console/overview");
const snapshots = new Watched("/console/snapshots");

/** Ask anew how the machines are: something was done. */
export function hurry() {
  return overview.ask();
}

/** Ask anew what may be done here. */
export async function refreshMe() {
  me.set(await json("/console/me").catch(() => ({ name: "", admin: false })));
}

/** How the machines are, in a component; null at first. */
export function useOverview() {
  useEffect(() => void refreshMe(), []);
  useStore(isSilent);
  return overview.use();
}

/** What there was before, the oldest first; see src/cordee/agent/history.py. @returns {any[]} */
export function useSnapshots() {
  return snapshots.use() ?? [];
}
