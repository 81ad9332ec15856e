// Dialogs: the key that the service asks for, and code to copy.

import { button, h } from "./dom.js";
import { snippets } from "./code.js";

let asking = null;

/** Ask for an API key; resolves to it, or to "" if there is none. Several requests share one question. */
export function askForKey(complaint) {
  asking ??= new Promise((done) => openKeyDialog(complaint, done)).finally(() => {
    asking = null;
  });
  return asking;
}

function openKeyDialog(complaint, done) {
  const field = h("input", { type: "password", autocomplete: "off", id: "key", required: true, "aria-describedby": "key-note" });
  const form = h(
    "form", { method: "dialog" },
    h("h2", {}, "This service asks for a key"),
    complaint && h("p", { class: "notice", role: "alert" }, complaint),
    h("label", { class: "field" }, h("span", {}, "API key"), field),
    h("p", { class: "about", id: "key-note" }, "It stays in this page's memory and is gone when you close or reload it."),
    h("div", { class: "actions" }, h("button", { class: "primary", type: "submit", value: "use" }, "Use this key"), button("Cancel", () => dialog.close(""))),
  );
  const dialog = openDialog("API key", form, () => done(dialog.returnValue === "use" ? field.value.trim() : ""));
}

/** Show the current request as code. */
export function openCode(request) {
  const all = snippets(request);
  const text = h("code", {});
  const copied = h("span", { class: "spoken", role: "status" });
  const show = (name) => {
    text.textContent = all[name];
    for (const tab of tabs) tab.setAttribute("aria-pressed", String(tab.textContent === name));
  };
  const tabs = Object.keys(all).map((name) => button(name, () => show(name), { class: "chip" }));
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(text.textContent);
    copied.textContent = "Copied.";
    copy.textContent = "Copied";
  }, { class: "primary" });
  const dialog = openDialog(
    "This request as code",
    [
      h("h2", {}, "This request as code"),
      h("div", { class: "chips" }, ...tabs),
      h("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, text),
      h("div", { class: "actions" }, copy, copied, button("Close", () => dialog.close())),
    ],
  );
  show(Object.keys(all)[0]);
}

function openDialog(label, content, onclosed = () => {}) {
  const dialog = h("dialog", { "aria-label": label, onclose: () => {
    dialog.remove();
    onclosed();
  } }, ...[content].flat());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
