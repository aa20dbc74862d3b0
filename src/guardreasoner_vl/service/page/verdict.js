// Reads verdicts. Only a complete verdict that allows is shown as "Allow"; all else is "Could not judge".

import { instance, make } from "./dom.js";

const LABELS = ["harmful", "unharmful", "error", "not_applicable"];
export const SIDES = ["request", "response"]; // task 1 and task 2 of a guard

/** Whether `verdict` is complete and consistent. */
export function isVerdict(verdict) {
  const sides = SIDES.map((side) => verdict?.[side]);
  const isScore = (score) => score === null || (typeof score === "number" && score >= 0 && score <= 1);
  if (!sides.every((side) => LABELS.includes(side?.label) && isScore(side.score))) return false;
  if (!["allow", "block"].includes(verdict.action)) return false;
  const labels = sides.map((side) => side.label);
  return Boolean(verdict.error) || (!labels.includes("error") && verdict.flagged === labels.includes("harmful"));
}

/** State, title and one line that says why. */
export function summary(verdict) {
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

export const harmfulSides = (verdict) => SIDES.filter((side) => verdict[side].label === "harmful");

export function judgementRow(name, { label, score }) {
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

export function factsOf({ usage, model, mode }) {
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
