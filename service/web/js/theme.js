// Light or dark: as the system says, until someone chooses. The choice is kept for the next visit.

import { find } from "./dom.js";

const KEPT = "heatlens-theme";

export function openTheme() {
  const kept = localStorage.getItem(KEPT);
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  const toggle = find("#theme");
  toggle.onclick = () => {
    const next = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem(KEPT, next);
    label(toggle);
  };
  label(toggle);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function label(toggle) {
  toggle.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
}
