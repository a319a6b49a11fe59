/* Versions: which versions of the bundle answer whom, and how an operator changes that. */

import { api } from "./api.js";
import { bar } from "./bars.js";
import { confirmed } from "./dialogs.js";
import { el } from "./dom.js";
import { complain, say } from "./notices.js";
import { moment, number, percent, t } from "./texts.js";

const FIXED = ["failed", "loading"];

/** The list of versions, newest first; `changed(versions)` is called after each change. */
export function versions(list, changed) {
  const ordered = [...list].sort((one, two) =>
    two.version.localeCompare(one.version, "en", { numeric: true }),
  );
  const active = ordered.filter((one) => one.state === "active");
  return el(
    "ul",
    { class: "versions" },
    ordered.map((one) => row(one, active, changed)),
  );
}

function row(one, active, changed) {
  const { version, state, share, created, error } = one;
  const whole = state === "active" && share >= 1;
  // Back is towards a version that is older than the one which answers now.
  const older = active.some(
    (other) => other.version.localeCompare(version, "en", { numeric: true }) > 0,
  );
  const able = !FIXED.includes(state);
  const key = older ? "ops.rollback" : "ops.activate";
  const button = (what, click, kind = "") =>
    el("button", {
      type: "button",
      class: `button ${kind}`,
      "aria-label": t(`${what}.of`, { version }),
      "data-act": what,
      "data-version": version,
      text: t(what),
      on: { click },
    });
  const buttons = able
    ? [
        !whole && button(key, () => all(one, key, changed), older ? "" : "main"),
        (active.length > 1 || !whole) && button("ops.share", () => some(one, changed)),
      ]
    : [];
  return el(
    "li",
    { class: "version", "data-version": version },
    el(
      "div",
      { class: "version-name" },
      el("strong", { text: `${t("ops.version")} ${version}` }),
      el("span", {
        class: "soft small",
        text: created ? t("ops.version.created", { time: moment(created) }) : "",
      }),
    ),
    el(
      "div",
      {},
      el("span", { class: `state ${state}`, text: t(`ops.state.${state}`) }),
      error && el("p", { class: "bad small", text: error }),
    ),
    el(
      "div",
      { class: "version-share" },
      bar(share ?? 0, 0, 1),
      el(
        "span",
        { class: "figures" },
        el("span", { class: "visually-hidden", text: `${t("ops.version.share")}: ` }),
        percent(share ?? 0),
      ),
    ),
    el("div", { class: "row-actions" }, buttons.filter(Boolean)),
  );
}

async function all({ version }, key, changed) {
  const told = {
    heading: t(`${key}.heading`, { version }),
    text: t(`${key}.text`, { version }),
    yes: t(key),
  };
  if (await confirmed(told)) await put(version, {}, changed);
}

async function some({ version, share }, changed) {
  const input = el("input", {
    type: "number",
    id: "share",
    class: "field",
    min: 1,
    max: 100,
    step: 1,
    value: Math.round((share || 0.1) * 100),
  });
  const label = el("label", { for: "share", class: "label", text: t("ops.share.label") });
  const told = {
    heading: t("ops.share.heading", { version }),
    text: t("ops.share.text", { version }),
    yes: t("ops.share"),
    more: [el("div", { class: "stack" }, label, input)],
  };
  if (!(await confirmed(told))) return;
  const wanted = Math.min(100, Math.max(1, Number(input.value) || 1));
  await put(version, { share: wanted / 100 }, changed);
}

async function put(version, body, changed) {
  try {
    const { versions: list } = await api.activate(version, body);
    const now = list.find((one) => one.version === version);
    say(t("ops.done", { version, share: percent(now?.share ?? 0) }));
    changed(list);
  } catch (error) {
    complain(error);
  }
}

/** The metrics of all versions side by side. */
export function report(list) {
  const told = list
    .map((one) => [one.version, flat(one.metrics ?? {})])
    .filter(([, metrics]) => metrics.size);
  if (!told.length) return el("p", { class: "soft", text: t("ops.report.none") });
  if (told.length === 1) return alone(told[0][1]);
  const names = [...new Set(told.flatMap(([, metrics]) => [...metrics.keys()]))];
  const head = [
    el("th", { scope: "col", text: t("ops.report.metric") }),
    ...told.map(([version]) =>
      el("th", { scope: "col", class: "figures", text: `${t("ops.version")} ${version}` }),
    ),
  ];
  const rows = names.map((name) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", text: name }),
      told.map(([, metrics]) => el("td", { class: "figures", text: cell(metrics.get(name)) })),
    ),
  );
  return el(
    "div",
    { class: "wide-table", tabindex: "0", role: "region", "aria-label": t("ops.report") },
    el("table", { class: "table" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)),
  );
}

/** Of one version there is nothing to compare: figures instead of a table. */
function alone(metrics) {
  const entry = ([name, value]) =>
    el("div", {}, el("dt", { text: name }), el("dd", { class: "figures", text: cell(value) }));
  return el("dl", { class: "metrics" }, [...metrics].map(entry));
}

/** Metrics in metrics by their paths: {a: {b: 1}} has "a b". */
function flat(tree, path = "", out = new Map()) {
  for (const [key, value] of Object.entries(tree)) {
    const name = path ? `${path} › ${key}` : key;
    if (value !== null && typeof value === "object") flat(value, name, out);
    else out.set(name, value);
  }
  return out;
}

const cell = (value) =>
  typeof value === "number" ? number(value, Math.abs(value) < 10 ? 4 : 1) : String(value ?? "–");
