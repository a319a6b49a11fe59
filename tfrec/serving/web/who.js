/* Who: a visitor says who he is: in his own words, or as one of the users that the service knows. */

import { api } from "./api.js";
import { open } from "./dialogs.js";
import { byId, el, paused } from "./dom.js";
import { icon } from "./icons.js";
import { complain } from "./notices.js";
import { person } from "./person.js";
import { drawnId, keep, kept } from "./store.js";
import { t } from "./texts.js";

const MOST = 50;
const WORDS = 12;

/** The visitor as kept; a new one has an id drawn at random, and has said nothing yet. */
export function visitor() {
  return (
    kept("visitor") ??
    become({ kind: "self", user_id: drawnId("visitor-"), profile: "", said: false })
  );
}

/** Keeps who is here. Somebody's own id comes back after having looked at another user's lists. */
export function become(who) {
  keep("visitor", who);
  if (who.kind === "self") keep("self", who);
  return who;
}

/** A person in his own words; the id stays the same, so that his history does. */
export function described(profile) {
  const self = kept("self") ?? { kind: "self", user_id: drawnId("visitor-") };
  return become({ ...self, profile, said: true });
}

/** Where a visitor says who he is; `chosen(visitor)` is called when he has. */
export function asking(catalog, chosen, { heading = true } = {}) {
  const said = kept("self")?.profile ?? "";
  const words = catalog.text
    ? inWords(catalog, said, chosen)
    : el("p", { class: "soft", text: t("who.words.none") });
  const head =
    heading &&
    el(
      "div",
      { class: "hero-head" },
      el("h1", { text: t("who.heading") }),
      el("p", { class: "lead", text: t("who.lead") }),
      el("p", { class: "soft", text: t("who.items", { n: catalog.items }) }),
      el("div", { class: "fan" }),
    );
  return el(
    "div",
    { class: "asking" },
    head,
    el("section", { class: "choice" }, el("h2", {}, icon("pen"), t("who.words")), words),
    el(
      "section",
      { class: "choice" },
      el("h2", {}, icon("people"), t("who.pick")),
      el("p", { class: "soft", text: t("who.pick.hint") }),
      sample(chosen),
    ),
  );
}

function inWords(catalog, said, chosen) {
  const input = el("textarea", {
    id: "words",
    class: "field",
    rows: 4,
    maxlength: 2000,
    placeholder: t("who.words.hint"),
  });
  const bad = el("p", { class: "bad", id: "words-bad", role: "alert" });
  // What was typed already stays when the language changes.
  input.value = byId("words")?.value ?? said;
  const add = (word) => () => {
    const before = input.value.trimEnd();
    input.value = before ? `${before}${/[,.;:!?，。]$/.test(before) ? "" : ","} ${word}` : word;
    input.focus();
  };
  const chips = examples(catalog).map((word) =>
    el("button", { type: "button", class: "chip", text: word, on: { click: add(word) } }),
  );
  const form = el(
    "form",
    { class: "stack", novalidate: true },
    el("label", { for: "words", class: "visually-hidden", text: t("who.words.label") }),
    input,
    bad,
    chips.length
      ? el("div", { class: "chips", role: "group", "aria-label": t("who.words.add") }, chips)
      : null,
    el("button", { class: "button main", text: t("who.words.show") }),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const profile = input.value.trim();
    bad.textContent = profile ? "" : t("who.words.empty");
    if (profile) chosen(described(profile));
    else input.focus();
  });
  return form;
}

/** Words of the catalog itself, from the attribute that sorts it into the fewest kinds. */
function examples({ attributes }) {
  const kinds = Object.values(attributes ?? {})
    .map((values) => values.filter((v) => v && v !== "unknown" && !/^\d+$/.test(v)))
    .filter((values) => values.length > 1);
  return (
    kinds.sort((one, two) => one.length - two.length).find((values) => values.length >= 4) ??
    kinds[0] ??
    []
  ).slice(0, WORDS);
}

/** A few users, and a way to all of them. */
function sample(chosen) {
  const list = el("ul", { class: "people" });
  const all = el(
    "button",
    { type: "button", class: "button", on: { click: () => pick(chosen) } },
    icon("search"),
    t("who.pick.button"),
  );
  api.users({ limit: 4 }).then(({ users }) => {
    list.append(...users.map((user) => entry(user, chosen)));
    if (!users.length) list.replaceWith(el("p", { class: "soft", text: t("who.pick.nobody") }));
  }, complain);
  return el("div", { class: "stack" }, list, all);
}

function entry(user, chosen) {
  const take = () =>
    chosen(become({ kind: "user", user_id: user.user_id, profile: user.profile, said: true }));
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", class: "person-entry", "data-user": user.user_id, on: { click: take } },
      person(user.user_id),
      el(
        "span",
        { class: "person-name" },
        el("strong", { text: t("who.user", { id: user.user_id }) }),
        el("span", { class: "soft", text: user.profile }),
      ),
      el("span", { class: "soft count", text: t("who.events", { n: user.events }) }),
    ),
  );
}

/** The dialog in which one of all users is searched. */
export function pick(chosen) {
  const input = el("input", {
    type: "search",
    class: "field",
    id: "user-search",
    placeholder: t("who.pick.search"),
    "aria-label": t("who.pick.search"),
    autocomplete: "off",
  });
  const list = el("ul", { class: "people long" });
  const note = el("p", { class: "soft", role: "status" });
  const { dialog } = open({
    heading: t("who.pick.heading"),
    kind: "box picker",
    content: [input, list, note],
  });
  const taken = (who) => {
    dialog.close();
    chosen(who);
  };
  let newest = null;
  const look = async () => {
    newest?.abort();
    newest = new AbortController();
    try {
      const { users } = await api.users(
        { limit: MOST, q: input.value.trim() },
        { signal: newest.signal },
      );
      list.replaceChildren(...users.map((user) => entry(user, taken)));
      note.textContent =
        users.length === MOST
          ? t("who.pick.more")
          : users.length
            ? ""
            : input.value
              ? t("who.pick.none", { query: input.value })
              : t("who.pick.nobody");
    } catch (error) {
      complain(error);
    }
  };
  input.addEventListener("input", paused(160, look));
  input.focus();
  look();
}

/** The line above the shelves: for whom they are, and what he can do about it. */
export function bar(who, { edit, switched, history }) {
  const user = who.kind === "user";
  const name = user ? t("who.user", { id: who.user_id }) : t("who.you");
  const words = el("p", { class: user ? "soft" : "soft said", text: who.profile });
  const button = (symbol, key, click, id) =>
    el("button", { type: "button", class: "button", id, on: { click } }, icon(symbol), t(key));
  byId("who-sign").replaceChildren(person(who.user_id));
  byId("who-name").textContent = name;
  byId("who-words").replaceChildren(...(who.profile ? [words] : []));
  byId("who-actions").replaceChildren(
    ...[
      !user && button("pen", "who.edit", edit, "who-edit"),
      button("people", "who.switch", switched, "who-switch"),
      button("history", "who.history", history, "who-history"),
    ].filter(Boolean),
  );
}
