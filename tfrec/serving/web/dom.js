/* Dom: makes elements without markup in strings, so that no text of the service is ever read as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; `on` holds listeners, `text` its text, `true` an attribute without a value. */
export function el(tag, told = {}, ...children) {
  return filled(document.createElement(tag), told, children);
}

/** An SVG element. Presentation attributes only: the page's policy refuses inline styles. */
export function svg(tag, told = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), told, children);
}

function filled(node, { on = {}, text, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) set(node, name, value);
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  if (text !== undefined) node.textContent = text;
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

/** Sets an attribute; null, undefined and false take it away. */
export function set(node, name, value) {
  if (value == null || value === false) node.removeAttribute(name);
  else node.setAttribute(name, value === true ? "" : String(value));
}

/** The one element of that id. */
export const byId = (id) => document.getElementById(id);

/** Whether the reader asked for less motion. */
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Calls back once after the calls have paused for so many milliseconds. */
export function paused(ms, callback) {
  let timer = 0;
  return (...told) => {
    clearTimeout(timer);
    timer = setTimeout(() => callback(...told), ms);
  };
}
