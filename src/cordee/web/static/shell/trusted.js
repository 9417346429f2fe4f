/**
 * The few strings that may become documents or programs: the browser refuses all others (Trusted Types, where it has
 * them). HTML of answers is DOMPurify's affair, which has a policy of its own.
 */

/** @type {any} */
const types = /** @type {any} */ (globalThis).trustedTypes;
const own = new URL("../", import.meta.url);

const policy = types?.createPolicy("cordee", {
  createHTML: (/** @type {string} */ text) => text,
  createScriptURL: (/** @type {string} */ url) => {
    if (!url.startsWith(own.href)) throw new TypeError(`no module of the page: ${url}`);
    return url;
  },
});

/**
 * The address of a module of the page, to start a worker with.
 * @param {string} path from the bundle's root
 * @returns {string}
 */
export function moduleUrl(path) {
  const url = new URL(path, own).href;
  return policy ? policy.createScriptURL(url) : url;
}

/**
 * Parse XML into a document that is only read, and never shown.
 * @param {string} text
 */
export function parseXml(text) {
  return new DOMParser().parseFromString(policy ? policy.createHTML(text) : text, "text/xml");
}
