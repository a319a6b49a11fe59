/* Taste: what this visitor said about items, so that every card can show it. */

export class Taste {
  #known = new Map();
  #fond = new Set();

  /** `earlier`: what the bundle knows of him; it has no likes as the page has them, but ratings. */
  constructor(events = [], earlier = []) {
    for (const event of [...earlier, ...events]) if (welcome(event)) this.#fond.add(event.item_id);
    for (const event of events) this.learn(event);
  }

  /** Whether he said of an item that he likes it; he may have met it and said nothing. */
  likes(itemId) {
    return this.#fond.has(itemId);
  }

  /** Takes an event in; gives back what was known of its item before. */
  learn({ item_id, event, value }) {
    const before = this.of(item_id);
    if (welcome({ event, value })) this.#fond.add(item_id);
    const changes = {
      like: { liked: true, hidden: false },
      hide: { hidden: true, liked: false },
      dislike: { liked: false },
      rating: { rating: value, hidden: false },
    };
    if (changes[event]) this.#known.set(item_id, { ...before, ...changes[event] });
    return before;
  }

  /** Puts back what :learn: gave. */
  restore(itemId, before) {
    this.#known.set(itemId, before);
  }

  of(itemId) {
    return this.#known.get(itemId) ?? {};
  }

  /** Items that must not be shown, also while the service has yet to hear of it. */
  shown(items) {
    return items.filter((item) => !this.of(item.item_id).hidden);
  }
}

const welcome = ({ event, value }) =>
  ["like", "purchase"].includes(event) || (["rating", "interaction"].includes(event) && value > 3);
