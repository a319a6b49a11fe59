/* Chance: numbers that look drawn and follow from a text, the same on every machine. */

/** A text -> an integer of 32 bits (FNV-1a, its bits mixed once more). */
export function hash(text) {
  let h = 0x811c9dc5;
  for (const unit of new TextEncoder().encode(text)) h = Math.imul(h ^ unit, 0x01000193);
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

/** A source of numbers in [0, 1), with some that are drawn from a range or a list (mulberry32). */
export class Chance {
  constructor(text) {
    this.state = hash(text);
  }

  next() {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let t = this.state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  }

  between(low, high) {
    return low + (high - low) * this.next();
  }

  whole(low, high) {
    return Math.floor(this.between(low, high + 1));
  }

  one(list) {
    return list[Math.floor(this.next() * list.length)];
  }

  shuffled(list) {
    const out = [...list];
    for (let i = out.length - 1; i > 0; i--) {
      const j = this.whole(0, i);
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  }
}
