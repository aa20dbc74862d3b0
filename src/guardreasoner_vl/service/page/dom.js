// Elements of the page. A text only ever becomes text, never HTML.

export const $ = (id) => document.getElementById(id);
export const on = (id, kind, act) => $(id).addEventListener(kind, act);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** An instance of a template: its root element and its named parts. */
export function instance(id) {
  const root = $(id).content.firstElementChild.cloneNode(true);
  const parts = { root };
  for (const part of root.querySelectorAll("[data-part]")) parts[part.dataset.part] = part;
  return parts;
}

export const note = (text) => ($("note").textContent = text);
