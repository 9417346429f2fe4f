/**
 * Requests to the node that this page came from. What goes wrong becomes an `ApiError`, whose `words` a reader
 * understands; what the server said is in `message`.
 */
import { t } from "./i18n.js";
import { makeStore } from "./store.js";

/** By this header the server knows the page's own requests; see src/cordee/web/session_cookie.py. */
export const PAGE_HEADER = { "X-Cordee-Page": "1" };

/** Counts up when the server no longer knows who is there: the shell then asks for a key. */
export const signedOut = makeStore(0);

/** Codes of the server's errors for which there are words. */
const KNOWN = new Set([
  "context_length_exceeded",
  "invalid_api_key",
  "admin_key_needed",
  "model_not_found",
  "model_loading",
  "overloaded",
  "rate_limit_exceeded",
  "stage_failed",
  "request_too_large",
  "unsupported_model",
]);

export class ApiError extends Error {
  /**
   * @param {string} code of the server, or `unreachable`
   * @param {string} message what the server said
   * @param {number} [status]
   * @param {number} [waitSeconds] after which it may be tried again
   */
  constructor(code, message, status = 0, waitSeconds = 0) {
    super(message);
    this.code = code;
    this.status = status;
    this.waitSeconds = waitSeconds;
  }

  /** What happened and what to do, in the reader's language. */
  get words() {
    if (this.code === "unreachable") return t("shell.error.unreachable");
    if (KNOWN.has(this.code)) return t(`shell.error.${this.code}`, { seconds: this.waitSeconds });
    return t("shell.error.other");
  }
}

/**
 * The error object of any of the server's APIs.
 * @param {any} body
 * @param {number} [status]
 * @param {number} [waitSeconds]
 */
export function apiError(body, status = 0, waitSeconds = 0) {
  const error = body?.error;
  const code = typeof error?.code === "string" ? error.code : "internal_error";
  return new ApiError(code, String(error?.message ?? error ?? ""), status, waitSeconds);
}

/**
 * One exchange; resolves once the headers have come.
 * @param {string} path
 * @param {{method?: string, body?: unknown, signal?: AbortSignal}} [options] `body` is sent as JSON
 * @returns {Promise<Response>}
 */
export async function request(path, { method, body, signal } = {}) {
  const isSent = body !== undefined;
  let response;
  try {
    response = await fetch(path, {
      method: method ?? (isSent ? "POST" : "GET"),
      headers: isSent ? { ...PAGE_HEADER, "Content-Type": "application/json" } : PAGE_HEADER,
      body: isSent ? JSON.stringify(body) : undefined,
      signal,
      cache: "no-store",
      credentials: "same-origin",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("unreachable", String(error));
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const failure = apiError(said, response.status, Number(response.headers.get("retry-after") ?? 0));
  if (response.status === 401 && path !== "/session") signedOut.set(signedOut.get() + 1);
  throw failure;
}

/**
 * One exchange whose answer is JSON.
 * @param {string} path
 * @param {{method?: string, body?: unknown, signal?: AbortSignal}} [options]
 * @returns {Promise<any>}
 */
export async function json(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (options?.signal?.aborted) throw error;
    throw new ApiError("unreachable", String(error));
  }
}
