// The same request for programs: as a command for a shell, and as Python.

import { hasKey } from "./service.js";

const INLINE_CHARACTERS = 20_000; // a longer image is named by its file
const STEERING = /[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g; // may steer a terminal, or hide

const unicode = (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
/** A JSON text, which is a Python literal too for strings; nothing in it can steer a terminal. */
const literal = (value) => JSON.stringify(value).replace(STEERING, unicode);
/** JSON that can stand between single quotes in a shell. */
const quotable = (value) => literal(value).replaceAll("'", "\\u0027");
const isNamed = ({ name, url }) => url.length > INLINE_CHARACTERS && /^\w[\w .-]*$/.test(name);

export function shellCommand(body, sent) {
  const image = (file) => {
    if (!isNamed(file)) return quotable(file.url);
    return `${quotable(file.url.split(",")[0]).slice(0, -1)},'"$(base64 < '${file.name}' | tr -d '\\n')"'"`;
  };
  const fields = Object.entries(body).filter(([, value]) => value !== null && value.length !== 0);
  const json = fields.map(([name, value]) => {
    return `"${name}": ${name === "images" ? `[${sent.map(image).join(", ")}]` : quotable(value)}`;
  });
  const url = new URL("v1/guard", location.href).href.replaceAll("'", "%27");
  const key = hasKey() ? ' -H "Authorization: Bearer $GUARDREASONER_KEY"' : "";
  const post = `curl -sS '${url}' -H 'Content-Type: application/json'${key} --data-binary @-`;
  return `printf '%s' '{${json.join(", ")}}' |\n  ${post}\n`;
}

export function pythonCode(body, sent) {
  const isKeyed = hasKey();
  const files = sent.map((file) => (isNamed(file) ? `Path(${literal(file.name)})` : literal(file.url)));
  const fields = {
    prompt: body.prompt && literal(body.prompt),
    images: files.length && `[${files.join(", ")}]`,
    response: body.response && literal(body.response),
    mode: literal(body.mode),
  };
  const options = Object.entries(fields).filter(([, value]) => value);
  const service = literal(new URL(".", location.href).href);
  const lines = [
    ...(isKeyed ? ["import os"] : []),
    ...(sent.some(isNamed) ? ["from pathlib import Path"] : []),
    "from guardreasoner_vl import GuardClient",
    "",
    `key = ${isKeyed ? 'os.environ["GUARDREASONER_KEY"]' : "None"}`,
    `with GuardClient(${service}, key, guard=${literal(body.guard)}) as client:`,
    "    verdict = client.judge(",
    ...options.map(([name, value]) => `        ${name}=${value},`),
    "    )",
    "print(verdict.action, verdict.request.label, verdict.response.label)",
  ];
  return `${lines.join("\n")}\n`;
}
