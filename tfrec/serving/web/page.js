/* Page: the visitor's page: who is here, his shelves, what he does, and what that changes. */

import { api, Gone } from "./api.js";
import { compared, counted, figures, sentences } from "./changes.js";
import { connection } from "./connection.js";
import { cover } from "./covers.js";
import { byId, el, paused, set } from "./dom.js";
import { header } from "./header.js";
import { history } from "./history.js";
import { icon } from "./icons.js";
import { banner, complain, quiet, say } from "./notices.js";
import { discard, flush, pending, send } from "./outbox.js";
import { panel } from "./panel.js";
import { Shelf, keyOf, skeleton } from "./shelves.js";
import { drawnId, keep, kept } from "./store.js";
import { Taste } from "./taste.js";
import { loadTexts, number, t } from "./texts.js";
import { titled } from "./titles.js";
import { asking, bar, become, pick, visitor } from "./who.js";
import { open } from "./dialogs.js";

const PLACES = 16;
const FOUND = 30;

const page = {
  who: visitor(),
  taste: new Taste(),
  catalog: null,
  shelves: new Map(),
  query: "",
  diversity: kept("diversity"),
  answer: { version: "", request: "" },
  asked: 0,
};

// ---- What is asked of the service ----

/** The answer to "what is on the shelves now", as a list of shelves. */
async function fetched() {
  if (page.query) return searched();
  const { user_id, kind, profile } = page.who;
  const body = { user_id, k: PLACES, explain: true };
  if (kind === "self" && profile) body.profile = profile;
  if (!page.who.said) body.shelves = ["popular"];
  if (page.diversity !== null) body.diversity = page.diversity;
  const answer = await api.shelves(body);
  return { shelves: answer.shelves, version: answer.model_version, request: answer.request_id };
}

async function searched() {
  const answer = await api.search({ q: page.query, k: FOUND, user_id: page.who.user_id });
  const shelf = {
    key: "search",
    about: null,
    name: t("search.heading", { query: page.query }),
    items: answer.items,
  };
  return { shelves: [shelf], version: answer.model_version, request: answer.request_id };
}

/** What the visitor did so far, as the service knows it and as it is about to. */
async function remembered() {
  const { user_id } = page.who;
  const { history: events, earlier } = await api.user(user_id);
  if (user_id === page.who.user_id)
    page.taste = new Taste([...events, ...pending(user_id)], earlier);
}

// ---- What is shown ----

/** Fetches the lists again; with a cause, says and shows what that changed. */
async function load(cause = null) {
  const mine = ++page.asked;
  if (!page.shelves.size) waiting();
  byId("shelves").setAttribute("aria-busy", "true");
  try {
    const answer = await fetched();
    if (mine !== page.asked) return;
    const shelves = answer.shelves
      .map((shelf) => ({ ...shelf, items: page.taste.shown(titled(shelf.items)) }))
      .filter((shelf) => shelf.items.length);
    page.answer = answer;
    await show(shelves, cause);
  } catch (error) {
    if (mine === page.asked) failed(error);
  } finally {
    if (mine === page.asked) byId("shelves").setAttribute("aria-busy", "false");
  }
}

function waiting() {
  byId("shelves").replaceChildren(...skeleton());
  byId("shelves").setAttribute("aria-busy", "true");
}

function failed(error) {
  complain(error);
  if (page.shelves.size || error instanceof Gone) return;
  const again = el("button", {
    type: "button",
    class: "button",
    text: t("error.retry"),
    on: { click: () => load() },
  });
  byId("shelves").replaceChildren(el("p", { class: "empty" }, error.message), again);
}

async function show(shelves, cause) {
  const before = new Map([...page.shelves].map(([key, shelf]) => [key, shelf.ids()]));
  const after = new Map(
    shelves.map((shelf) => [keyOf(shelf), shelf.items.map((item) => item.item_id)]),
  );
  const held = focused();
  if (cause)
    await Promise.all(
      [...page.shelves].map(([key, shelf]) =>
        shelf.leave(compared(before.get(key), after.get(key) ?? []).gone),
      ),
    );
  const places = new Map([...page.shelves].map(([key, shelf]) => [key, shelf.places()]));
  arrange(shelves);
  for (const [key, shelf] of page.shelves) mark(shelf, before.get(key), cause);
  if (cause) for (const [key, shelf] of page.shelves) shelf.glide(places.get(key));
  refocus(held);
  fan();
  if (!shelves.length)
    byId("shelves").replaceChildren(
      el("p", {
        class: "empty",
        text: page.query ? t("search.none", { query: page.query }) : t("shelf.empty"),
      }),
    );
  tell(before, after, cause);
}

/** Covers of what is really there, beside the welcome. */
function fan() {
  const items = [...page.shelves.values()].flatMap((shelf) =>
    [...shelf.cards.values()].map((card) => card.item),
  );
  document.querySelector(".fan")?.replaceChildren(...items.slice(0, 5).map((item) => cover(item)));
}

/** Puts the shelves into their order, keeping those that are there already. */
function arrange(shelves) {
  const next = new Map();
  for (const told of shelves) {
    const key = keyOf(told);
    const shelf =
      page.shelves.get(key) ??
      new Shelf(told, page.taste, handlers, { grid: told.key === "search" });
    shelf.told = told;
    shelf.taste = page.taste;
    if (told.key === "search") shelf.title();
    shelf.show(told.items);
    next.set(key, shelf);
  }
  page.shelves = next;
  const roots = [...next.values()].map((shelf) => shelf.root);
  for (const child of [...byId("shelves").children]) if (!roots.includes(child)) child.remove();
  roots.forEach(
    (root, i) =>
      byId("shelves").children[i] !== root &&
      byId("shelves").insertBefore(root, byId("shelves").children[i] ?? null),
  );
}

function mark(shelf, before, cause) {
  const fresh = cause && !before;
  shelf.badge.hidden = !fresh;
  shelf.badge.textContent = fresh ? t("shelf.new") : "";
  const { marks } = compared(before ?? shelf.ids(), shelf.ids());
  for (const [id, card] of shelf.cards) card.mark(cause ? marks.get(id) : null);
}

function tell(before, after, cause) {
  if (page.query && !cause)
    byId("heard").textContent = t("search.count", { n: [...after.values()].flat().length });
  if (!cause) return;
  const counts = counted(before, after);
  const { lead, rest, heard } = sentences(counts, cause);
  say(lead, figures(counts, rest), heard);
}

/** Where the focus is: in which shelf, on which card, on which of its buttons. */
function focused() {
  const card = document.activeElement?.closest?.(".card");
  if (!card) return null;
  const shelf = [...page.shelves].find(([, one]) => one.root.contains(card));
  if (!shelf) return null;
  return { key: shelf[0], id: card.dataset.item, place: shelf[1].ids().indexOf(card.dataset.item) };
}

/** A card that went takes the focus with it; the card that took its place gets it. */
function refocus(held) {
  if (!held || document.activeElement?.closest?.(".card")) return;
  const shelf = page.shelves.get(held.key) ?? [...page.shelves.values()][0];
  const cards = shelf ? [...shelf.cards.values()] : [];
  const card = cards[Math.min(held.place, cards.length - 1)];
  (card?.root.querySelector(".card-open") ?? byId("main")).focus({ preventScroll: true });
}

// ---- What a visitor does ----

const handlers = (shelf) => ({
  act,
  open(card) {
    const place = shelf.ids().indexOf(card.item.item_id) + 1;
    panel(
      {
        item: card.item,
        place,
        shelf: shelf.told,
        version: page.answer.version,
        request: page.answer.request,
      },
      { taste: page.taste, act, user: page.who.user_id },
    );
  },
});

/** Shows an action at once, sends it, and shows what the service makes of it. */
async function act(item, event, value = null) {
  const { user_id } = page.who;
  if (event === "like" && page.taste.of(item.item_id).liked)
    return say(t("change.already", { title: item.title }));
  const before = page.taste.learn({ item_id: item.item_id, event, value });
  for (const shelf of page.shelves.values()) shelf.cards.get(item.item_id)?.tell();
  for (const shelf of page.shelves.values())
    shelf.root
      .querySelectorAll(`[data-item="${CSS.escape(item.item_id)}"]`)
      .forEach((card) => card.classList.toggle("leaving", event === "hide"));
  const told = { user_id, item_id: item.item_id, event };
  if (value !== null) told.value = value;
  try {
    await send(told);
  } catch (error) {
    return unsent(error, item, before);
  }
  if (user_id !== page.who.user_id) return undefined;
  settle();
  return load({ kind: event, title: item.title, value });
}

function unsent(error, item, before) {
  if (error instanceof Gone) return say(t("change.waiting"));
  page.taste.restore(item.item_id, before);
  for (const shelf of page.shelves.values()) shelf.cards.get(item.item_id)?.tell();
  document.querySelectorAll(".leaving").forEach((card) => card.classList.remove("leaving"));
  return complain(error);
}

/** Somebody who did something needs no welcome any more. */
function settle() {
  if (page.who.said) return;
  page.who = become({ ...page.who, said: true });
  people();
}

async function chosen(who) {
  page.who = who;
  page.taste = new Taste(pending(who.user_id));
  page.shelves.clear();
  page.query = "";
  byId("query").value = "";
  waiting();
  people();
  byId("main").focus({ preventScroll: true });
  scrollTo({ top: 0 });
  await restart();
}

async function restart() {
  try {
    await remembered();
  } catch (error) {
    complain(error);
  }
  await load();
}

function forgotten({ events }) {
  discard(page.who.user_id);
  if (page.who.kind === "self") keep("self", null);
  keep("visitor", null);
  chosen(visitor());
  say(t("history.forgotten", { n: events }));
}

/** Asks again who is here, over the shelves. */
function again() {
  const done = (who) => {
    dialog.close();
    chosen(who);
  };
  const { dialog } = open({
    heading: t("who.heading.change"),
    kind: "box wide",
    content: [asking(page.catalog, done, { heading: false })],
  });
}

/** The welcome of somebody new, or the line that says for whom the shelves are. */
function people() {
  const known = page.who.said;
  byId("who").hidden = !known;
  byId("welcome").hidden = known;
  byId("variety").hidden = !known;
  byId("welcome").replaceChildren(
    ...(known || !page.catalog ? [] : [asking(page.catalog, chosen)]),
  );
  fan();
  if (!known) return;
  const wide = () => again();
  bar(page.who, {
    edit: wide,
    switched: page.who.kind === "user" || !page.catalog?.text ? wide : () => pick(chosen),
    history: () => history(page.who, forgotten),
  });
}

// ---- Search and variety ----

const look = paused(240, () => {
  const query = byId("query").value.trim();
  if (query === page.query) return;
  page.query = query;
  page.shelves.clear();
  quiet();
  set(byId("top"), "hidden", Boolean(query));
  load();
});

function search() {
  const clear = () => {
    byId("query").value = "";
    look();
    byId("query").focus();
  };
  byId("search").prepend(icon("search"));
  byId("clear").append(icon("close"));
  byId("clear").addEventListener("click", clear);
  byId("query").addEventListener("input", look);
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  byId("query").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !byId("query").value) return;
    clear();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, textarea, dialog")) return;
    event.preventDefault();
    byId("query").focus();
  });
}

function variety() {
  const slider = byId("diversity");
  slider.value = String(Math.round((page.diversity ?? page.catalog?.diversity ?? 0) * 100));
  const told = () =>
    set(slider, "aria-valuetext", t("slider.value", { percent: number(Number(slider.value)) }));
  const moved = paused(300, () => {
    const wanted = Number(slider.value) / 100;
    const kind = wanted > (page.diversity ?? 0) ? "diverse" : "focused";
    if (wanted === page.diversity) return;
    page.diversity = wanted;
    keep("diversity", wanted);
    load({ kind });
  });
  slider.addEventListener("input", () => {
    told();
    moved();
  });
  told();
}

// ---- From the start ----

async function back() {
  try {
    page.catalog ??= await api.catalog();
    await flush();
    people();
    await remembered();
    await load(page.shelves.size ? { kind: "back" } : null);
  } catch (error) {
    failed(error);
  }
}

async function start() {
  await loadTexts();
  const redraw = banner("gone.text");
  header(() => {
    redraw();
    people();
    variety();
    for (const shelf of page.shelves.values()) shelf.redraw();
    if (page.query) load();
  });
  connection.addEventListener("back", back);
  connection.watch();
  search();
  waiting();
  people();
  try {
    page.catalog = await api.catalog();
    await flush();
  } catch (error) {
    complain(error);
  }
  people();
  variety();
  await restart();
  document.documentElement.dataset.ready = "true";
}

start();
