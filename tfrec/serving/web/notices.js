/* Notices: the banner of a service that is gone, and sentences about what just happened. */

import { connection } from "./connection.js";
import { Gone } from "./api.js";
import { byId, el } from "./dom.js";
import { icon } from "./icons.js";
import { t } from "./texts.js";

const SHOWN = 10_000;
let timer = 0;

/** Says a sentence, seen and heard; `marks` are short facts beside it, `heard` tells them in words. */
export function say(sentence, marks = [], heard = sentence) {
  const row = marks.length
    ? el("span", { class: "notice-marks", "aria-hidden": "true" }, marks)
    : null;
  byId("heard").textContent = heard;
  show(el("p", { class: "notice-text", text: sentence }), row, false);
}

/** Says what went wrong. A service that is gone has its banner already. */
export function complain(error) {
  if (error instanceof Gone || error?.name === "AbortError") return;
  const request = error.requestId ? ` ${t("error.request", { id: error.requestId })}` : "";
  byId("heard").textContent = error.message;
  show(el("p", { class: "notice-text", text: `${error.message}${request}` }), null, true);
}

function show(text, row, bad) {
  clearTimeout(timer);
  const close = el(
    "button",
    { type: "button", class: "round", "aria-label": t("close"), on: { click: quiet } },
    icon("close"),
  );
  byId("notice").classList.toggle("bad", bad);
  byId("notice").hidden = false;
  byId("notice-content").replaceChildren(...[text, row].filter(Boolean));
  byId("notice-close").replaceChildren(close);
  if (!bad)
    timer = setTimeout(function wait() {
      if (byId("notice").matches(":hover, :focus-within")) timer = setTimeout(wait, 2000);
      else quiet();
    }, SHOWN);
}

/** Takes the notice away. */
export function quiet() {
  byId("notice").hidden = true;
}

/** The banner comes when the service goes, and goes when it is back. */
export function banner(text) {
  const retry = el("button", { type: "button", class: "button", on: { click: tried } });
  const words = el("p", {});
  const draw = () => {
    words.replaceChildren(el("strong", { text: t("gone.heading") }), ` ${t(text)}`);
    retry.textContent = t("gone.retry");
  };
  async function tried() {
    retry.textContent = t("gone.trying");
    if (!(await connection.retry())) retry.textContent = t("gone.retry");
  }
  byId("banner").replaceChildren(icon("warning"), words, retry);
  connection.addEventListener("lost", () => {
    draw();
    byId("banner").hidden = false;
  });
  connection.addEventListener("back", () => {
    byId("banner").hidden = true;
    say(t("gone.back"));
  });
  return draw;
}
