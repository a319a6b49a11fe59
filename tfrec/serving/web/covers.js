/* Covers: a picture for any title, since there are none: drawn from title and attributes alone. */

import { picture } from "./art.js";
import { Chance, hash } from "./chance.js";
import { svg } from "./dom.js";
import { named } from "./titles.js";

const WIDTH = 200;
const HEIGHT = 300;
const MARGIN = 15;

// Paper, ink and three colours that stand on the paper. The first attribute picks one.
const PALETTES = [
  ["#16213e", "#f4ead5", "#e2506a", "#f2a65a", "#3f629c"],
  ["#f1e6d6", "#2b1d1a", "#c8432b", "#e5a13a", "#3d5a6c"],
  ["#1f3b34", "#f1ecdc", "#d9a441", "#7fae8a", "#456f60"],
  ["#f4d3c7", "#3a1f2b", "#c9404f", "#edae49", "#8d5b7a"],
  ["#0f4653", "#f5efe0", "#e8702a", "#f2b880", "#5fa8b3"],
  ["#e8b84a", "#2a2118", "#b23a28", "#f8ebca", "#4f6d5a"],
  ["#d9cfe8", "#2d2347", "#6c4ab6", "#ee8a73", "#8d9ede"],
  ["#1c1b1f", "#efe6d2", "#c9a24b", "#8b7a5b", "#504c59"],
  ["#c6e1ed", "#14304a", "#e4572e", "#2e86ab", "#f8f2e0"],
  ["#b9512f", "#fdf1e3", "#f3b562", "#6b2f20", "#f0d5b8"],
  ["#d2dac3", "#26322a", "#6b8f5e", "#de7457", "#f4eddb"],
  ["#4a1c40", "#f7e4dc", "#e26d5c", "#b3446c", "#f2c078"],
  ["#36444f", "#f2efe8", "#e8b04a", "#8fa6b5", "#cf6350"],
  ["#c2e4d3", "#123c33", "#1f8a70", "#f5b062", "#ef7d5d"],
  ["#98203a", "#fbf0e4", "#dd9f45", "#3a4f59", "#e9b7a6"],
  ["#ecefe8", "#1d2a44", "#2f5fd0", "#ee5f3b", "#a9bde0"],
  ["#23409a", "#f4f1e4", "#f5b82e", "#7fa2f0", "#e8604f"],
  ["#535b32", "#f6f0da", "#d7b94c", "#a1a86a", "#cf6237"],
].map(([paper, ink, a, b, c]) => ({ paper, ink, a, b, c }));

const SERIF =
  'Charter, "Iowan Old Style", Georgia, "Noto Serif", "Liberation Serif", "Songti SC", "Noto Serif CJK SC", serif';
const SANS =
  'Inter, "Helvetica Neue", Arial, "Liberation Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif';
const NARROW =
  '"Avenir Next Condensed", "Roboto Condensed", "Arial Narrow", "Liberation Sans Narrow", "PingFang SC", "Noto Sans CJK SC", sans-serif';
const VOICES = [
  { family: SERIF, weight: 700, lead: 1.08, tight: -0.01 },
  { family: SANS, weight: 800, lead: 1.04, tight: -0.03 },
  { family: NARROW, weight: 700, lead: 1.0, tight: 0, upper: true },
  { family: SERIF, weight: 400, lead: 1.1, tight: -0.01, slope: "italic" },
  { family: SANS, weight: 500, lead: 1.1, tight: -0.02 },
];

/** The cover of an item: SVG of 2 by 3. `bare`: the picture alone, for small sizes. */
export function cover({ title, attributes }, { bare = false } = {}) {
  const values = Object.values(attributes ?? {})
    .flat()
    .filter((v) => v && !/^\d+$/.test(v));
  const chance = new Chance(`${title}|${values.join("|")}`);
  const palette = coloured(values[0] ?? title, values[1], chance);
  const plan = chance.one([below, above, label]);
  const voice = VOICES[(hash(values[0] ?? "") + chance.whole(0, 1)) % VOICES.length];
  const parts = bare
    ? [art(0, 0, WIDTH, HEIGHT, chance, palette)]
    : plan(chance, palette, voice, named(title).name, values.slice(0, 2).join("  ·  "));
  const ground = svg("rect", { width: WIDTH, height: HEIGHT, fill: palette.paper });
  return svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      class: "cover",
      "aria-hidden": "true",
      focusable: "false",
    },
    ground,
    parts,
  );
}

/** The colours of the first attribute, so that a kind is known by them; some of the second. */
function coloured(first, second, chance) {
  const key = chance.one([first, first, second ?? `${first} 2`, `${first} 3`]);
  const palette = PALETTES[hash(key) % PALETTES.length];
  return chance.next() < 0.6 ? palette : { ...palette, a: palette.b, b: palette.a };
}

function art(x, y, width, height, chance, palette) {
  const frame = {
    x,
    y,
    width,
    height,
    viewBox: "0 0 200 200",
    preserveAspectRatio: "xMidYMid slice",
  };
  return svg(
    "svg",
    frame,
    svg("rect", { width: 200, height: 200, fill: palette.paper }),
    picture(chance, palette),
  );
}

/** The title below the picture. */
function below(chance, palette, voice, title, kind) {
  const set = fitted(title, voice, WIDTH - 2 * MARGIN, 4);
  const top = HEIGHT - MARGIN - 18 - set.height;
  return [
    art(0, 0, WIDTH, top - 10, chance, palette),
    ...lines(set, voice, MARGIN, top, palette.ink),
    small(kind, MARGIN, HEIGHT - MARGIN, palette.ink),
  ];
}

/** The title above the picture. */
function above(chance, palette, voice, title, kind) {
  const set = fitted(title, voice, WIDTH - 2 * MARGIN, 4);
  const foot = MARGIN + 14 + set.height + 12;
  return [
    art(0, foot, WIDTH, HEIGHT - foot, chance, palette),
    small(kind, MARGIN, MARGIN + 7, palette.ink),
    ...lines(set, voice, MARGIN, MARGIN + 14, palette.ink),
  ];
}

/** The title on a label over the picture. */
function label(chance, palette, voice, title, kind) {
  const set = fitted(title, voice, WIDTH - 4 * MARGIN, 4);
  const height = set.height + 46;
  const top = chance.one([MARGIN, Math.round((HEIGHT - height) * 0.62), HEIGHT - height - MARGIN]);
  const box = { x: MARGIN, y: top, width: WIDTH - 2 * MARGIN, height, fill: palette.paper };
  return [
    art(0, 0, WIDTH, HEIGHT, chance, palette),
    svg("rect", box),
    svg("rect", {
      ...box,
      x: MARGIN + 4,
      y: top + 4,
      width: box.width - 8,
      height: height - 8,
      fill: "none",
      stroke: palette.ink,
      "stroke-width": 0.8,
    }),
    ...lines(set, voice, WIDTH / 2, top + 14, palette.ink, "middle"),
    small(kind, WIDTH / 2, top + height - 15, palette.ink, "middle", WIDTH - 4 * MARGIN),
  ];
}

function lines({ rows, size }, voice, x, top, fill, anchor = "start") {
  return rows.map((row, i) =>
    svg("text", {
      x,
      y: Math.round((top + size * 0.82 + i * size * voice.lead) * 10) / 10,
      fill,
      "font-family": voice.family,
      "font-weight": voice.weight,
      "font-style": voice.slope,
      "font-size": size,
      "letter-spacing": voice.tight * size,
      "text-anchor": anchor,
      text: row,
    }),
  );
}

function small(text, x, y, fill, anchor = "start", width = WIDTH - 2 * MARGIN) {
  const told = { family: SANS, weight: 600, tight: 0.08 };
  let shown = text.toUpperCase();
  while (shown && measured(shown, told) * 8 > width)
    shown = shown.slice(0, Math.max(0, shown.lastIndexOf("  ·  ")));
  return svg("text", {
    x,
    y,
    fill,
    opacity: 0.78,
    "font-family": SANS,
    "font-weight": 600,
    "font-size": 8,
    "letter-spacing": 0.64,
    "text-anchor": anchor,
    text: shown,
  });
}

/** The largest size at which a title fits a width in so many lines. */
function fitted(title, voice, width, most) {
  const text = voice.upper ? title.toUpperCase() : title;
  for (let size = 34; size > 12; size -= 2) {
    const rows = broken(text, voice, width / size);
    if (rows && rows.length <= most) return block(rows, size, voice);
  }
  const rows = broken(text, voice, width / 12, true);
  if (rows.length > most)
    (rows.splice(most, rows.length, `${rows[most - 1]}…`), rows.splice(most - 1, 1));
  return block(rows, 12, voice);
}

const block = (rows, size, voice) => ({
  rows,
  size,
  height: Math.round(size * (0.95 + voice.lead * (rows.length - 1))),
});

/** A title in lines of a width in units of the type's size; null: a word is wider than that. */
function broken(text, voice, width, anyway = false) {
  const rows = [];
  let row = "";
  for (const piece of pieces(text)) {
    const longer = row + piece;
    if (measured(longer.trim(), voice) <= width) {
      row = longer;
      continue;
    }
    if (!anyway && measured(piece.trim(), voice) > width) return null;
    if (row.trim()) rows.push(row.trim());
    row = piece.trimStart();
  }
  if (row.trim()) rows.push(row.trim());
  return rows;
}

/** What may stand on a line of its own: words, and every sign of a script without spaces. */
const pieces = (text) =>
  text.match(
    /[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff][\u3000-\u303f\uff00-\uffef]?|[^\s\u3040-\u30ff\u3400-\u9fff]+\s*/gu,
  ) ?? [text];

const ruler = document.createElement("canvas").getContext("2d");
const widths = new Map();

/** A text's width in units of its size. */
function measured(text, { family, weight, slope = "normal", tight }) {
  const key = `${weight}${slope}${family}${text}`;
  if (!widths.has(key)) {
    ruler.font = `${slope} ${weight} 100px ${family}`;
    widths.set(key, ruler.measureText(text).width / 100);
  }
  return widths.get(key) + tight * text.length;
}
