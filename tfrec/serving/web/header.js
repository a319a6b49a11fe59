/* Header: what both pages have on top: language and colours. */

import { byId, set } from "./dom.js";
import { icon } from "./icons.js";
import { switchLanguage, switchTheme, t, theme, translate } from "./texts.js";

/** Wires the buttons; `redraw` is called after a change of language. */
export function header(redraw) {
  byId("language").addEventListener("click", () => {
    switchLanguage();
    draw();
    redraw();
  });
  byId("theme").addEventListener("click", () => {
    switchTheme();
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

function draw() {
  translate();
  document.title = t(document.documentElement.dataset.title);
  const dark = theme() === "dark";
  byId("theme").replaceChildren(icon(dark ? "sun" : "moon"));
  set(byId("theme"), "aria-label", t(dark ? "theme.light" : "theme.dark"));
  // The other language's own name is what its reader looks for.
  const other = t("language.switch");
  byId("language").textContent = other;
  set(byId("language"), "lang", other === "English" ? "en" : "zh-Hans");
  set(byId("language"), "title", t("language.label"));
}
