/* Changes: what became of the lists since they were last shown, as marks on cards and as a sentence. */

import { el } from "./dom.js";
import { icon } from "./icons.js";
import { t } from "./texts.js";
import { named } from "./titles.js";

/**
 * What one list became.
 *
 * A card that only closed a gap has not moved: places are compared among those that stayed.
 */
export function compared(before, after) {
  const was = new Set(before);
  const is = new Set(after);
  const stayed = before.filter((id) => is.has(id));
  const place = new Map(stayed.map((id, i) => [id, i]));
  const marks = new Map();
  after
    .filter((id) => was.has(id))
    .forEach((id, i) => {
      const by = place.get(id) - i;
      if (by) marks.set(id, { kind: by > 0 ? "up" : "down", by: Math.abs(by) });
    });
  for (const id of after) if (!was.has(id)) marks.set(id, { kind: "new" });
  return { marks, gone: before.filter((id) => !is.has(id)) };
}

/**
 * Counts over the shelves that stayed, as the marks on their cards show them, and of new shelves.
 *
 * Map of shelf -> ids, before and after. A title that is marked on two shelves counts once.
 */
export function counted(before, after) {
  const found = { new: new Set(), up: new Set(), down: new Set(), gone: new Set() };
  const shown = new Set([...after.values()].flat());
  let shelf = 0;
  for (const [key, list] of after) {
    if (!before.has(key)) shelf += 1;
    else {
      const { marks, gone } = compared(before.get(key), list);
      for (const [id, mark] of marks) found[mark.kind].add(id);
      for (const id of gone) if (!shown.has(id)) found.gone.add(id);
    }
  }
  return {
    shelf,
    ...Object.fromEntries(Object.entries(found).map(([kind, ids]) => [kind, ids.size])),
  };
}

/** Why the lists changed, in words; `cause` is an event, or what else was done. */
function why({ kind, title, value }) {
  return t(`change.because.${kind}`, { title: title ? named(title).name : "", value });
}

const KINDS = ["new", "shelf", "up", "down", "gone"];
const SYMBOLS = { new: "spark", shelf: "shelves", up: "up", down: "down", gone: "close" };

/** "3 titles are new because you liked Alien.", and the rest: "2 moved up, 1 is gone." */
export function sentences(counts, cause) {
  const [first, ...rest] = KINDS.filter((kind) => counts[kind]);
  const told = (kind) => t(`change.${kind}`, { n: counts[kind] });
  const lead = t("change.sentence", {
    what: first ? told(first) : t("change.none"),
    why: why(cause),
  });
  return {
    lead,
    rest,
    heard: rest.length
      ? `${lead} ${t("change.rest", { what: rest.map(told).join(t("change.list")) })}`
      : lead,
  };
}

/** The rest, as signs with words. */
export function figures(counts, kinds) {
  return kinds.map((kind) =>
    el(
      "span",
      { class: `figure ${kind}` },
      icon(SYMBOLS[kind]),
      t(`change.${kind}`, { n: counts[kind] }),
    ),
  );
}
