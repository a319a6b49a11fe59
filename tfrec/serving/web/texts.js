/* Texts: every word of the pages, in the reader's language. */

import { keep, kept } from "./store.js";

const NAMES = { en: "en", zh: "zh-Hans" };
const tables = {};
let language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";

/** Both languages at once: a reader may switch while the service is gone. */
export async function loadTexts() {
  const read = async (name) => {
    tables[name] = await (await fetch(`/static/texts/${name}.json`)).json();
  };
  await Promise.all(Object.keys(NAMES).map(read));
}

/** A text by its key with its {places} filled; numbers choose the form and are set as people write them. */
export function t(key, told = {}) {
  let text = tables[language][key] ?? tables.en[key] ?? key;
  if (typeof text === "object")
    text = text[new Intl.PluralRules(language).select(told.n)] ?? text.other;
  return text.replace(/\{(\w+)\}/g, (whole, name) => shown(told[name] ?? whole));
}

/** Whether there is such a text. */
export const has = (key) => key in tables.en;

const shown = (value) => (typeof value === "number" ? number(value) : value);

export function number(value, digits = 0, least = 0) {
  const told = { maximumFractionDigits: digits, minimumFractionDigits: least };
  return new Intl.NumberFormat(NAMES[language], told).format(value);
}

export function percent(share, digits = 0) {
  return new Intl.NumberFormat(NAMES[language], {
    style: "percent",
    maximumFractionDigits: digits,
  }).format(share);
}

/** A moment, given in milliseconds since 1970 or as text. */
export function moment(when, told = { dateStyle: "medium", timeStyle: "short" }) {
  const date = new Date(when);
  return Number.isNaN(date.getTime())
    ? String(when)
    : new Intl.DateTimeFormat(NAMES[language], told).format(date);
}

/** Fills every element that names a text: as content, label, placeholder or tooltip. */
export function translate(root = document) {
  const fill = (attribute, write) => {
    for (const node of root.querySelectorAll(`[${attribute}]`))
      write(node, t(node.getAttribute(attribute)));
  };
  fill("data-t", (node, text) => (node.textContent = text));
  fill("data-t-label", (node, text) => node.setAttribute("aria-label", text));
  fill("data-t-hint", (node, text) => node.setAttribute("placeholder", text));
  fill("data-t-title", (node, text) => node.setAttribute("title", text));
}

export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  keep("language", language);
  document.documentElement.lang = NAMES[language];
}

/** The theme that is in force. */
export function theme() {
  const chosen = kept("theme");
  return chosen ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

export function switchTheme() {
  const next = theme() === "dark" ? "light" : "dark";
  keep("theme", next);
  document.documentElement.dataset.theme = next;
}
