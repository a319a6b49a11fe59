/* Operate: the operators' page: what the running service measures of itself, every two seconds. */

import { api, Gone } from "./api.js";
import { bar } from "./bars.js";
import { ceiling, columns, linesOver, shares } from "./charts.js";
import { connection } from "./connection.js";
import { byId, el } from "./dom.js";
import { header } from "./header.js";
import { banner, complain } from "./notices.js";
import { has, loadTexts, moment, number, percent, t } from "./texts.js";
import { report, versions } from "./versions.js";

const EVERY = 2000;
const STAGES = ["total", "wait", "parse", "state", "encode", "retrieve", "rank", "rerank"];
const COLOURS = ["one", "three", "four", "five", "two"];
const CLOCK = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
const SECONDS = { ...CLOCK, second: "2-digit" };

let running = true;
let last = null;
let table = "";
let timer = 0;

const none = () => el("p", { class: "soft none", text: t("ops.none") });
const ms = (value) => t("ops.ms", { n: number(value, value < 10 ? 2 : value < 100 ? 1 : 0) });

async function beat() {
  clearTimeout(timer);
  try {
    last = await api.stats();
    draw(last);
  } catch (error) {
    complain(error);
    if (!(error instanceof Gone) && error.status === 401) return;
  }
  if (running && !document.hidden && !connection.gone) timer = setTimeout(beat, EVERY);
}

function draw(stats) {
  byId("updated").textContent = t("ops.updated", { time: moment(Date.now(), SECONDS) });
  tiles(stats);
  traffic(stats.series ?? []);
  latency(stats.series ?? []);
  stages(stats.latency ?? {});
  served(stats.served ?? {});
  counts(stats.events ?? {});
  byId("state").textContent = t("ops.state.note", stats.state ?? {});
  put(stats.versions ?? []);
  document.documentElement.dataset.ready = "true";
}

/** Draws the versions only when they changed, so that a button does not vanish under a finger. */
function put(list) {
  const now = JSON.stringify([list, document.documentElement.lang]);
  if (now === table) return;
  table = now;
  byId("versions").replaceChildren(list.length ? versions(list, put) : none());
  byId("report").replaceChildren(report(list));
}

function tiles(stats) {
  const { p50, p99, count } = stats.latency?.total ?? {};
  const measured = (value) => (count ? ms(value) : "–");
  const told = [
    ["ops.rate", number(stats.rate, 1), t("ops.rate.note")],
    ["ops.p50", measured(p50), t("ops.latency.note")],
    ["ops.p99", measured(p99), t("ops.latency.note")],
    [
      "ops.errors",
      number(stats.errors),
      t("ops.errors.note", { n: stats.requests }),
      stats.errors > 0,
    ],
    ["ops.memory", t("ops.mb", { n: number(stats.memory_mb) }), t("ops.memory.note")],
    ["ops.uptime", lasting(stats.uptime), t("ops.uptime.note")],
  ];
  const tile = ([key, value, note, bad]) =>
    el(
      "div",
      { class: "tile" },
      el("dt", { text: t(key) }),
      el("dd", { class: bad ? "value bad" : "value", text: value }),
      el("dd", { class: "soft small", text: note }),
    );
  byId("tiles").replaceChildren(...told.map(tile));
}

/** Seconds in the two largest units that say something. */
function lasting(seconds) {
  const units = [
    ["day", 86400],
    ["hour", 3600],
    ["minute", 60],
    ["second", 1],
  ];
  const first = Math.max(
    0,
    units.findIndex(([, size]) => seconds >= size),
  );
  const lang = document.documentElement.lang;
  let left = Math.max(0, seconds);
  const words = units
    .slice(seconds < 1 ? 3 : first, seconds < 1 ? 4 : first + 2)
    .map(([unit, size]) => {
      const n = Math.floor(left / size);
      left -= n * size;
      return new Intl.NumberFormat(lang, { style: "unit", unit, unitDisplay: "narrow" }).format(n);
    });
  return words.join(" ");
}

const ends = (series) => [
  moment(series[0].time * 1000, CLOCK),
  moment(series.at(-1).time * 1000, CLOCK),
];

function traffic(series) {
  const all = series.reduce((sum, step) => sum + step.requests, 0);
  if (!all) return byId("traffic").replaceChildren(none());
  const errors = series.reduce((sum, step) => sum + step.errors, 0);
  const max = Math.max(...series.map((step) => step.requests));
  const stacks = series.map((step) => [
    [step.requests - step.errors, "fill one"],
    [step.errors, "fill two"],
  ]);
  return byId("traffic").replaceChildren(
    columns(stacks, {
      label: t("ops.traffic.label", { n: all, e: errors, max }),
      shown: (value) => number(value, 1),
      feet: ends(series),
    }),
  );
}

function latency(series) {
  const measured = series.filter((step) => step.p50 != null);
  if (!measured.length) return byId("latency").replaceChildren(none());
  const now = measured.at(-1);
  const told = [
    { kind: "two", values: series.map((step) => step.p99) },
    { kind: "one", values: series.map((step) => step.p50) },
  ];
  const key = (kind, name, value) =>
    el(
      "li",
      {},
      el("span", { class: `dot ${kind}` }),
      el("span", { text: t(name) }),
      el("strong", { text: ms(value) }),
    );
  return byId("latency").replaceChildren(
    linesOver(told, {
      label: t("ops.latency.label", { p50: ms(now.p50), p99: ms(now.p99) }),
      shown: ms,
      feet: ends(series),
    }),
    el("ul", { class: "legend" }, key("one", "ops.p50", now.p50), key("two", "ops.p99", now.p99)),
  );
}

function stages(told) {
  const known = [...STAGES, ...Object.keys(told).filter((stage) => !STAGES.includes(stage))].filter(
    (stage) => told[stage]?.count,
  );
  if (!known.length) return byId("stages").replaceChildren(none());
  const most = ceiling(Math.max(...known.map((stage) => told[stage].p90)));
  const cells = (stage) =>
    ["p50", "p90", "p99"].map((key) => el("td", { class: "figures", text: ms(told[stage][key]) }));
  const row = (stage) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", text: has(`stage.${stage}`) ? t(`stage.${stage}`) : stage }),
      el("td", { class: "bar-cell" }, bar(told[stage].p50, 0, most)),
      cells(stage),
    );
  const head = [t("ops.stages.stage"), "", "p50", "p90", "p99"].map((text) =>
    text ? el("th", { scope: "col", text }) : el("td", { class: "bar-cell" }),
  );
  return byId("stages").replaceChildren(
    el(
      "div",
      { class: "wide-table", tabindex: "0", role: "region", "aria-label": t("ops.stages") },
      el(
        "table",
        { class: "table stages" },
        el("thead", {}, el("tr", {}, head)),
        el("tbody", {}, known.map(row)),
      ),
    ),
  );
}

function served(told) {
  const fact = (key, value, note) =>
    el(
      "div",
      {},
      el("dt", { text: t(key) }),
      el("dd", { class: "value", text: value }),
      el("dd", { class: "soft small", text: note }),
    );
  const any = told.lists > 0;
  byId("coverage").replaceChildren(
    fact(
      "ops.coverage",
      any ? percent(told.coverage, 1) : "–",
      t("ops.coverage.note", { shown: told.distinct_items ?? 0, all: told.catalog ?? 0 }),
    ),
    fact(
      "ops.diversity",
      any && told.diversity != null ? number(told.diversity, 3) : "–",
      t("ops.diversity.note"),
    ),
    fact("ops.lists", number(told.lists ?? 0), t("ops.lists.note")),
  );
  const deciles = told.popularity_deciles ?? [];
  const shown = (value) => percent(value, value < 0.1 ? 1 : 0);
  const label = () =>
    t("ops.deciles.label", { first: percent(deciles[0], 1), last: percent(deciles.at(-1), 1) });
  byId("deciles").replaceChildren(
    any && deciles.length
      ? columns(
          deciles.map((value) => [[value, "fill four"]]),
          {
            label: label(),
            shown,
            feet: [t("ops.deciles.first"), t("ops.deciles.last")],
            least: 0.01,
            gap: 10,
          },
        )
      : none(),
  );
  const found = Object.entries(told.sources ?? {})
    .filter(([, n]) => n)
    .sort((one, two) => two[1] - one[1]);
  const parts = found.map(([source, n], i) => [
    has(`source.${source}`) ? t(`source.${source}`) : source,
    n,
    `fill ${COLOURS[i % COLOURS.length]}`,
  ]);
  byId("sources").replaceChildren(
    ...(parts.length ? shares(parts, t("ops.sources"), (share) => percent(share, 1)) : [none()]),
  );
}

function counts(events) {
  const found = Object.entries(events)
    .filter(([, n]) => n)
    .sort((one, two) => two[1] - one[1]);
  const most = Math.max(1, ...found.map(([, n]) => n));
  const name = (event) =>
    has(`event.${event}`) ? t(`event.${event}`, { value: "" }).trim() : event;
  const row = ([event, n]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", text: name(event) }),
      el("td", { class: "bar-cell" }, bar(n, 0, most)),
      el("td", { class: "figure-cell", text: number(n) }),
    );
  byId("events").replaceChildren(
    found.length
      ? el(
          "table",
          { class: "bars", "aria-label": t("ops.events") },
          el("tbody", {}, found.map(row)),
        )
      : none(),
  );
}

function pause() {
  running = !running;
  words();
  if (running) beat();
}

const words = () => (byId("pause").textContent = t(running ? "ops.pause" : "ops.resume"));

async function start() {
  await loadTexts();
  const redraw = banner("gone.text.operate");
  header(() => {
    redraw();
    words();
    if (last) draw(last);
  });
  words();
  byId("pause").addEventListener("click", pause);
  connection.addEventListener("back", beat);
  connection.watch();
  document.addEventListener("visibilitychange", () => document.hidden || beat());
  await beat();
}

start();
