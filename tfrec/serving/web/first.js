/* First: colours and language before anything is drawn, so that the page does not flash. Not a module. */
(() => {
  const kept = (name) => {
    try {
      return JSON.parse(localStorage.getItem(`tfrec.${name}`));
    } catch {
      return null;
    }
  };
  const theme = kept("theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  const language = kept("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
})();
