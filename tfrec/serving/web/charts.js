/* Charts: small drawings of numbers over time and over groups, in SVG and without a library. */

import { el, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 160;
const FOOT = 22;
const TOP = 10;

/** A number a little above the largest, that reads well: 1, 2 or 5 and zeros. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].map((n) => n * unit).find((n) => n >= value);
}

const y = (value, most) => TOP + (HEIGHT - TOP - FOOT) * (1 - value / most);
const round = (value) => Math.round(value * 10) / 10;

/**
 * A chart with a label that says in words what it shows.
 *
 * `marks`: SVG inside; `most`: the top of its scale; `shown`: writes a value of the scale;
 * `feet`: what is written below the left and the right end.
 */
function chart(label, most, shown, feet, marks) {
  const rule = (value) =>
    svg("line", {
      class: "rule",
      x1: 0,
      x2: WIDTH,
      y1: round(y(value, most)),
      y2: round(y(value, most)),
    });
  const drawing = svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      class: "chart",
      role: "img",
      "aria-label": label,
      preserveAspectRatio: "none",
    },
    [0, 0.5, 1].map((part) => rule(part * most)),
    marks,
  );
  const scale = el(
    "div",
    { class: "chart-scale", "aria-hidden": "true" },
    el("span", { text: shown(most) }),
    el("span", { text: shown(most / 2) }),
  );
  const ends = el(
    "div",
    { class: "chart-feet", "aria-hidden": "true" },
    feet.map((text) => el("span", { text })),
  );
  return el("div", { class: "chart-box" }, scale, drawing, ends);
}

/** Columns; each value has a list of parts that stand on each other: [[value, kind], …]. */
export function columns(stacks, { label, shown, feet, least = 1, gap = 2 }) {
  const most = Math.max(
    least,
    ceiling(Math.max(0, ...stacks.map((parts) => parts.reduce((all, [value]) => all + value, 0)))),
  );
  const step = WIDTH / stacks.length;
  const marks = stacks.flatMap((parts, i) => {
    let below = 0;
    return parts
      .filter(([value]) => value > 0)
      .map(([value, kind]) => {
        const top = y(below + value, most);
        const column = svg("rect", {
          class: kind,
          x: round(i * step + gap / 2),
          width: round(step - gap),
          y: round(top),
          height: round(Math.max(1, y(below, most) - top)),
        });
        below += value;
        return column;
      });
  });
  return chart(label, most, shown, feet, marks);
}

/** Lines over equal steps; null: a gap, for there was nothing to measure. */
export function linesOver(series, { label, shown, feet }) {
  const most = ceiling(
    Math.max(0, ...series.flatMap(({ values }) => values.filter((value) => value != null))),
  );
  const marks = series.flatMap(({ values, kind }) => drawn(values, most, kind));
  return chart(label, most, shown, feet, marks);
}

function drawn(values, most, kind) {
  const step = WIDTH / Math.max(1, values.length - 1);
  const at = (value, i) => `${round(i * step)} ${round(y(value, most))}`;
  const runs = [];
  values.forEach((value, i) => {
    if (value == null) return;
    if (i && values[i - 1] != null) runs.at(-1).push(at(value, i));
    else runs.push([at(value, i)]);
  });
  return runs.map((run) =>
    svg("path", {
      class: `line ${kind} ${run.length > 1 ? "" : "alone"}`,
      d: run.length > 1 ? `M${run.join(" L")}` : `M${run[0]} h0.1`,
    }),
  );
}

/** One bar in parts, with a legend that names them: [[name, value, kind], …]. */
export function shares(parts, label, shown) {
  const all = parts.reduce((sum, [, value]) => sum + value, 0);
  let left = 0;
  const pieces = parts.map(([, value, kind]) => {
    const piece = svg("rect", {
      class: kind,
      x: round((left / all) * WIDTH),
      width: round(Math.max(0, (value / all) * WIDTH - 1.5)),
      height: 16,
    });
    left += value;
    return piece;
  });
  const entry = ([name, value, kind]) =>
    el(
      "li",
      {},
      el("span", { class: `dot ${kind}` }),
      el("span", { text: name }),
      el("strong", { text: shown(value / all, value) }),
    );
  return [
    svg(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} 16`,
        class: "shares",
        role: "img",
        "aria-label": label,
        preserveAspectRatio: "none",
      },
      pieces,
    ),
    el("ul", { class: "legend" }, parts.map(entry)),
  ];
}
