/* History: what the service knows of a visitor, and the way to be forgotten. */

import { api } from "./api.js";
import { confirmed, open } from "./dialogs.js";
import { el } from "./dom.js";
import { icon } from "./icons.js";
import { complain } from "./notices.js";
import { has, moment, number, t } from "./texts.js";
import { named } from "./titles.js";

const STEP = 30;
const SYMBOLS = {
  like: "heart",
  hide: "hide",
  dislike: "hide",
  rating: "star",
  purchase: "check",
  view: "search",
  click: "search",
};

/** Opens the drawer; `forgotten(answer)` is called when the service has forgotten him. */
export async function history(who, forgotten) {
  const heading =
    who.kind === "user" ? t("history.heading.user", { id: who.user_id }) : t("history.heading");
  const { dialog, body } = open({
    heading,
    kind: "drawer",
    content: [el("p", { class: "soft", role: "status", text: t("loading") })],
  });
  try {
    const known = await api.user(who.user_id);
    const forget = el(
      "button",
      {
        type: "button",
        class: "button danger",
        id: "forget",
        on: { click: () => ask(who, dialog, forgotten) },
      },
      icon("trash"),
      who.kind === "user" ? t("history.forget.user", { id: who.user_id }) : t("history.forget"),
    );
    const nothing = !known.history.length && !known.earlier.length;
    body.replaceChildren(
      ...[
        nothing && el("p", { class: "soft", text: t("history.none") }),
        known.history.length && part("history.live", known.history.toReversed()),
        known.earlier.length &&
          part(
            "history.earlier",
            known.earlier.toSorted((one, two) => two.timestamp - one.timestamp),
          ),
        el("div", { class: "dialog-actions apart" }, forget),
      ].filter(Boolean),
    );
  } catch (error) {
    dialog.close();
    complain(error);
  }
}

function part(key, events) {
  const list = el("ol", { class: "events" });
  const more = el("button", { type: "button", class: "button", on: { click: () => grow() } });
  let shown = 0;
  const grow = () => {
    list.append(...events.slice(shown, shown + STEP).map(row));
    shown = Math.min(events.length, shown + STEP);
    more.textContent = t("history.more", { n: Math.min(STEP, events.length - shown) });
    more.hidden = shown === events.length;
  };
  grow();
  return el(
    "section",
    { class: "panel-part" },
    el("h3", {}, t(key), el("span", { class: "soft", text: ` · ${number(events.length)}` })),
    list,
    more,
  );
}

function row({ item_id, title, event, timestamp, value }) {
  const word = has(`event.${event}`)
    ? t(`event.${event}`, { value: value == null ? "" : number(value, 1) })
    : event;
  const rated =
    value != null && event !== "rating"
      ? ` · ${t("history.value", { value: number(value, 1) })}`
      : "";
  const { name, year } = named(title || item_id);
  return el(
    "li",
    { class: "event" },
    el("span", { class: `event-sign ${event}` }, icon(SYMBOLS[event] ?? "star")),
    el(
      "div",
      {},
      el(
        "p",
        { class: "near-title" },
        name,
        year && el("span", { class: "soft", text: ` ${year}` }),
      ),
      el("p", { class: "soft small", text: `${word}${rated} · ${moment(timestamp * 1000)}` }),
    ),
  );
}

async function ask(who, dialog, forgotten) {
  const told = {
    heading: t("history.forget.heading"),
    text: t("history.forget.text"),
    yes: t("history.forget.yes"),
    danger: true,
  };
  if (!(await confirmed(told))) return;
  try {
    const answer = await api.forget(who.user_id);
    dialog.close();
    forgotten(answer);
  } catch (error) {
    complain(error);
  }
}
