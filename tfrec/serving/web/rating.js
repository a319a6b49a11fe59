/* Rating: five stars beside the button that asked for them. */

import { byId, el } from "./dom.js";
import { icon } from "./icons.js";
import { t } from "./texts.js";
import { named } from "./titles.js";

/** Opens the stars; the one that is chosen is told as a `rating`. */
export function rate(opener, item, rating, act) {
  const box = el("div", {
    class: "stars",
    popover: "auto",
    role: "group",
    "aria-label": t("card.rate.of", { title: named(item.title).name }),
  });
  const choose = (value) => () => {
    box.hidePopover();
    act(item, "rating", value);
  };
  const stars = [1, 2, 3, 4, 5].map((value) =>
    el(
      "button",
      {
        type: "button",
        class: `star ${value <= (rating ?? 0) ? "on" : ""}`,
        "aria-label": t("card.stars", { n: value }),
        on: {
          click: choose(value),
          pointerenter: () => light(stars, value),
          focus: () => light(stars, value),
        },
      },
      icon("star"),
    ),
  );
  box.append(...stars);
  box.onkeydown = (event) => walk(event, stars);
  box.onpointerleave = () => light(stars, rating ?? 0);
  box.addEventListener("toggle", (event) => event.newState === "closed" && box.remove());
  // Outside of an open dialog it could not be reached.
  (opener.closest("dialog") ?? byId("main")).append(box);
  box.showPopover({ source: opener });
  place(box, opener);
  stars[(rating || 1) - 1].focus();
  if (!rating) light(stars, 0);
}

function light(stars, value) {
  stars.forEach((star, i) => star.classList.toggle("on", i < value));
}

function walk(event, stars) {
  const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const at = stars.indexOf(document.activeElement);
  stars[Math.max(0, Math.min(4, at + step))].focus();
}

function place(box, opener) {
  const by = opener.getBoundingClientRect();
  const wide = box.offsetWidth;
  const left = Math.max(8, Math.min(innerWidth - wide - 8, by.left + by.width / 2 - wide / 2));
  const above = by.top - box.offsetHeight - 8;
  box.style.left = `${left}px`;
  box.style.top = `${above > 8 ? above : by.bottom + 8}px`;
}
