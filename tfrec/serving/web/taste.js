/* Taste: what this visitor said about items, so that every card can show it. */

export class Taste {
  #known = new Map();

  constructor(events = []) {
    for (const event of events) this.learn(event);
  }

  /** Takes an event in; gives back what was known of its item before. */
  learn({ item_id, event, value }) {
    const before = this.of(item_id);
    const changes = { like: { liked: true, hidden: false }, hide: { hidden: true, liked: false }, dislike: { liked: false }, rating: { rating: value, hidden: false } };
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
