// Reads the reasoning of a guard: its tasks and steps, and the sentence that decides.

import { make } from "./dom.js";
import { SIDES, harmfulSides } from "./verdict.js";

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
export function reasoningNodes(reasoning) {
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
export function decisiveSentence(verdict, isGiven) {
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
