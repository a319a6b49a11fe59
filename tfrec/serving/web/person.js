/* Person: a sign for somebody of whom no picture exists, drawn from the id. */

import { Chance } from "./chance.js";
import { svg } from "./dom.js";

const COLOURS = [
  ["#1f3b34", "#d9a441", "#f1ecdc"],
  ["#23409a", "#f5b82e", "#f4f1e4"],
  ["#98203a", "#e9b7a6", "#fbf0e4"],
  ["#4a1c40", "#e26d5c", "#f2c078"],
  ["#0f4653", "#e8702a", "#f5efe0"],
  ["#36444f", "#e8b04a", "#f2efe8"],
  ["#6b2f20", "#f3b562", "#fdf1e3"],
  ["#2d2347", "#8d9ede", "#ee8a73"],
];

export function person(id) {
  const chance = new Chance(`person ${id}`);
  const [ground, one, two] = chance.one(COLOURS);
  const turn = chance.whole(0, 7) * 45;
  const shapes = chance.one([
    [
      svg("path", { d: "M-20 -20H20A40 40 0 0 1 -20 20Z", fill: one }),
      svg("circle", { cx: 5, cy: 5, r: 6, fill: two }),
    ],
    [
      svg("circle", { r: 11, cx: -6, fill: one }),
      svg("circle", { r: 11, cx: 7, fill: two, opacity: 0.85 }),
    ],
    [
      svg("path", { d: "M-20 0A20 20 0 0 1 20 0Z", fill: one }),
      svg("circle", { r: 7, cy: 4, fill: two }),
    ],
    [
      svg("circle", { r: 14, fill: one }),
      svg("path", { d: "M-14 0A14 14 0 0 0 14 0Z", fill: two }),
    ],
  ]);
  return svg(
    "svg",
    { viewBox: "-20 -20 40 40", class: "person", "aria-hidden": "true", focusable: "false" },
    svg("rect", { x: -20, y: -20, width: 40, height: 40, fill: ground }),
    svg("g", { transform: `rotate(${turn})` }, shapes),
  );
}
