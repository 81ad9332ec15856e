// The predictions as bars. A bar explains its class; the button beside it asks why not that one.

import { card, labels } from "./catalogue.js";
import { button, find, h } from "./dom.js";
import { onAnswer, onPictures, session } from "./session.js";
import { set, state, watch } from "./state.js";

const FEW = 5;
let showsAll = false;

export const percent = (share) => (share >= 0.0995 || share === 0 ? `${Math.round(100 * share)} %` : share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);

export function openPredictions() {
  find("#other-class").addEventListener("focus", offerLabels, { once: true });
  find("#other-class").addEventListener("change", chooseOther);
  for (const name of [onAnswer, onPictures]) name.on(render);
  watch(["target", "against"], render);
}

/** The question that the map answers: [class, other class or ""], as labels. */
export function question() {
  const result = session.answer?.body.results[0];
  const explained = result?.explanations?.[0]?.target;
  if (!explained) return ["", ""];
  return [explained.label, state.against ? labelOf(state.against, result) : ""];
}

function render() {
  const result = session.answer?.body.results[0];
  renderQuestion();
  const rows = result ? toRows(result) : [];
  const list = find("#predictions");
  const focused = document.activeElement?.dataset.key;
  list.replaceChildren(...rows.slice(0, showsAll ? undefined : FEW).map((row) => toItem(row, result)));
  if (focused) find(`[data-key="${CSS.escape(focused)}"]`, list)?.focus();
  const more = find("#more");
  more.hidden = rows.length <= FEW;
  more.textContent = showsAll ? "Show fewer" : `Show ${rows.length}`;
  more.onclick = () => {
    showsAll = !showsAll;
    render();
  };
}

/** Predictions with their probabilities before, in the order before if channels are off. */
function toRows(result) {
  if (!session.before) return result.predictions.slice(0, 10);
  const now = new Map(result.predictions.map((row) => [row.class_id, row]));
  const before = session.before.slice(0, 10);
  const known = new Set(before.map((row) => row.class_id));
  const risen = result.predictions.slice(0, 3).filter((row) => !known.has(row.class_id));
  return [
    ...before.slice(0, FEW).map((row) => ({ ...row, probability: now.get(row.class_id)?.probability ?? 0, before: row.probability })),
    ...risen.map((row) => ({ ...row, before: null })),
  ];
}

function toItem(row, result) {
  const id = String(row.class_id);
  const explained = String(result.explanations?.[0]?.target.class_id ?? "");
  const change = row.before === undefined || row.before === null ? "" : signedPoints(row.probability - row.before);
  const bar = h(
    "button",
    {
      type: "button", class: "bar", "aria-pressed": String(id === explained), data: { key: `bar-${id}` },
      vars: { "--share": row.probability, "--before": row.before ?? row.probability },
      title: `Explain ${row.label}`,
      onclick: () => set({ target: id, against: state.against === id ? "" : state.against }),
    },
    h("span", { class: "label" }, row.label),
    change && h("span", { class: "change" }, change),
    h("span", { class: "percent" }, percent(row.probability)),
    h("span", { class: "track", "aria-hidden": "true", data: change ? { changed: "" } : {} }, h("span", { class: "rest" })),
  );
  const isAgainst = state.against === id;
  const versus = button("and not", () => set(isAgainst ? { against: "" } : { target: explained, against: id }), {
    class: "versus", "aria-pressed": String(isAgainst), hidden: id === explained, data: { key: `versus-${id}` },
    "aria-label": `…and not ${row.label}`, title: `Why ${question()[0]} and not ${row.label}?`,
  });
  return h("li", {}, bar, versus);
}

function renderQuestion() {
  const [chosen, other] = question();
  const line = find("#question");
  if (!chosen) {
    line.replaceChildren("What does the model say?");
    return;
  }
  line.replaceChildren("Why ", h("em", {}, chosen));
  if (other) line.append(" and not ", h("em", {}, other));
  line.append("?");
  find("#reset").hidden = state.target === "top1" && !state.against;
  find("#reset").onclick = () => set({ target: "top1", against: "" });
}

async function offerLabels() {
  const names = await labels();
  find("#labels").replaceChildren(...names.map((name, index) => h("option", { value: `${name} (${index})` })));
}

async function chooseOther(event) {
  const typed = event.target.value.trim();
  const names = await labels();
  const numbered = typed.match(/\((\d+)\)$/) ?? typed.match(/^(\d+)$/);
  const index = numbered ? Number(numbered[1]) : names.findIndex((name) => name.toLowerCase() === typed.toLowerCase());
  const isKnown = index >= 0 && index < card().num_classes;
  event.target.setCustomValidity(isKnown || !typed ? "" : "The model has no such class; choose one from the list.");
  if (typed && !event.target.reportValidity()) return;
  if (isKnown) set({ target: String(index), against: "" });
  event.target.value = "";
}

const labelOf = (id, result) => result.predictions.find((row) => String(row.class_id) === id)?.label ?? `class ${id}`;

function signedPoints(change) {
  const points = Math.round(1000 * change) / 10;
  return points === 0 ? "±0" : `${points > 0 ? "+" : "−"}${Math.abs(points)}`;
}
