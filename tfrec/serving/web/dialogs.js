/* Dialogs: drawers, pickers and questions, in the browser's own modal element. */

import { el } from "./dom.js";
import { icon } from "./icons.js";
import { t } from "./texts.js";

let count = 0;

/** Opens a modal with a heading and a button that closes it; it is taken away when closed. */
export function open({ heading, kind = "box", content = [], closed = () => {} }) {
  const id = `dialog-${++count}`;
  const title = el("h2", { id, text: heading, tabindex: "-1", class: "dialog-title" });
  const shut = el(
    "button",
    {
      type: "button",
      class: "round",
      "aria-label": t("close"),
      on: { click: () => dialog.close() },
    },
    icon("close"),
  );
  const body = el("div", { class: "dialog-body" }, content);
  const dialog = el(
    "dialog",
    { class: `dialog ${kind}`, "aria-labelledby": id },
    el("div", { class: "dialog-head" }, title, shut),
    body,
  );
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    closed(dialog.returnValue);
  });
  document.body.append(dialog);
  dialog.showModal();
  return { dialog, body, title };
}

/** Asks before something that matters; the answer is true or false. */
export function confirmed({ heading, text, yes, danger = false, more = [] }) {
  return new Promise((answer) => {
    const said = (value) => () => dialog.close(value);
    const row = el(
      "div",
      { class: "dialog-actions" },
      el("button", {
        type: "button",
        class: "button",
        text: t("cancel"),
        on: { click: said("") },
        autofocus: true,
      }),
      el("button", {
        type: "button",
        class: `button ${danger ? "danger" : "main"}`,
        text: yes,
        on: { click: said("yes") },
      }),
    );
    const content = [el("p", { text }), ...more, row];
    const { dialog } = open({
      heading,
      kind: "box question",
      content,
      closed: (value) => answer(value === "yes"),
    });
  });
}
