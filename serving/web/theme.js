// Light or dark, before the first paint: what the visitor chose here, else what the system says.
{
  const KEY = "emerald.theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  try {
    root.dataset.theme = localStorage.getItem(KEY) ?? "";
  } catch {
    // storage is blocked: the system's theme it is
  }

  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";

  document.addEventListener("DOMContentLoaded", () => {
    const toggle = document.getElementById("theme");
    const tell = () => {
      toggle.ariaPressed = String(dark());
    };
    toggle.onclick = () => {
      root.dataset.theme = dark() ? "light" : "dark";
      tell();
      try {
        localStorage.setItem(KEY, root.dataset.theme);
      } catch {
        // it holds until the page is closed
      }
    };
    system.onchange = tell;
    tell();
  });
}
