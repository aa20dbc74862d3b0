// Calls the service, with a key if it asks for one.

import { $ } from "./dom.js";

const KEY = "guardreasoner-key";
let keyPrompt = null; // the open dialog's promise

export class Fault extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export const reasonOf = (error) => (error instanceof Fault ? error.message : "the service does not answer");

/** `fetch` with the key. If the service refuses the key, ask the user for one and send the request again. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) {
      if (!answer.ok) throw await faultOf(answer);
      return answer;
    }
    if (key === sessionStorage.getItem(KEY)) {
      const message = key ? "The service did not accept that key." : "This service asks for a key.";
      keyPrompt ??= keyFromUser(message).finally(() => (keyPrompt = null));
      await keyPrompt;
    }
  }
}

async function faultOf(answer) {
  const error = (await answer.json().catch(() => null))?.error;
  const wait = answer.headers.get("Retry-After");
  const message = `${error?.message ?? "the service refused the request"}${wait ? ` (in ${wait} s)` : ""}`;
  return new Fault(error?.code ?? `http_${answer.status}`, message);
}

/** Yields the server-sent events of an answer: name and data. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const blocks = (rest + piece.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [, name, data] = block.match(/^event: (.*)\ndata: (.*)$/) ?? [];
      if (name) yield [name, JSON.parse(data)];
    }
  }
}

// ---- The key ----

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

function keyFromUser(message) {
  const dialog = $("key-dialog");
  $("key-note").textContent = message;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    const closed = () => {
      const key = $("key").value.trim();
      $("key-form").reset();
      if (dialog.returnValue !== "use") return reject(new Fault("unauthorised", "no key was given"));
      keep(key);
      resolve();
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

/** Keep `key` until the tab is closed; without one, forget it. */
export function keep(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  showKey();
}

/** Offer to forget the key if there is one. */
export function showKey() {
  $("forget").hidden = !hasKey();
}
