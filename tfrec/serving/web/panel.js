/* Panel: how one recommendation came to be, from the service's own account of it. */

import { actions } from "./cards.js";
import { api } from "./api.js";
import { bar, bars } from "./bars.js";
import { cover } from "./covers.js";
import { open } from "./dialogs.js";
import { el } from "./dom.js";
import { complain } from "./notices.js";
import { has, number, percent, t } from "./texts.js";
import { meta, named, titled } from "./titles.js";

/**
 * Opens the panel of a card.
 *
 * `seen`: the item, its place and shelf, model version and request id of the answer it came with.
 * `page`: its taste, what to do on an action, and how to open another item.
 */
export function panel(seen, page) {
  const { item } = seen;
  const { dialog, body, title } = open({ heading: named(item.title).name, kind: "drawer" });
  title.focus();
  const act = (...told) => {
    dialog.close();
    page.act(...told);
  };
  const text = el("p", { class: "panel-text" });
  const head = el(
    "div",
    { class: "panel-head" },
    cover(item),
    el(
      "div",
      { class: "panel-about" },
      el(
        "p",
        { class: "tags" },
        meta(item, 8).map((word) => el("span", { class: "tag", text: word })),
      ),
      text,
    ),
    actions(item, page.taste, act, { wide: true }),
  );
  const similar = el("ul", { class: "minis" });
  body.replaceChildren(head, account(seen), section("why.similar", similar));
  describe(item, text);
  alike(item, similar, page, dialog);
}

const section = (key, ...content) =>
  el("section", { class: "panel-part" }, el("h3", { text: t(key) }), content);

function account(seen) {
  const { item } = seen;
  const told = item.explanation;
  return el(
    "div",
    { class: "stack" },
    section(
      "why.heading",
      el("p", { class: "lead", text: reason(item, seen.shelf) }),
      sources(item, told),
    ),
    told ? section("why.nearest", nearest(told.because ?? [])) : null,
    section("why.parts", parts(item)),
    told?.rank_before ? section("why.rank", el("p", { text: order(told, seen) })) : null,
    section("why.facts", facts(seen)),
  );
}

/** In a sentence: first what the shelf itself says, then what the service says of the item. */
function reason(item, shelf) {
  const { key, about } = shelf;
  if (item.source === "exploration") return t("why.exploration");
  if (about) return t("why.about", { title: named(about.title).name });
  if (key === "popular" || key === "search") return t(`why.${key}`);
  const told = [item.explanation?.sentence_key, item.source].find((one) => has(`why.${one}`));
  return t(told ? `why.${told}` : "why.unknown");
}

const name = (kind, key) => (has(`${kind}.${key}`) ? t(`${kind}.${key}`) : key);

function sources(item, told) {
  const found = [...new Set([...(told?.sources ?? []), item.source])];
  return el(
    "p",
    { class: "tags" },
    el("span", { class: "soft", text: t("why.sources") }),
    found.map((source) =>
      el("span", { class: `tag source ${source}`, text: name("source", source) }),
    ),
  );
}

function nearest(because) {
  if (!because.length) return el("p", { class: "soft", text: t("why.nearest.none") });
  const row = ({ item_id, title, similarity }) => {
    const slot = el("span", { class: "near-cover" });
    api.item(item_id).then(
      (item) => slot.replaceChildren(cover(item, { bare: true })),
      () => {},
    );
    const { name: words, year } = named(title);
    return el(
      "li",
      { class: "near" },
      slot,
      el(
        "div",
        {},
        el(
          "p",
          { class: "near-title" },
          words,
          year && el("span", { class: "soft", text: ` ${year}` }),
        ),
        bar(Math.max(0, similarity), 0, 1),
        el("p", {
          class: "soft small",
          text: t("why.similarity", { percent: number(similarity * 100) }),
        }),
      ),
    );
  };
  return el("ul", { class: "nears" }, because.map(row));
}

function parts(item) {
  const pairs = Object.entries(item.parts ?? {}).sort(
    (one, two) => Math.abs(two[1]) - Math.abs(one[1]),
  );
  const total = el(
    "p",
    { class: "total" },
    el("span", { text: t("why.score") }),
    el("strong", { text: number(item.score, 3, 3) }),
  );
  if (!pairs.length) return [total];
  const sum = pairs.reduce((all, [, value]) => all + value, 0);
  const apart = Math.abs(sum - item.score) > 0.002 * Math.max(1, Math.abs(item.score));
  const table = bars(
    pairs.map(([key, value]) => [name("part", key), value]),
    t("why.parts"),
    (value) => number(value, 3, 3),
  );
  return [
    total,
    table,
    apart
      ? el("p", { class: "soft small", text: t("why.parts.before", { sum: number(sum, 3, 3) }) })
      : null,
  ].filter(Boolean);
}

function order({ rank_before: before, moved }, { place }) {
  const told = { before, now: place, step: moved ? name("step", moved) : "" };
  if (!place) return t(moved ? "why.rank.step" : "why.rank.kept", told);
  return t(moved ? "why.rank.moved" : "why.rank.same", told);
}

function facts({ item, version, request }) {
  const row = (key, value, note = "") => [
    el("dt", { text: t(key) }),
    el("dd", {}, value, note && el("span", { class: "soft", text: ` ${note}` })),
  ];
  const chance = item.propensity == null ? t("why.unknown") : percent(item.propensity, 1);
  return el(
    "dl",
    { class: "facts" },
    row("why.version", version),
    row("why.propensity", chance, item.propensity == null ? "" : t("why.propensity.note")),
    row("why.id", item.item_id),
    request ? row("why.request", request) : [],
  );
}

/** Whether a text says anything beside title and attributes. */
function more(text, item) {
  const known = [item.title, ...Object.values(item.attributes ?? {}).flat()].sort(
    (one, two) => two.length - one.length,
  );
  return /[\p{L}\p{N}]{2}/u.test(
    known.reduce((rest, word) => rest.replaceAll(word, ""), text ?? ""),
  );
}

/** The item's own text, where it says more than title and attributes. */
async function describe(item, slot) {
  try {
    const { text } = await api.item(item.item_id);
    slot.textContent = more(text, item) ? text : "";
  } catch (error) {
    complain(error);
  }
}

async function alike(item, list, page, dialog) {
  try {
    const answer = await api.similar(item.item_id, { k: 8, user_id: page.user });
    const other = (found) => {
      const { name: words } = named(found.title);
      const next = () => {
        dialog.close();
        panel(
          {
            item: found,
            shelf: { key: "similar", about: item },
            version: answer.model_version,
            request: answer.request_id,
          },
          page,
        );
      };
      return el(
        "li",
        {},
        el(
          "button",
          {
            type: "button",
            class: "mini",
            on: { click: next },
            "aria-label": t("card.open", { title: words }),
          },
          cover(found),
          el("span", { class: "mini-title", text: words }),
        ),
      );
    };
    const items = page.taste.shown(titled(answer.items));
    list.replaceChildren(...items.map(other));
    if (!items.length) list.replaceWith(el("p", { class: "soft", text: t("why.similar.none") }));
  } catch (error) {
    complain(error);
  }
}
