// Requests to the server that the page came from; errors say what the user can do.
import { EventParser } from "./sse.js";

/** An error: `status` (0: no connection), `param` (the field that caused it), `retryAfter` in seconds, `requestId`. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter, requestId });
  }
}

const KEY = "rgtg-api-key";
let memory = "";

/** The API key, kept in the session storage of this tab only. */
export const apiKey = {
  get() {
    try { return sessionStorage.getItem(KEY) ?? memory; } catch { return memory; }
  },
  set(value) {
    memory = value;
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch { /* storage is disabled: the key is kept in memory */ }
  },
};

function headers(body) {
  const key = apiKey.get();
  return { ...(body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function send(path, body, signal) {
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers: headers(body), body: body ? JSON.stringify(body) : undefined, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header/i.test(error.message)) throw new ApiError("An API key consists of ASCII characters; this one contains others.", { status: 401 });
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  let error = null;
  try { error = JSON.parse(text).error; } catch { /* not JSON, for example the error page of a proxy */ }
  const wait = Number.parseFloat(response.headers.get("retry-after"));
  return new ApiError(typeof error?.message === "string" ? error.message : `The server answered ${response.status}.`, {
    status: response.status,
    param: typeof error?.param === "string" ? error.param : null,
    code: error?.code ?? null,
    retryAfter: Number.isFinite(wait) ? wait : null,
    requestId: response.headers.get("x-request-id"),
  });
}

export async function ask(path, body = null, signal = undefined) {
  const response = await send(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`The answer of ${path} is not JSON.`, { status: response.status });
  }
}

/** Stream a request; `onEvent(object)` is called for every event. Resolves when the stream ends with [DONE]. */
export async function stream(path, body, signal, onEvent) {
  const response = await send(path, { ...body, stream: true }, signal);
  const requestId = response.headers.get("x-request-id");
  let done = false;
  const parser = new EventParser((data) => {
    if (data === "[DONE]") { done = true; return; }
    let event;
    try { event = JSON.parse(data); } catch { throw new ApiError("The server sent an event that is not JSON.", { requestId }); }
    if (event.error) throw new ApiError(String(event.error.message ?? "The server failed while generating this text."), { status: 500, param: event.error.param ?? null, requestId });
    onEvent(event);
  });
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { value, done: ended } = await reader.read();
      if (ended) break;
      parser.push(decoder.decode(value, { stream: true }));
    }
  } catch (error) {
    reader.cancel().catch(() => {});
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    if (error instanceof TypeError) throw new ApiError("The connection was lost while the texts were being generated.", { requestId });
    throw error;
  }
  if (!done) throw new ApiError("The server closed the stream before its end.", { requestId });
}

/** A heading for an error, and what the user can do. */
export function explain(error) {
  if (error.status === 401 || error.status === 403) return ["This server needs a key", "Give its API key at the top of the page."];
  if (error.status === 429) return ["The server is busy", error.retryAfter ? `Wait ${Math.ceil(error.retryAfter)} s, then try again.` : "Try again in a moment."];
  if (error.status === 503) return ["The server is not ready", "It is loading its models or shutting down."];
  if (error.status === 413) return ["Too long for this server", ""];
  if (error.status >= 400 && error.status < 500) return ["The server refused this request", ""];
  if (error.status === 0) return ["No connection", ""];
  return ["Something failed on the server", ""];
}
