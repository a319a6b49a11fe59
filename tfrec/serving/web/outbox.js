/* Outbox: events on their way. What the service has not acknowledged is kept, and sent again. */

import { api, Refused } from "./api.js";
import { drawnId, keep, kept } from "./store.js";

let waiting = kept("outbox", []);
let sending = Promise.resolve();

/** Sends an event and all that wait before it; raises what `ask` raises. */
export function send(event) {
  waiting = [...waiting, { event_id: drawnId("e-"), timestamp: Date.now() / 1000, ...event }];
  keep("outbox", waiting);
  return flush();
}

/** One request at a time, so that the service has the events in their order. */
export function flush() {
  sending = sending.catch(() => {}).then(sent);
  return sending;
}

async function sent() {
  if (!waiting.length) return;
  const batch = waiting;
  try {
    await api.events(batch);
  } catch (error) {
    // What is refused once is refused always; only what never arrived may come again.
    if (
      error instanceof Refused &&
      error.status >= 400 &&
      error.status < 500 &&
      error.status !== 429
    )
      drop(batch);
    throw error;
  }
  drop(batch);
}

function drop(batch) {
  const ids = new Set(batch.map((event) => event.event_id));
  waiting = waiting.filter((event) => !ids.has(event.event_id));
  keep("outbox", waiting);
}

/** Events of a user that wait; the page shows their effect already. */
export const pending = (user) => waiting.filter((event) => event.user_id === user);

/** Nothing of a forgotten user may be sent any more. */
export function discard(user) {
  waiting = waiting.filter((event) => event.user_id !== user);
  keep("outbox", waiting);
}
