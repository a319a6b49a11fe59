/* Api: what the pages ask the service, and what they make of a refusal. */

import { connection } from "./connection.js";
import { askForKey } from "./key.js";
import { kept } from "./store.js";

const PATIENCE = 15_000;

/** The service refused, in a line that a person can read. */
export class Refused extends Error {
  constructor(status, told, requestId) {
    super(told?.message ?? `HTTP ${status}`);
    Object.assign(this, { status, code: told?.code ?? "", requestId });
  }
}

/** The service cannot be reached; the banner says so already. */
export class Gone extends Error {}

/** The parsed answer of a request; `signal` gives it up. */
export async function ask(method, path, body, { signal } = {}) {
  for (;;) {
    const key = kept("key", "", sessionStorage);
    const response = await reached(method, path, body, key, signal);
    if (response.status === 401 || response.status === 403) {
      // Another request may have been given a better key meanwhile.
      if (key !== kept("key", "", sessionStorage) || (await askForKey(key !== ""))) continue;
    }
    if (response.status === 502 || response.status === 503) {
      connection.lost();
      throw new Gone(path);
    }
    const answer = await response.json().catch(() => ({}));
    if (response.ok) return answer;
    throw new Refused(
      response.status,
      answer.error,
      answer.request_id ?? response.headers.get("X-Request-Id"),
    );
  }
}

async function reached(method, path, body, key, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const patience = AbortSignal.timeout(PATIENCE);
  try {
    return await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signal ? AbortSignal.any([signal, patience]) : patience,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    connection.lost();
    throw new Gone(path, { cause: error });
  }
}

const of = (id) => encodeURIComponent(id);
const query = (told) =>
  new URLSearchParams(Object.entries(told).filter(([, value]) => value !== "")).toString();

export const api = {
  catalog: () => ask("GET", "/v1/catalog"),
  shelves: (body, told) => ask("POST", "/v1/shelves", body, told),
  events: (list) => ask("POST", "/v1/events", list),
  search: (told, more) => ask("GET", `/v1/search?${query(told)}`, undefined, more),
  item: (id) => ask("GET", `/v1/items/${of(id)}`),
  similar: (id, told) => ask("GET", `/v1/items/${of(id)}/similar?${query(told)}`),
  users: (told, more) => ask("GET", `/v1/users?${query(told)}`, undefined, more),
  user: (id) => ask("GET", `/v1/users/${of(id)}`),
  forget: (id) => ask("DELETE", `/v1/users/${of(id)}`),
  models: () => ask("GET", "/v1/models"),
  activate: (version, body) => ask("POST", `/v1/models/${of(version)}:activate`, body),
  stats: () => ask("GET", "/v1/stats"),
};
