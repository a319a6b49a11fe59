/* Shelves: rows of cards that keep their elements, so that a change is seen as movement. */

import { Card } from "./cards.js";
import { el, still } from "./dom.js";
import { icon } from "./icons.js";
import { t } from "./texts.js";
import { named } from "./titles.js";

const MOVE = { duration: 420, easing: "cubic-bezier(.2,.8,.2,1)" };

/** One shelf's name among all: there may be two about liked items. */
export const keyOf = (shelf) => `${shelf.key}:${shelf.about?.item_id ?? ""}`;

export class Shelf {
  constructor(shelf, taste, on, { grid = false } = {}) {
    Object.assign(this, { key: keyOf(shelf), taste, on, grid });
    this.cards = new Map();
    this.list = el("ul", { class: grid ? "grid" : "row" });
    this.badge = el("span", { class: "shelf-badge", hidden: true });
    this.root = el("section", { class: "shelf", "data-shelf": shelf.key });
    this.told = shelf;
    this.title();
  }

  /** The heading; again when the language changes. */
  title() {
    const id = `shelf-${this.key}`;
    const name = this.name();
    const about = ["for_you", "new_to_you", "popular"].includes(this.told.key)
      ? t(`shelf.${this.told.key}.about`)
      : "";
    const head = el(
      "div",
      { class: "shelf-head" },
      el(this.grid ? "h1" : "h2", { id }, name, this.badge),
      el("p", { class: "soft", text: about }),
    );
    this.list.setAttribute("aria-labelledby", id);
    this.root.setAttribute("aria-labelledby", id);
    if (!this.grid) head.append(this.arrows(name));
    this.root.replaceChildren(head, this.list);
  }

  name() {
    const { key, about } = this.told;
    if (key === "because")
      return t(this.taste.likes(about.item_id) ? "shelf.because" : "shelf.because_chosen", {
        title: named(about.title).name,
      });
    return this.told.name ?? t(`shelf.${key}`);
  }

  arrows(name) {
    const go = (way) => () =>
      this.list.scrollBy({
        left: way * this.list.clientWidth * 0.85,
        behavior: still() ? "auto" : "smooth",
      });
    const arrow = (key, symbol, way) =>
      el(
        "button",
        {
          type: "button",
          class: "round",
          "aria-label": t(key, { shelf: name }),
          on: { click: go(way) },
        },
        icon(symbol),
      );
    this.ways = [arrow("shelf.back", "left", -1), arrow("shelf.on", "right", 1)];
    this.list.addEventListener("scroll", () => this.reach(), { passive: true });
    return el("div", { class: "arrows" }, this.ways);
  }

  /** An arrow that leads nowhere is not offered. */
  reach() {
    if (!this.ways) return;
    const { scrollLeft, scrollWidth, clientWidth } = this.list;
    this.ways[0].disabled = scrollLeft < 8;
    this.ways[1].disabled = scrollLeft + clientWidth > scrollWidth - 8;
  }

  ids() {
    return [...this.cards.keys()];
  }

  /** Shows these items in this order; cards that stay are the same elements. */
  show(items) {
    const cards = new Map();
    const left = this.list.scrollLeft;
    for (const item of items) {
      const card = this.cards.get(item.item_id) ?? new Card(item, this.taste, this.on(this));
      card.taste = this.taste;
      card.refresh(item);
      card.tell();
      cards.set(item.item_id, card);
    }
    for (const [id, card] of this.cards) if (!cards.has(id)) card.root.remove();
    [...cards.values()].forEach(
      (card, i) =>
        this.list.children[i] !== card.root &&
        this.list.insertBefore(card.root, this.list.children[i] ?? null),
    );
    this.cards = cards;
    // A browser follows the card that was in front to wherever it went; a reader did not ask for it.
    this.list.scrollLeft = left;
    requestAnimationFrame(() => this.reach());
  }

  /** Again in the language that was chosen. */
  redraw() {
    this.title();
    for (const card of this.cards.values()) card.draw();
    this.reach();
  }

  places() {
    return new Map([...this.cards].map(([id, card]) => [id, card.root.getBoundingClientRect()]));
  }

  /** Fades cards out before they leave. */
  async leave(ids) {
    const fades = ids
      .map((id) => this.cards.get(id)?.root)
      .filter(Boolean)
      .map(
        (root) =>
          root.animate(
            { opacity: [1, 0], scale: [1, 0.94] },
            { duration: still() ? 1 : 180, fill: "forwards" },
          ).finished,
      );
    await Promise.allSettled(fades);
  }

  /** Lets cards glide from where they were, and new ones rise. */
  glide(before) {
    if (still()) return;
    const shift = (root, x, y) => root.animate({ translate: [`${x}px ${y}px`, "0 0"] }, MOVE);
    for (const [id, card] of this.cards) {
      const was = before?.get(id);
      const is = card.root.getBoundingClientRect();
      if (!was)
        card.root.animate(
          { opacity: [0, 1], translate: ["0 14px", "0 0"] },
          { ...MOVE, duration: 520 },
        );
      else if (was.left !== is.left || was.top !== is.top)
        shift(card.root, was.left - is.left, was.top - is.top);
    }
  }
}

/** Grey cards while the first answer is on its way. */
export function skeleton(rows = 3) {
  const card = () =>
    el(
      "li",
      { class: "card ghost" },
      el("span", { class: "ghost-cover" }),
      el("span", { class: "ghost-line" }),
      el("span", { class: "ghost-line short" }),
    );
  const row = () =>
    el(
      "section",
      { class: "shelf", "aria-hidden": "true" },
      el("span", { class: "ghost-line title" }),
      el("ul", { class: "row" }, Array.from({ length: 9 }, card)),
    );
  return Array.from({ length: rows }, row);
}
