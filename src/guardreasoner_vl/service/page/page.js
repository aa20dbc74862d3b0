// The playground: asks /v1/guard/stream and shows what comes back.
//
// Whatever the user or the service says goes into the page as text, never as HTML: a guard's reasoning is influenced by
// whoever wrote what it judges. Only a whole verdict that allows is shown as one; all else is "could not judge".

const KEY = "guardreasoner-key";
const LABELS = ["harmful", "unharmful", "error", "not_applicable"];
const SIGNS = { busy: "", allow: "✓", block: "✕", unsure: "!" };

const $ = (id) => document.getElementById(id);
const on = (id, kind, act) => $(id).addEventListener(kind, act);
let images = []; // { name, url }, each url a data: URL
let reading = Promise.resolve(); // ends when all chosen files are read
let running = null; // the AbortController of what is judged now
let askingForKey = null;
let knowsGuards = false;

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

/** A copy of a template: its root element and its named parts. */
function copied(id) {
  const root = $(id).content.firstElementChild.cloneNode(true);
  const parts = { root };
  for (const part of root.querySelectorAll("[data-part]")) parts[part.dataset.part] = part;
  return parts;
}

const note = (text) => ($("note").textContent = text);
const whyNot = (error) => (error instanceof Fault ? error.message : "the service does not answer");

// ---- Asking the service ----

/** `fetch` with the key; where the service wants one, the user is asked and the request is sent again. */
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
      const told = key ? "The service did not accept that key." : "This service asks for a key.";
      askingForKey ??= keyFromUser(told).finally(() => (askingForKey = null));
      await askingForKey;
    }
  }
}

async function faultOf(answer) {
  const said = (await answer.json().catch(() => null))?.error;
  const wait = answer.headers.get("Retry-After");
  const message = `${said?.message ?? "the service refused the request"}${wait ? ` (in ${wait} s)` : ""}`;
  return new Fault(said?.code ?? `http_${answer.status}`, message);
}

/** The server-sent events of an answer: name and data. */
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
  const names = (await answer.json()).data.map((guard) => guard.id);
  $("guard").replaceChildren(...names.map((name) => new Option(name)));
  $("second-guard").replaceChildren(new Option("nothing", ""), ...names.map((name) => new Option(name)));
  knowsGuards = true;
}

// ---- The key ----

function keyFromUser(told) {
  const dialog = $("key-dialog");
  $("key-note").textContent = told;
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

/** Whether it is a verdict, whole and at one with itself. */
function isVerdict(verdict) {
  const sides = [verdict?.request, verdict?.response];
  const isScore = (score) => score === null || (typeof score === "number" && score >= 0 && score <= 1);
  if (!sides.every((side) => LABELS.includes(side?.label) && isScore(side.score))) return false;
  if (!["allow", "block"].includes(verdict.action)) return false;
  const labels = sides.map((side) => side.label);
  return Boolean(verdict.error) || (!labels.includes("error") && verdict.flagged === labels.includes("harmful"));
}

/** State, title and reason, for people. */
function summary(verdict) {
  const isBlocked = verdict.action === "block";
  if (verdict.error) {
    const done = isBlocked ? "blocked" : "let through by the service's settings";
    return ["unsure", `Could not judge: ${done}`, `${verdict.error.code}: ${verdict.error.message}`];
  }
  const harmful = ["request", "response"].filter((side) => verdict[side].label === "harmful");
  const found = `Found harmful: ${harmful.join(" and ")}.`;
  if (isBlocked) return ["block", "Block", found];
  if (harmful.length) return ["unsure", "Harmful, but let through by the service's settings", found];
  return ["allow", "Allow", "Nothing harmful was found."];
}

function judgementRow(name, { label, score }) {
  const { root, ...parts } = copied("judgement");
  parts.side.textContent = name;
  parts.label.textContent = label.replace("_", " ");
  parts.label.dataset.label = label;
  parts.bar.setAttribute("aria-label", `Probability that the ${name} is harmful`);
  parts.bar.setAttribute("aria-valuenow", score);
  parts.bar.firstElementChild.style.width = `${100 * score}%`;
  parts.bar.hidden = score === null;
  parts.bar.classList.add(label);
  parts.score.textContent = score === null ? "no score" : score.toFixed(3);
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
  return facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value ?? "unknown")]);
}

/** One guard's panel: what it says while it judges, and its verdict. */
class Panel {
  constructor(body) {
    this.body = body;
    this.parts = copied("panel");
    this.parts.name.textContent = `${body.guard}, ${body.mode}`;
    this.text = document.createTextNode("");
    this.parts.reasoning.append(this.text);
    this.conclude("busy", "Judging…", "");
  }

  async run(signal) {
    try {
      const headers = { "Content-Type": "application/json" };
      const body = JSON.stringify(this.body);
      const answer = await call("v1/guard/stream", { method: "POST", headers, body, signal });
      for await (const [name, data] of eventsOf(answer.body)) {
        if (name === "reasoning") this.tell(data.text);
        else if (name === "restart") this.text.data = "";
        else if (name === "verdict") return this.show(data);
      }
      throw new Fault("no_verdict", "the answer ended without a verdict");
    } catch (error) {
      this.fail(error, signal.aborted);
    }
  }

  tell(text) {
    const box = this.parts.reasoning;
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
    this.text.appendData(this.text.length ? text : text.trimStart());
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }

  show(verdict) {
    if (!isVerdict(verdict)) throw new Fault("odd_verdict", "what the service sent is no verdict");
    const { parts } = this;
    const rows = ["request", "response"].map((side) => judgementRow(side, verdict[side]));
    parts.judgements.replaceChildren(...rows);
    parts.facts.replaceChildren(...factsOf(verdict));
    parts.json.textContent = JSON.stringify(verdict, null, 2);
    parts.raw.hidden = false;
    if (!verdict.error) this.text.data = verdict.reasoning ?? "";
    this.remark(!verdict.error);
    this.conclude(...summary(verdict));
  }

  remark(isJudged) {
    this.parts["reasoning-note"].textContent = !this.text.data ? "(none)" : isJudged ? "" : "(led to no verdict)";
  }

  fail(error, isStopped) {
    const known = error instanceof Fault ? error : new Fault("no_answer", "the service did not answer, or broke off");
    this.remark(false);
    if (isStopped) this.conclude("unsure", "Stopped: not judged", "Treat it as blocked.");
    else this.conclude("unsure", "Could not judge: treat as blocked", `${known.code}: ${known.message}`);
  }

  conclude(state, title, why) {
    this.parts.root.dataset.state = state;
    this.parts.root.setAttribute("aria-busy", state === "busy");
    this.parts.sign.textContent = SIGNS[state];
    this.parts.title.textContent = title;
    this.parts.why.textContent = why;
  }
}

// ---- The form ----

/** One guard, or two to compare. */
function chosen() {
  const asked = [["guard", "mode"]];
  if ($("second-guard").selectedIndex > 0) asked.push(["second-guard", "second-mode"]);
  return asked.map(([guard, mode]) => ({ guard: $(guard).value, mode: $(mode).value }));
}

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
    if (!knowsGuards) await loadGuards();
    const exchange = entered();
    const panels = chosen().map((asked) => new Panel({ ...exchange, ...asked }));
    $("panels").replaceChildren(...panels.map((panel) => panel.parts.root));
    $("stale").hidden = true;
    panels[0].parts.root.scrollIntoView({ block: "nearest" });
    await Promise.all(panels.map((panel) => panel.run(signal)));
  } catch (error) {
    note(`Nothing was judged: ${whyNot(error)}.`);
  } finally {
    running = null;
    showRunning();
  }
}

/** Judge and Stop stand in one place; the focus goes from one to the other. */
function showRunning() {
  const [shown, gone] = running ? [$("stop"), $("judge")] : [$("judge"), $("stop")];
  const hadFocus = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (hadFocus) shown.focus();
}

function changed() {
  $("second-mode").disabled = $("second-guard").selectedIndex === 0;
  $("stale").hidden = !$("panels").querySelector(".panel");
}

function fill({ prompt = "", response = "", image }) {
  $("prompt").value = prompt;
  $("response").value = response;
  images = image ? [{ name: "note.png", url: drawn(image.split("\n")) }] : [];
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

/** Files may be dropped and pasted anywhere; text goes where it always goes. */
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
    $("files").value = ""; // so that a file that was removed can be chosen again
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
  takeDrops();
  keep(sessionStorage.getItem(KEY));
  loadGuards().catch((error) => note(`The guards are not known: ${whyNot(error)}.`));
}

start();
