/** The service's native API, and errors as something to show. Addresses are relative: a proxy may add a prefix. */

import { events } from "./events.js";
import { askKey, forget, key } from "./key.js";

const ROOT = "v1/diffray/";

/** The service said no, or was not there. `field` names the control that is to blame, where one is. */
export class Refused extends Error {
  constructor(message, { field = null, status = 0 } = {}) {
    super(message);
    this.field = field;
    this.status = status;
  }
}

/** A response with a good status; asks for a key as long as the service wants another one. */
async function answer(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    if (key()) headers.authorization = `Bearer ${key()}`;
    let response;
    try {
      response = await fetch(ROOT + path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The service does not answer. Is it running, and are you online?");
    }
    if (response.ok) return response;
    const refused = await refusal(response);
    if (response.status !== 401) throw refused;
    const wrong = key() ? "This key is not accepted." : "";
    forget();
    if (!(await askKey(wrong))) throw new Refused("The service needs an API key.", { status: 401 });
  }
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a proxy's own page: the status has to do
  }
  return worded(error, response.status, response.headers.get("retry-after"));
}

function worded(error, status, wait = error.retry_after) {
  const text = error.message ?? `The service answered with status ${status}.`;
  const sentence = text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
  const later = wait ? ` Try again in ${Math.ceil(wait)} s.` : "";
  return new Refused(sentence + later, { field: error.field, status });
}

const json = async (path) => (await answer(path)).json();

/** {models, samplers, schedules}; the first model is the default one. */
export const catalogue = () => json("models");

/**
 * Make pictures. Yields {event, data}: "accepted" once, then "progress" and "result" as they come, whose data has
 * the `index` of its picture. Ending the loop or aborting `signal` closes the connection, which cancels the work on the server.
 */
export async function* generate(body, signal) {
  const response = await answer("images", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  yield { event: "accepted" };
  let left = body.n;
  try {
    for await (const { event, data } of events(response.body)) {
      if (event === "error") throw worded(data.error ?? data, 0);
      if (event === "result") left -= 1;
      yield { event, data };
    }
  } catch (error) {
    if (error instanceof Refused || error.name === "AbortError") throw error;
    throw new Refused("The connection broke before the picture was finished.");
  }
  if (left > 0) throw new Refused("The connection ended before the picture was finished.");
}
