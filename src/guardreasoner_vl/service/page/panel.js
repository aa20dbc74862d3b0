// One guard's panel on the page.

import { instance, make } from "./dom.js";
import { decisiveSentence, reasoningNodes } from "./reasoning.js";
import { Fault, call, eventsOf } from "./service.js";
import { pythonCode, shellCommand } from "./snippets.js";
import { SIDES, factsOf, isVerdict, judgementRow, summary } from "./verdict.js";

const SIGNS = { busy: "", allow: "✓", block: "✕", unsure: "!" };

/** One guard's panel: its reasoning while it judges, then its verdict. `sent` are the images of `body`. */
export class Panel {
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
