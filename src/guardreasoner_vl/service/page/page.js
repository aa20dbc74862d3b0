// The playground: sends the form to /v1/guard/stream and shows the verdict.
//
// Every text from the user or the service enters the page as text, never as HTML: whoever wrote the judged text can
// influence the reasoning. Only a complete verdict that allows is shown as "Allow"; all else is "Could not judge".

const KEY = "guardreasoner-key";
const DEMONSTRATION = "embedded"; // the model that the package contains
const LABELS = ["harmful", "unharmful", "error", "not_applicable"];
const SIDES = ["request", "response"]; // task 1 and task 2 of a guard
const SIGNS = { busy: "", allow: "✓", block: "✕", unsure: "!" };

const $ = (id) => document.getElementById(id);
const on = (id, kind, act) => $(id).addEventListener(kind, act);
let images = []; // { name, url }, each url a data: URL
let reading = Promise.resolve(); // resolves when all chosen files are read
let running = null; // the AbortController of the request that is being judged
let keyPrompt = null; // the open dialog's promise
let models = null; // from each guard's name to its model's name; null until the service has listed them

class Fault extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** An instance of a template: its root element and its named parts. */
function instance(id) {
  const root = $(id).content.firstElementChild.cloneNode(true);
  const parts = { root };
  for (const part of root.querySelectorAll("[data-part]")) parts[part.dataset.part] = part;
  return parts;
}

const note = (text) => ($("note").textContent = text);
const reasonOf = (error) => (error instanceof Fault ? error.message : "the service does not answer");

// ---- Calling the service ----

/** `fetch` with the key. If the service refuses the key, ask the user for one and send the request again. */
async function call(path, options = {}) {
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
async function* eventsOf(body) {
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

async function loadGuards() {
  const answer = await call("v1/models");
  models = new Map((await answer.json()).data.map((guard) => [guard.id, guard.owned_by]));
  const options = () => [...models.keys()].map((name) => new Option(name));
  $("guard").replaceChildren(...options());
  $("second-guard").replaceChildren(new Option("nothing", ""), ...options());
  showDemonstration();
}

function showDemonstration() {
  $("demonstration").hidden = !chosen().some(({ guard }) => models?.get(guard) === DEMONSTRATION);
}

/** A service with keys wants one for this file too, and a link cannot send it: then fetch the file and save it. */
async function openInterface(event) {
  if (!sessionStorage.getItem(KEY)) return;
  event.preventDefault();
  try {
    const url = URL.createObjectURL(await (await call("openapi.json")).blob());
    make("a", { href: url, download: "openapi.json" }).click();
    URL.revokeObjectURL(url);
  } catch (error) {
    note(`The interface was not loaded: ${reasonOf(error)}.`);
  }
}

// ---- The key ----

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

function keep(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  $("forget").hidden = !key;
}

// ---- Verdicts ----

/** Whether `verdict` is complete and consistent. */
function isVerdict(verdict) {
  const sides = SIDES.map((side) => verdict?.[side]);
  const isScore = (score) => score === null || (typeof score === "number" && score >= 0 && score <= 1);
  if (!sides.every((side) => LABELS.includes(side?.label) && isScore(side.score))) return false;
  if (!["allow", "block"].includes(verdict.action)) return false;
  const labels = sides.map((side) => side.label);
  return Boolean(verdict.error) || (!labels.includes("error") && verdict.flagged === labels.includes("harmful"));
}

/** State, title and one line that says why. */
function summary(verdict) {
  const isBlocked = verdict.action === "block";
  if (verdict.error) {
    const action = isBlocked ? "blocked" : "let through by the service's settings";
    return ["unsure", `Could not judge: ${action}`, `${verdict.error.code}: ${verdict.error.message}`];
  }
  const harmful = harmfulSides(verdict);
  const why = harmful.length > 1 ? "The request and the response are harmful." : `The ${harmful[0]} is harmful.`;
  if (isBlocked) return ["block", "Block", harmful.length ? why : "The service's settings block this."];
  if (harmful.length) return ["unsure", "Harmful, but let through by the service's settings", why];
  return ["allow", "Allow", "The guard saw nothing harmful."];
}

const harmfulSides = (verdict) => SIDES.filter((side) => verdict[side].label === "harmful");

function judgementRow(name, { label, score }) {
  const { root, ...parts } = instance("judgement");
  parts.side.textContent = name;
  parts.label.textContent = label.replace("_", " ");
  parts.label.dataset.label = label;
  parts.bar.setAttribute("aria-label", `Probability that the ${name} is harmful`);
  parts.bar.setAttribute("aria-valuenow", score);
  parts.bar.firstElementChild.style.width = `${100 * score}%`;
  parts.bar.hidden = score === null;
  parts.bar.classList.add(label);
  parts.score.textContent = score === null ? "unknown" : score.toFixed(3);
  return root;
}

function factsOf({ usage, model, mode }) {
  const cached = usage?.cached_tokens ? ` (${usage.cached_tokens} from the cache)` : "";
  const facts = [
    ["Tokens", `${usage?.prompt_tokens} read${cached}, ${usage?.completion_tokens} written`],
    ["Seconds", usage?.seconds?.toFixed(2)],
    ["Mode", mode],
    ["Model", model?.name],
    ["Revision", model?.revision ?? "unknown"],
  ];
  return facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value ?? "unknown")));
}

// ---- Reasoning ----

const TASK = /^#{1,4}\s*(Task\s+(\d+))\b[\s:.]*(.*)$/i;
const STEP = /^#{1,4}\s*(?:Reasoning\s+)?Step\s+\d+\b[\s:.]*(.*)$/i;
const TASK_TITLES = { 1: "The request", 2: "The response" };

/** The tasks of a reasoning in Markdown: number, title, text before the first step, and steps. */
function tasksOf(reasoning) {
  let lines = [];
  const tasks = [{ number: 0, title: "", lead: lines, steps: [] }];
  for (const line of reasoning.split("\n")) {
    const [, name, number, rest] = line.match(TASK) ?? [];
    const step = line.match(STEP);
    if (name) {
      lines = [];
      const title = rest ? `${name}: ${rest}` : (TASK_TITLES[number] ?? name);
      tasks.push({ number: Number(number), title, lead: lines, steps: [] });
    } else if (step) {
      lines = [step[1]];
      tasks.at(-1).steps.push(lines);
    } else lines.push(line);
  }
  const whole = (part) => part.join("\n").trim();
  return tasks.map((task) => ({ ...task, lead: whole(task.lead), steps: task.steps.map(whole).filter(Boolean) }));
}

/** The reasoning as elements: a heading for each task, a numbered list of its steps, paragraphs for other text. */
function reasoningNodes(reasoning) {
  let start = 1;
  return tasksOf(reasoning).flatMap(({ title, lead, steps }) => {
    const items = steps.map((step) => make("li", { dir: "auto" }, step));
    const list = make("ol", { start }, ...items);
    start += steps.length;
    return [
      ...(title ? [make("h5", { dir: "auto" }, title)] : []),
      ...(lead ? [make("p", { dir: "auto" }, lead)] : []),
      ...(steps.length ? [list] : []),
    ];
  });
}

const LONGEST_SENTENCE = 240; // characters
const LABEL_WORDS = { harmful: /(?<!\bnot )\bharmful\b/i, unharmful: /\b(?:unharmful|harmless|not harmful)\b/i };

/** The last sentence that the guard wrote about the side that decided the verdict, or "". */
function decisiveSentence(verdict, isGiven) {
  const side = harmfulSides(verdict)[0] ?? (isGiven.response ? "response" : "request");
  const tasks = tasksOf(verdict.reasoning ?? "");
  const ofSide = tasks.filter((task) => task.number === SIDES.indexOf(side) + 1);
  const texts = (ofSide.length ? ofSide : tasks).flatMap((task) => [task.lead, ...task.steps]).filter(Boolean);
  const plain = (texts.at(-1) ?? "").replace(/[*_`#]+/g, "").replace(/\s+/g, " ").trim();
  const sentence = plain.split(/(?<=[.!?。！？])\s+/).at(-1);
  const [label, opposite] = verdict[side].label === "harmful" ? ["harmful", "unharmful"] : ["unharmful", "harmful"];
  const names = (word) => LABEL_WORDS[word].test(sentence);
  if (names(opposite) && !names(label)) return "The reasoning ends with the opposite label.";
  const shortened = sentence.length > LONGEST_SENTENCE ? `${sentence.slice(0, LONGEST_SENTENCE)}…` : sentence;
  return shortened && `Reason given: ${shortened}`;
}

// ---- The same request, for programs ----

const INLINE_CHARACTERS = 20_000; // a longer image is named by its file
const STEERING = /[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g; // may steer a terminal, or hide

const unicode = (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
/** A JSON text, which is a Python literal too for strings; nothing in it can steer a terminal. */
const literal = (value) => JSON.stringify(value).replace(STEERING, unicode);
/** JSON that can stand between single quotes in a shell. */
const quotable = (value) => literal(value).replaceAll("'", "\\u0027");
const isNamed = ({ name, url }) => url.length > INLINE_CHARACTERS && /^\w[\w .-]*$/.test(name);

function shellCommand(body, sent) {
  const image = (file) => {
    if (!isNamed(file)) return quotable(file.url);
    return `${quotable(file.url.split(",")[0]).slice(0, -1)},'"$(base64 < '${file.name}' | tr -d '\\n')"'"`;
  };
  const fields = Object.entries(body).filter(([, value]) => value !== null && value.length !== 0);
  const json = fields.map(([name, value]) => {
    return `"${name}": ${name === "images" ? `[${sent.map(image).join(", ")}]` : quotable(value)}`;
  });
  const url = new URL("v1/guard", location.href).href.replaceAll("'", "%27");
  const key = sessionStorage.getItem(KEY) ? ' -H "Authorization: Bearer $GUARDREASONER_KEY"' : "";
  const post = `curl -sS '${url}' -H 'Content-Type: application/json'${key} --data-binary @-`;
  return `printf '%s' '{${json.join(", ")}}' |\n  ${post}\n`;
}

function pythonCode(body, sent) {
  const hasKey = Boolean(sessionStorage.getItem(KEY));
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
    ...(hasKey ? ["import os"] : []),
    ...(sent.some(isNamed) ? ["from pathlib import Path"] : []),
    "from guardreasoner_vl import GuardClient",
    "",
    `key = ${hasKey ? 'os.environ["GUARDREASONER_KEY"]' : "None"}`,
    `with GuardClient(${service}, key, guard=${literal(body.guard)}) as client:`,
    "    verdict = client.judge(",
    ...options.map(([name, value]) => `        ${name}=${value},`),
    "    )",
    "print(verdict.action, verdict.request.label, verdict.response.label)",
  ];
  return `${lines.join("\n")}\n`;
}

// ---- Panels ----

/** One guard's panel: its reasoning while it judges, then its verdict. `sent` are the images of `body`. */
class Panel {
  constructor(body, sent) {
    this.body = body;
    const isText = (value) => Boolean(value?.trim());
    this.isGiven = { request: isText(body.prompt) || sent.length > 0, response: isText(body.response) };
    this.parts = instance("panel");
    this.parts.name.textContent = `${body.guard}, ${body.mode}`;
    this.reasoning = "";
    this.frame = null;
    const kinds = { "Copy as curl": shellCommand, "Copy as Python": pythonCode };
    const buttons = Object.entries(kinds).map(([textContent, write]) => {
      const button = make("button", { type: "button", className: "plain", textContent });
      button.addEventListener("click", () => this.copy(write(body, sent)));
      return button;
    });
    this.parts.copies.append(...buttons);
    this.conclude("busy", "Judging…", "");
  }

  async run(signal) {
    try {
      const headers = { "Content-Type": "application/json" };
      const body = JSON.stringify(this.body);
      const answer = await call("v1/guard/stream", { method: "POST", headers, body, signal });
      for await (const [name, data] of eventsOf(answer.body)) {
        if (name === "reasoning") this.add(data.text);
        else if (name === "restart") this.reasoning = "";
        else if (name === "verdict") return this.show(data);
      }
      throw new Fault("no_verdict", "the answer ended without a verdict");
    } catch (error) {
      this.fail(error, signal.aborted);
    }
  }

  /** Append streamed reasoning; draw it at most once for each frame. */
  add(text) {
    this.reasoning += this.reasoning ? text : text.trimStart();
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  /** Draw the reasoning; while it grows, without a heading that may be incomplete. */
  draw() {
    const isGrowing = this.parts.root.dataset.state === "busy";
    const box = this.parts.reasoning;
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
    box.replaceChildren(...reasoningNodes(isGrowing ? this.reasoning.replace(/(^|\n)#[^\n]*$/, "") : this.reasoning));
    if (isAtEnd && isGrowing) box.scrollTop = box.scrollHeight;
  }

  show(verdict) {
    if (!isVerdict(verdict)) throw new Fault("odd_verdict", "what the service sent is no verdict");
    const { parts, isGiven } = this;
    const isShown = (side) => isGiven[side] || verdict[side].label === "harmful";
    const rows = SIDES.filter(isShown).map((side) => judgementRow(side, verdict[side]));
    parts.judgements.replaceChildren(...rows);
    parts.facts.replaceChildren(...factsOf(verdict));
    parts.json.textContent = JSON.stringify(verdict, null, 2);
    parts.raw.hidden = false;
    if (!verdict.error) this.reasoning = verdict.reasoning ?? "";
    this.remark(!verdict.error);
    this.conclude(...summary(verdict), verdict.error ? "" : decisiveSentence(verdict, isGiven));
  }

  remark(isJudged) {
    this.parts["reasoning-note"].textContent = !this.reasoning ? "(none)" : isJudged ? "" : "(led to no verdict)";
  }

  fail(error, isStopped) {
    const known = error instanceof Fault ? error : new Fault("no_answer", "the service did not answer, or broke off");
    this.remark(false);
    if (isStopped) this.conclude("unsure", "Stopped: not judged", "Treat it as blocked.");
    else this.conclude("unsure", "Could not judge: treat as blocked", `${known.code}: ${known.message}`);
  }

  conclude(state, title, why, reason = "") {
    this.parts.root.dataset.state = state;
    this.parts.root.setAttribute("aria-busy", state === "busy");
    this.parts.sign.textContent = SIGNS[state];
    this.parts.title.textContent = title;
    this.parts.why.textContent = why;
    this.parts.reason.textContent = reason;
    this.draw();
  }

  /** Put `text` on the clipboard; where the browser forbids it, show and select the text. */
  async copy(text) {
    const { copied, command } = this.parts;
    copied.textContent = "";
    command.hidden = true;
    try {
      await navigator.clipboard.writeText(text); // absent where the page came over plain HTTP from another machine
      copied.textContent = "Copied.";
    } catch {
      command.textContent = text;
      command.hidden = false;
      getSelection().selectAllChildren(command);
      copied.textContent = "The browser forbids copying: copy the selected text.";
    }
  }
}

// ---- The form ----

/** Name and mode of one guard, or of two to compare. */
function chosen() {
  const fields = [["guard", "mode"]];
  if ($("second-guard").selectedIndex > 0) fields.push(["second-guard", "second-mode"]);
  return fields.map(([guard, mode]) => ({ guard: $(guard).value, mode: $(mode).value }));
}

/** The exchange of the form. Throws `Fault` if there is none. */
function entered() {
  const [prompt, response] = ["prompt", "response"].map((id) => $(id).value);
  if (!`${prompt}${response}`.trim() && !images.length) {
    throw new Fault("empty", "enter a prompt or a response, or choose an image");
  }
  const urls = images.map((image) => image.url);
  return { prompt: prompt || null, images: urls, response: response || null, include_reasoning: true };
}

async function judge(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  const { signal } = running;
  note("");
  showRunning();
  try {
    await reading;
    if (!models) await loadGuards();
    const exchange = entered();
    const sent = [...images];
    const panels = chosen().map((guard) => new Panel({ ...exchange, ...guard }, sent));
    $("panels").replaceChildren(...panels.map((panel) => panel.parts.root));
    $("stale").hidden = true;
    showVerdict(panels[0].parts.root);
    await Promise.all(panels.map((panel) => panel.run(signal)));
  } catch (error) {
    note(`Nothing was judged: ${reasonOf(error)}.`);
  } finally {
    running = null;
    showRunning();
  }
}

/** Scroll to a panel whose headline is outside of the window. */
function showVerdict(panel) {
  const { top } = panel.getBoundingClientRect();
  if (top < 0 || top > innerHeight - 200) panel.scrollIntoView({ block: "start" });
}

/** Judge and Stop share one place; the focus moves from one to the other. */
function showRunning() {
  const [visible, other] = running ? [$("stop"), $("judge")] : [$("judge"), $("stop")];
  const hadFocus = document.activeElement === other;
  visible.hidden = false;
  other.hidden = true;
  if (hadFocus) visible.focus();
}

/** Update what depends on the form; a verdict on the page is then out of date. */
function changed() {
  $("second-mode").disabled = $("second-guard").selectedIndex === 0;
  $("stale").hidden = !$("panels").querySelector(".panel");
  $("image-count").textContent = images.length || "none";
  $("response-count").textContent = $("response").value ? `${$("response").value.length} characters` : "none";
  showDemonstration();
}

function fill({ prompt = "", response = "", image }) {
  $("prompt").value = prompt;
  $("response").value = response;
  $("response-fold").open = Boolean(response);
  images = image ? [{ name: "note.png", url: drawn(image.split("\n")) }] : [];
  $("image-fold").open = Boolean(image);
  showImages();
}

function drawn(lines) {
  const canvas = make("canvas", { width: 480, height: 300 });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fdf6dd";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = "#2b2b2b";
  pen.font = "36px sans-serif";
  lines.forEach((line, row) => pen.fillText(line, 40, 85 + row * 70));
  return canvas.toDataURL("image/png");
}

function addFiles(files) {
  note("");
  for (const file of files) {
    if (file.type.startsWith("image/")) reading = reading.then(() => addImage(file));
    else note(`Not an image, left out: ${file.name}.`);
  }
}

async function addImage(file) {
  const reader = new FileReader();
  reader.readAsDataURL(file);
  await new Promise((resolve) => (reader.onloadend = resolve));
  if (reader.error) return note(`Cannot be read, left out: ${file.name}.`);
  images.push({ name: file.name, url: reader.result });
  $("image-fold").open = true;
  showImages();
}

function showImages() {
  const items = images.map((image) => {
    const remove = make("button", { type: "button", textContent: "✕", ariaLabel: `Remove ${image.name}` });
    remove.addEventListener("click", () => {
      images = images.filter((other) => other !== image);
      showImages();
      $("choose").focus();
    });
    return make("li", {}, make("img", { src: image.url, alt: image.name, title: image.name }), remove);
  });
  $("images").replaceChildren(...items);
  changed();
}

/** Take files that are dropped or pasted anywhere; dropped or pasted text is left to the browser. */
function takeDrops() {
  const onFiles = (kind, isOver, take) =>
    document.addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.toggle("dragging", isOver);
      take?.(event.dataTransfer.files);
    });
  onFiles("dragover", true);
  onFiles("dragleave", false);
  onFiles("drop", false, addFiles);
  document.addEventListener("paste", ({ clipboardData: pasted }) => pasted?.files.length && addFiles(pasted.files));
}

function start() {
  for (const button of $("examples").children) button.addEventListener("click", () => fill(button.dataset));
  on("form", "submit", judge);
  on("form", "keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && judge(event));
  on("form", "input", changed);
  on("choose", "click", () => $("files").click());
  on("files", "change", () => {
    addFiles($("files").files);
    $("files").value = ""; // so that a removed file can be chosen again
  });
  on("stop", "click", () => running?.abort());
  on("clear", "click", () => {
    fill({});
    $("prompt").focus();
  });
  on("key-form", "submit", (event) => {
    event.preventDefault();
    $("key-dialog").close("use");
  });
  on("key-cancel", "click", () => $("key-dialog").close(""));
  on("forget", "click", () => {
    keep(null);
    note("The key is forgotten.");
  });
  on("openapi", "click", openInterface);
  takeDrops();
  keep(sessionStorage.getItem(KEY));
  loadGuards().catch((error) => note(`The list of guards was not loaded: ${reasonOf(error)}.`));
}

start();
