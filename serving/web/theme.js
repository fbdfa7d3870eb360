// Light or dark, before the first paint: what the visitor chose here, else what the system says.
const THEME = "emerald.theme";

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

try {
  setTheme(localStorage.getItem(THEME));
} catch {
  // storage is blocked: the system's theme it is
}
