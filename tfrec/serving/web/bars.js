/* Bars: numbers as lengths, above and below zero. */

import { el, svg } from "./dom.js";
import { number } from "./texts.js";

/** A bar of SVG from zero to a value on a scale from `low` to `high`. */
export function bar(value, low, high, kind = "") {
  const at = (x) => ((x - low) / (high - low || 1)) * 100;
  const from = at(Math.min(0, value));
  const wide = value ? Math.max(0.8, Math.abs(at(value) - at(0))) : 0;
  const told = {
    viewBox: "0 0 100 10",
    preserveAspectRatio: "none",
    class: `bar ${kind}`,
    "aria-hidden": "true",
    focusable: "false",
  };
  return svg(
    "svg",
    told,
    svg("rect", { class: "bar-ground", width: 100, height: 10 }),
    svg("rect", { class: value < 0 ? "bar-less" : "bar-more", x: from, width: wide, height: 10 }),
    low < 0 ? svg("rect", { class: "bar-zero", x: at(0) - 0.25, width: 0.5, height: 10 }) : null,
  );
}

/** Named values, the longest first, as rows of a table with a bar each. */
export function bars(pairs, label, shown = (value) => number(value, 3)) {
  const values = pairs.map(([, value]) => value);
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  const rows = pairs.map(([name, value]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", text: name }),
      el("td", { class: "bar-cell" }, bar(value, low, high)),
      el("td", { class: "figure-cell", text: shown(value) }),
    ),
  );
  return el("table", { class: "bars", "aria-label": label }, el("tbody", {}, rows));
}
