/* Key: asks for an API key where the service wants one, once for all requests that wait for it. */

import { open } from "./dialogs.js";
import { el } from "./dom.js";
import { keep } from "./store.js";
import { t } from "./texts.js";

let asking = null;

/** True: there is a key to try; false: the reader gave none. */
export function askForKey(refused) {
  asking ??= asked(refused).finally(() => (asking = null));
  return asking;
}

function asked(refused) {
  return new Promise((answer) => {
    const input = el("input", {
      id: "api-key",
      type: "password",
      class: "field",
      autocomplete: "off",
      required: true,
      "aria-describedby": "api-key-note",
    });
    const note = el("p", {
      id: "api-key-note",
      class: refused ? "bad" : "soft",
      text: t(refused ? "key.refused" : "key.text"),
    });
    const use = el("button", { class: "button main", text: t("key.use") });
    const form = el(
      "form",
      { class: "stack" },
      note,
      el("label", { for: "api-key", class: "label", text: t("key.label") }),
      input,
      el("div", { class: "dialog-actions" }, use),
    );
    const { dialog } = open({
      heading: t("key.heading"),
      kind: "box question",
      content: [form],
      closed: (value) => answer(value === "key"),
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      keep("key", input.value.trim(), sessionStorage);
      dialog.close("key");
    });
    input.focus();
  });
}
