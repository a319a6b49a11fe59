/* Store: what this browser keeps over a reload. Where it may keep nothing, the page works without. */

const at = (name) => `tfrec.${name}`;

export function kept(name, otherwise = null, where = localStorage) {
  try {
    return JSON.parse(where.getItem(at(name))) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps plain values; null: forgets the name. */
export function keep(name, value, where = localStorage) {
  try {
    if (value === null) where.removeItem(at(name));
    else where.setItem(at(name), JSON.stringify(value));
  } catch {
    // A private window or a full store: the value lives as long as the page.
  }
}

/** An id that nobody else has. */
export function drawnId(prefix) {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return prefix + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
