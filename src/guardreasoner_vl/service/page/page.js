// The playground: sends the form to /v1/guard/stream and shows the verdict.
//
// Every text from the user or the service enters the page as text, never as HTML: whoever wrote the judged text can
// influence the reasoning.

import { $, make, note, on } from "./dom.js";
import { Panel } from "./panel.js";
import { Fault, call, hasKey, keep, reasonOf, showKey } from "./service.js";

const DEMONSTRATION = "embedded"; // the model that the package contains

let images = []; // { name, url }, each url a data: URL
let reading = Promise.resolve(); // resolves when all chosen files are read
let running = null; // the AbortController of the request that is being judged
let models = null; // from each guard's name to its model's name; null until the service has listed them

// ---- The guards ----

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
  if (!hasKey()) return;
  event.preventDefault();
  try {
    const url = URL.createObjectURL(await (await call("openapi.json")).blob());
    make("a", { href: url, download: "openapi.json" }).click();
    URL.revokeObjectURL(url);
  } catch (error) {
    note(`The interface was not loaded: ${reasonOf(error)}.`);
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
  showKey();
  loadGuards().catch((error) => note(`The list of guards was not loaded: ${reasonOf(error)}.`));
}

start();
