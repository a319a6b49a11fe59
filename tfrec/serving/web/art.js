/* Art: abstract pictures of 200 by 200, drawn from chance in the colours of a palette. */

import { svg } from "./dom.js";

const SIZE = 200;
const rect = (x, y, width, height, fill, more = {}) =>
  svg("rect", { x, y, width, height, fill, ...more });
const circle = (cx, cy, r, fill, more = {}) => svg("circle", { cx, cy, r, fill, ...more });
const path = (d, fill, more = {}) => svg("path", { d, fill, ...more });
const line = (d, stroke, width) =>
  path(d, "none", { stroke, "stroke-width": width, "stroke-linecap": "round" });
const round = (number) => Math.round(number * 10) / 10;

/** A sun or moon over bands of hills. */
function hills(chance, { a, b, c, ink }) {
  const out = [
    circle(
      round(chance.between(55, 145)),
      round(chance.between(50, 85)),
      round(chance.between(24, 42)),
      b,
    ),
  ];
  const colours = [c, a, ink];
  colours.forEach((colour, depth) => {
    const base = 92 + depth * 32;
    const waves = Array.from({ length: 5 }, () => round(base + chance.between(-22, 16)));
    let d = `M0 ${SIZE} V${waves[0]}`;
    for (let i = 1; i < 5; i++) {
      const x = i * 50;
      d += ` C${x - 25} ${waves[i - 1]} ${x - 25} ${waves[i]} ${x} ${waves[i]}`;
    }
    out.push(path(`${d} V${SIZE} Z`, colour));
  });
  return out;
}

/** Quarter circles in a grid, each turned some way. */
function quarters(chance, { a, b, c, ink, paper }) {
  const cells = chance.one([3, 4]);
  const size = SIZE / cells;
  const out = [];
  for (let row = 0; row < cells; row++) {
    for (let column = 0; column < cells; column++) {
      const [ground, shape] = chance.shuffled([a, b, c, ink, paper]);
      const turn = `translate(${round((column + 0.5) * size)} ${round((row + 0.5) * size)}) rotate(${chance.whole(0, 3) * 90})`;
      const half = round(size / 2);
      const whole = chance.next() < 0.22;
      out.push(
        svg(
          "g",
          { transform: turn },
          rect(-half, -half, size, size, ground),
          whole
            ? circle(0, 0, round(size * 0.32), shape)
            : path(`M${-half} ${-half} H${half} A${size} ${size} 0 0 1 ${-half} ${half} Z`, shape),
        ),
      );
    }
  }
  return out;
}

/** Rings about one point. */
function rings(chance, { a, b, c, paper }) {
  const x = round(chance.between(40, 160));
  const y = round(chance.between(60, 150));
  const colours = chance.shuffled([a, b, c]);
  const step = chance.between(15, 22);
  const out = [];
  for (let i = 8; i > 0; i--)
    out.push(circle(x, y, round(i * step), i % 2 ? colours[(i >> 1) % 3] : paper));
  return out;
}

/** Rays from a point below or beside. */
function rays(chance, { a, b, c, ink }) {
  const x = round(chance.between(30, 170));
  const y = round(chance.between(110, 190));
  const count = chance.whole(11, 17);
  const turn = chance.next() * Math.PI;
  const at = (angle) => `${round(x + 320 * Math.cos(angle))} ${round(y + 320 * Math.sin(angle))}`;
  const out = [];
  for (let i = 0; i < count; i++) {
    const start = turn + (2 * Math.PI * i) / count;
    out.push(path(`M${x} ${y} L${at(start)} L${at(start + Math.PI / count)} Z`, i % 2 ? a : c));
  }
  const r = round(chance.between(24, 40));
  return [...out, circle(x, y, r, b), circle(x, y, round(r * 0.45), ink)];
}

/** Lines that rise where something lies beneath them. */
function ridges(chance, { a, b, paper, ink }) {
  const peak = chance.between(70, 130);
  const spread = chance.between(26, 44);
  const out = [circle(round(peak), 64, round(chance.between(30, 46)), b)];
  for (let i = 0; i < 13; i++) {
    const y = 52 + i * 13;
    let d = `M-5 ${y}`;
    for (let x = 0; x <= SIZE; x += 9) {
      const near = Math.exp(-((x - peak) ** 2) / (2 * spread * spread));
      d += ` L${x} ${round(y - near * chance.between(14, 40))}`;
    }
    out.push(
      path(`${d} L205 ${y} V205 H-5 Z`, paper, {
        stroke: i % 4 === 3 ? a : ink,
        "stroke-width": 1.8,
        "stroke-linejoin": "round",
      }),
    );
  }
  return out;
}

/** Peaks, lit from one side. */
function peaks(chance, { a, b, c, ink }) {
  const out = [circle(round(chance.between(40, 160)), 52, round(chance.between(18, 30)), a)];
  for (let i = 0; i < 4; i++) {
    const x = round(chance.between(15, 185));
    const top = round(chance.between(55, 105) + i * 14);
    const half = round(chance.between(52, 88));
    out.push(path(`M${x - half} ${SIZE} L${x} ${top} L${x} ${SIZE} Z`, i % 2 ? c : b));
    out.push(
      path(`M${x + half} ${SIZE} L${x} ${top} L${x} ${SIZE} Z`, i % 2 ? ink : a, {
        opacity: i % 2 ? 0.9 : 1,
      }),
    );
  }
  return out;
}

/** Large discs that overlap. */
function discs(chance, { a, b, c, ink }) {
  const colours = chance.shuffled([a, b, c]);
  const turn = chance.next() * 6.28;
  const reach = chance.between(26, 40);
  const out = colours.map((colour, i) => {
    const angle = turn + i * 2.094;
    return circle(
      round(100 + reach * Math.cos(angle)),
      round(102 + reach * Math.sin(angle)),
      round(chance.between(48, 64)),
      colour,
      { opacity: 0.86 },
    );
  });
  return [...out, circle(100, 102, round(chance.between(7, 16)), ink)];
}

/** Dots that grow towards a corner. */
function dots(chance, { a, b, c }) {
  const corner = [chance.one([0, SIZE]), chance.one([0, SIZE])];
  const colours = chance.shuffled([a, b, c]);
  const out = [];
  for (let row = 0; row < 10; row++) {
    for (let column = 0; column < 10; column++) {
      const x = column * 20 + 10;
      const y = row * 20 + 10;
      const far = Math.hypot(x - corner[0], y - corner[1]) / 283;
      out.push(
        circle(
          x,
          y,
          round(10.5 * (1 - far) ** 0.8 + 0.6),
          colours[far < 0.36 ? 0 : far < 0.66 ? 1 : 2],
        ),
      );
    }
  }
  return out;
}

/** Arches within arches. */
function arches(chance, { a, b, c, ink, paper }) {
  const colours = chance.shuffled([a, b, c]);
  const out = [];
  const count = chance.whole(1, 2);
  for (let n = 0; n < count; n++) {
    const middle = count === 1 ? 100 : 54 + n * 92;
    const wide = count === 1 ? 78 : 42;
    const foot = count === 1 ? SIZE : SIZE - n * chance.whole(0, 24);
    for (let i = 0; i < 5; i++) {
      const r = round(wide * (1 - i * 0.2));
      const top = round(foot - wide * 1.5 + i * wide * 0.16);
      const colour = i === 4 ? ink : i % 2 ? paper : colours[(i >> 1) % 3];
      out.push(
        path(
          `M${middle - r} 210 V${top + r} A${r} ${r} 0 0 1 ${middle + r} ${top + r} V210 Z`,
          colour,
        ),
      );
    }
  }
  return out;
}

/** Blocks between heavy lines. */
function blocks(chance, { a, b, c, ink, paper }) {
  const cut = (low, high) => Math.round(chance.between(low, high));
  const x1 = cut(40, 80);
  const x2 = cut(115, 165);
  const y1 = cut(40, 80);
  const y2 = cut(115, 165);
  const xs = [0, x1, x2, SIZE];
  const ys = [0, y1, y2, SIZE];
  const fills = chance.shuffled([a, b, c, paper, paper, a, paper, b, paper]);
  const out = [];
  for (let i = 0; i < 9; i++) {
    const [column, row] = [i % 3, Math.floor(i / 3)];
    out.push(
      rect(xs[column], ys[row], xs[column + 1] - xs[column], ys[row + 1] - ys[row], fills[i]),
    );
  }
  const bars = [x1, x2]
    .map((x) => rect(x - 3, 0, 6, SIZE, ink))
    .concat([y1, y2].map((y) => rect(0, y - 3, SIZE, 6, ink)));
  return [...out, ...bars];
}

/** Orbits with bodies on them. */
function orbits(chance, { a, b, c, ink }) {
  const turn = chance.whole(-40, 40);
  const out = [circle(100, 100, round(chance.between(22, 32)), a)];
  [46, 66, 88].forEach((rx, i) => {
    const ry = round(rx * chance.between(0.3, 0.62));
    const angle = chance.next() * 6.28;
    out.push(
      svg("ellipse", {
        cx: 100,
        cy: 100,
        rx,
        ry,
        fill: "none",
        stroke: ink,
        "stroke-width": 1.6,
        opacity: 0.8,
      }),
    );
    out.push(
      circle(
        round(100 + rx * Math.cos(angle)),
        round(100 + ry * Math.sin(angle)),
        round(chance.between(5, 11)),
        i % 2 ? b : c,
      ),
    );
  });
  return [svg("g", { transform: `rotate(${turn} 100 100) translate(-18 -18) scale(1.18)` }, out)];
}

/** Slanted bands, one of them cut by a disc. */
function bands(chance, { a, b, c, ink }) {
  const colours = chance.shuffled([a, b, c, ink]);
  const slant = chance.one([-1, 1]) * chance.whole(24, 46);
  let x = -60;
  const out = [];
  for (let i = 0; x < 260; i++) {
    const width = chance.whole(14, 38);
    out.push(rect(x, -80, width, 360, colours[i % 4]));
    x += width + chance.whole(8, 24);
  }
  const disc = circle(
    round(chance.between(60, 140)),
    round(chance.between(70, 130)),
    round(chance.between(32, 46)),
    chance.one([a, b]),
  );
  return [svg("g", { transform: `rotate(${slant} 100 100)` }, out), disc];
}

/** Waves, one above the other. */
function waves(chance, { a, b, c, ink }) {
  const colours = chance.shuffled([a, b, c]);
  const high = chance.between(7, 13);
  const out = [
    circle(round(chance.between(50, 150)), 58, round(chance.between(22, 34)), colours[2]),
  ];
  for (let i = 0; i < 7; i++) {
    const y = round(78 + i * 19);
    const shift = round(chance.between(-40, 0));
    let d = `M${shift} ${y}`;
    for (let n = 0; n < 7; n++) d += ` q20 ${round(-high * 2)} 40 0`;
    out.push(path(`${d} V230 H${shift} Z`, i === 6 ? ink : colours[i % 2]));
  }
  return out;
}

/** A bloom of petals. */
function bloom(chance, { a, b, c, ink }) {
  const petals = chance.whole(6, 11);
  const long = chance.between(60, 84);
  const wide = round((long * 2.2) / petals);
  const out = [line(`M100 100 Q${chance.whole(80, 120)} 160 ${chance.whole(85, 115)} 215`, c, 6)];
  for (const [size, colour] of [
    [1, a],
    [0.62, b],
  ]) {
    for (let i = 0; i < petals; i++) {
      const turn = round((360 * i) / petals + (size < 1 ? 180 / petals : 0));
      out.push(
        svg("ellipse", {
          cx: 100,
          cy: round(100 - (long * size) / 2),
          rx: round(wide * size),
          ry: round((long * size) / 2),
          fill: colour,
          transform: `rotate(${turn} 100 100)`,
        }),
      );
    }
  }
  return [...out, circle(100, 100, round(chance.between(10, 16)), ink)];
}

const PICTURES = [
  hills,
  quarters,
  rings,
  rays,
  ridges,
  peaks,
  discs,
  dots,
  arches,
  blocks,
  orbits,
  bands,
  waves,
  bloom,
];

/** The shapes of one picture. */
export function picture(chance, palette) {
  return chance.one(PICTURES)(chance, palette);
}
