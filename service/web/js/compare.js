// Several maps of one picture side by side: methods, layers, models or classes. Opacity, colours, swipe and the
// place under the pointer are the same in all.

import { card, catalogue, isLong, layers, method, supported } from "./catalogue.js";
import { find, h, button } from "./dom.js";
import { isCancelled, sentence } from "./errors.js";
import { decode } from "./heatmap.js";
import { lookOf } from "./look.js";
import { percent } from "./predictions.js";
import { explainOptions } from "./request.js";
import { answerFor, onAnswer, onBusy, onPictures, session } from "./session.js";
import { Stage } from "./stage.js";
import { list, set, state, watch } from "./state.js";

const USUAL_METHODS = ["gradcam", "layercam", "eigencam", "integrated_gradients"];
const MOST_LAYERS = 24;

/** What can be compared: its choices as [value, text], those chosen at first, and the options for one of them. */
const AXES = {
  methods: {
    title: "Methods",
    choices: async () => supported().filter(([, reason]) => !reason).map(([row]) => [row.name, row.title]),
    usual: (choices) => USUAL_METHODS.filter((name) => choices.some(([value]) => value === name)),
    options: (name) => ({ methods: [name] }),
  },
  layers: {
    title: "Layers",
    choices: async () => spread((await layers()).filter((row) => row.spatial && row.usable && isBlock(row.name))).map(({ name }) => [name, name]),
    usual: (choices) => [0.35, 0.6, 0.8, 1].map((share) => choices[Math.round(share * (choices.length - 1))]?.[0]).filter(Boolean),
    options: (name) => ({ layers: [name] }),
  },
  models: {
    title: "Models",
    choices: async () => catalogue.cards.filter((c) => c.ready).map((c) => [`${c.name}@${c.version}`, c.name]),
    usual: (choices) => choices.slice(0, 4).map(([value]) => value),
    options: (name) => ({ model: name, layers: ["auto"], targets: ["top1"] }),
  },
  classes: {
    title: "Classes",
    choices: async () => (session.answer?.body.results[0].predictions ?? []).slice(0, 8).map((row) => [String(row.class_id), row.label]),
    usual: (choices) => choices.slice(0, 4).map(([value]) => value),
    options: (id) => ({ targets: [Number(id)] }),
  },
};

let shownStages = [];
let controller = new AbortController();

export function openCompare() {
  watch(["view", "axis", "items", "model", "method", "layer", "target", "against", "off"], render);
  onPictures.on(render);
  onAnswer.on(() => state.axis === "classes" && render());
}

async function render() {
  if (state.view !== "compare" || !session.current) return;
  controller.abort();
  const mine = (controller = new AbortController());
  const { signal } = mine;
  const axis = AXES[state.axis] ?? AXES.methods;
  const choices = await axis.choices();
  if (signal.aborted) return;
  const picked = list(state.items).filter((item) => choices.some(([value]) => value === item));
  const items = picked.length ? picked : axis.usual(choices);
  for (const stage of shownStages) stage.remove();
  shownStages = [];
  const cards = items.map((item) => toCard(item, choices.find(([value]) => value === item)[1]));
  find("#view-compare").replaceChildren(
    axisList(),
    chips(choices, items),
    h("div", { class: "compared" }, ...cards.map(({ element }) => element)),
  );
  const stop = () => mine.abort();
  onBusy.emit(true, stop);
  for (const made of cards) await fillCard(made, axis, signal);
  onBusy.emit(false, stop);
}

function axisList() {
  const open = Object.entries(AXES).filter(([name]) => name !== "models" || catalogue.cards.length > 1);
  const choose = ([name, { title }]) =>
    button(title, () => set({ axis: name, items: "" }), { class: "chip", "aria-pressed": String(name === state.axis) });
  return h("div", { class: "chips", role: "group", "aria-label": "Compare" }, h("span", {}, "Compare"), ...open.map(choose));
}

function chips(choices, items) {
  const toggle = (value) => {
    const next = items.includes(value) ? items.filter((item) => item !== value) : [...items, value];
    if (next.length) set({ items: next.join(",") });
  };
  const toChip = ([value, text]) =>
    button(text, () => toggle(value), { class: "chip", "aria-pressed": String(items.includes(value)) });
  const title = `${items.length} of ${choices.length} chosen`;
  return h("details", { class: "choices", open: choices.length <= 8 }, h("summary", {}, title), h("div", { class: "chips", role: "group", "aria-label": "What is compared" }, ...choices.map(toChip)));
}

function toCard(item, text) {
  const stage = new Stage(`Heatmap: ${text}`);
  shownStages.push(stage);
  stage.setPicture(session.current);
  const note = h("span", { class: "about" }, isLong(item) ? "Working… this one takes longer" : "Working…");
  return { item, stage, note, element: h("figure", { class: "card" }, stage.element, h("figcaption", {}, h("b", {}, text), note)) };
}

async function fillCard({ item, stage, note }, axis, signal) {
  if (signal.aborted) {
    note.textContent = "Cancelled";
    return;
  }
  const options = explainOptions(axis.options(item));
  try {
    const show = (body) => showOn(stage, note, body);
    show(await answerFor(session.current, options, signal, { whenPartial: () => {} }));
  } catch (error) {
    note.textContent = isCancelled(error) ? "Cancelled" : sentence(error);
  }
}

function showOn(stage, note, body) {
  const { image, explanations } = body.results[0];
  const [explained] = explanations;
  stage.setMap(explained.degenerate ? null : decode(explained.values), image, lookOf(explained));
  const { label, probability } = explained.target;
  note.textContent = explained.degenerate ? "shows nothing" : `${label}, ${percent(probability)} · ${Math.round(body.timings_ms.device)} ms`;
  note.title = method(explained.method)?.formula ?? "";
}

/** Layers that others are made of say little more than their block: the tree has them all. */
const isBlock = (name) => name.split(".").length <= 2 || name === card()?.target_layer;

function spread(rows) {
  const step = Math.max(1, Math.ceil(rows.length / MOST_LAYERS));
  return rows.filter((_, i) => i % step === 0 || i === rows.length - 1);
}
