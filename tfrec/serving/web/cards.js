/* Cards: one recommended item: its cover, what it is, and what a visitor can say about it. */

import { cover } from "./covers.js";
import { el, set } from "./dom.js";
import { icon } from "./icons.js";
import { rate } from "./rating.js";
import { t } from "./texts.js";
import { meta, named } from "./titles.js";

/** A list entry; `on` holds `open(item)` and `act(item, event, value)`. */
export class Card {
  constructor(item, taste, on) {
    Object.assign(this, { item, taste, on });
    this.root = el("li", { class: "card", "data-item": item.item_id });
    this.draw();
  }

  /** What the service says of the item now: its score and reasons may have changed. */
  refresh(item) {
    this.item = item;
  }

  draw() {
    const { name } = named(this.item.title);
    const open = el(
      "button",
      {
        type: "button",
        class: "card-open",
        "aria-label": t("card.open", { title: name }),
        on: { click: () => this.on.open(this) },
      },
      cover(this.item),
      el("span", { class: "card-mark", hidden: true }),
    );
    const title = el("p", { class: "card-title", text: name, title: name });
    const facts = el("p", { class: "card-meta", text: meta(this.item).join(" · ") });
    this.actions = actions(this.item, this.taste, this.on.act);
    this.root.replaceChildren(open, title, facts, this.actions);
  }

  /** Shows on the buttons what is known of the visitor's taste. */
  tell() {
    const fresh = actions(this.item, this.taste, this.on.act);
    const place = [...this.actions.children].indexOf(document.activeElement);
    this.actions.replaceWith(fresh);
    this.actions = fresh;
    if (place >= 0) fresh.children[place].focus();
  }

  /** Marks what the last change did to this card; null: nothing. */
  mark(what) {
    const badge = this.root.querySelector(".card-mark");
    badge.hidden = !what;
    badge.className = `card-mark ${what?.kind ?? ""}`;
    if (!what) return badge.replaceChildren();
    const seen = what.kind === "new" ? [t("card.new")] : [icon(what.kind), String(what.by)];
    const heard = what.kind === "new" ? t("card.new") : t(`card.${what.kind}`, { n: what.by });
    badge.replaceChildren(...seen);
    const open = this.root.querySelector(".card-open");
    set(open, "aria-label", `${t("card.open", { title: named(this.item.title).name })} (${heard})`);
    return undefined;
  }
}

/** Like, not for me, rate: the same on a card and in the panel. */
export function actions(item, taste, act, { wide = false } = {}) {
  const { name } = named(item.title);
  const { liked, hidden, rating } = taste.of(item.item_id);
  const button = (label, symbol, word, told, click) =>
    el(
      "button",
      {
        type: "button",
        class: wide ? "button" : "round",
        "aria-label": label,
        title: wide ? null : word,
        on: { click },
        ...told,
      },
      icon(symbol),
      wide ? el("span", { text: word }) : null,
    );
  const rated = rating
    ? t("card.rated.of", { title: name, value: rating })
    : t("card.rate.of", { title: name });
  const star = button(
    rated,
    "star",
    t("card.rate"),
    { class: `${wide ? "button" : "round"} rate ${rating ? "on" : ""}`, "aria-haspopup": "true" },
    () => rate(star, item, rating, act),
  );
  if (rating) star.append(el("span", { class: "rate-value", text: String(rating) }));
  return el(
    "div",
    { class: wide ? "actions wide" : "actions" },
    button(
      t(liked ? "card.liked.of" : "card.like.of", { title: name }),
      "heart",
      t("card.like"),
      { "aria-pressed": String(Boolean(liked)), "data-act": "like" },
      () => act(item, "like"),
    ),
    button(
      t("card.hide.of", { title: name }),
      "hide",
      t("card.hide"),
      { "aria-pressed": String(Boolean(hidden)), "data-act": "hide" },
      () => act(item, "hide"),
    ),
    star,
  );
}
