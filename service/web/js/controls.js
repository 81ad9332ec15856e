// What is asked: model, method, layer, samples. And how the map is drawn: opacity, colours, swipe, marks.

import { card, catalogue, isLong, method, supported } from "./catalogue.js";
import { button, find, h, select } from "./dom.js";
import { colours } from "./heatmap.js";
import { switchedOff } from "./request.js";
import { onAnswer, onPictures, session } from "./session.js";
import { shown } from "./stage.js";
import { fresh, set, state, watch } from "./state.js";

const FAMILIES = {
  gradient: "Gradients of the layer",
  activation: "Activations of the layer",
  perturbation: "Changing the picture",
  pixels: "Single pixels",
  transformer: "Attention",
};

export function openControls() {
  watch(["model"], renderAsked);
  watch(["method", "layer", "samples", "off"], renderAsked);
  watch(["colormap", "opacity", "swipe", "marks"], renderDrawn);
  onAnswer.on(renderNotes);
  onAnswer.on(renderDrawn);
  onPictures.on(renderNotes);
  renderAsked();
  renderDrawn();
}

function renderAsked() {
  find("#model").replaceChildren(...(catalogue.cards.length > 1 ? [modelList()] : [h("span", { class: "only" }, card()?.name ?? "")]));
  const parts = [methodList(), ...samplesField(), layerField(), unsupported(), restoreButton()];
  find("#asked").replaceChildren(...parts.filter(Boolean));
}

function modelList() {
  const choices = catalogue.cards.map((c) => {
    const name = catalogue.cards.filter((other) => other.name === c.name).length > 1 ? `${c.name}@${c.version}` : c.name;
    return [name, name, c.ready ? "" : (c.reason ?? "not ready")];
  });
  const value = state.model || catalogue.fallback;
  return select("Model", choices, value, (name) => set({ model: name === catalogue.fallback ? "" : name, layer: "auto", ...fresh() }));
}

function methodList() {
  const groups = new Map();
  for (const [row, reason] of supported()) {
    const group = groups.get(row.family) ?? h("optgroup", { label: FAMILIES[row.family] ?? row.family });
    groups.set(row.family, group);
    const text = isLong(row.name) ? `${row.title} · takes longer` : row.title;
    group.append(h("option", { value: row.name, disabled: Boolean(reason), title: reason || null }, text));
  }
  const list = h("select", { id: "method", onchange: () => set({ method: list.value, samples: 0 }) }, ...groups.values());
  list.value = state.method;
  const row = method(state.method);
  const about = row && h("p", { class: "about" }, h("span", { class: "formula" }, row.formula), h("cite", {}, row.paper));
  return h("div", {}, h("label", { class: "field" }, h("span", {}, "Method"), list), about);
}

function samplesField() {
  const usual = method(state.method)?.defaults.samples;
  if (!usual) return [];
  const field = h("input", {
    type: "number", min: "1", max: "10000", value: state.samples || usual, id: "samples",
    onchange: () => field.reportValidity() && set({ samples: Number(field.value) === usual ? 0 : Number(field.value) }),
  });
  return [h("label", { class: "field" }, h("span", {}, "Samples"), field)];
}

function layerField() {
  if (method(state.method)?.of_input) {
    return h("div", { class: "field" }, h("span", {}, "Layer"), h("span", { class: "value" }, "explains the input itself"));
  }
  const name = state.layer === "auto" ? `${card()?.target_layer ?? "auto"} (recommended)` : state.layer;
  const opener = button(name, () => set({ view: "layers" }), { class: "value link", title: "Choose in the layer tree" });
  const reset = state.layer !== "auto" && button("Use recommended", () => set({ layer: "auto" }), { class: "link" });
  return h("div", { class: "field" }, h("span", {}, "Layer"), opener, reset);
}

function unsupported() {
  const rows = supported().filter(([, reason]) => reason);
  if (!rows.length) return null;
  const items = rows.map(([row, reason]) => h("li", {}, h("b", {}, row.title), ` ${reason}`));
  const count = rows.length === 1 ? "1 method does" : `${rows.length} methods do`;
  return h("details", { class: "unsupported" }, h("summary", {}, `${count} not fit this model`), h("ul", {}, ...items));
}

function restoreButton() {
  const off = switchedOff();
  if (!off) return null;
  const count = off.channels.length === 1 ? "1 channel" : `${off.channels.length} channels`;
  return h(
    "p", { class: "notice" }, `${count} of ${off.layer} switched off. `,
    button("Switch on again", () => set({ off: "" }), { class: "link" }),
  );
}

/** What the answer wants to say about itself. */
function renderNotes() {
  const { body, isPartial } = session.answer ?? {};
  const result = body?.results[0];
  const explained = result?.explanations?.[0];
  const notes = [...(result?.warnings ?? []), ...(explained?.warnings ?? [])];
  if (explained?.degenerate) notes.unshift("This map is the same everywhere: it shows nothing. Try another method or layer.");
  if (isPartial) notes.unshift("A map of the samples so far.");
  find("#notes").replaceChildren(...notes.map((note) => h("p", { class: "notice" }, note)));
  const times = body && !isPartial ? `${body.model.name} on ${body.model.device}, ${body.model.precision} · ${Math.round(body.timings_ms.total)} ms` : "";
  find("#served").textContent = times;
}

function renderDrawn() {
  const explained = session.answer?.body.results[0].explanations?.[0];
  find("#opacity").value = Math.round(100 * state.opacity);
  find("#opacity").oninput = (event) => set({ opacity: Number(event.target.value) / 100 });
  toggle("#swipe", state.swipe >= 0, () => set({ swipe: state.swipe >= 0 ? -1 : 50 }));
  toggle("#marks", Boolean(state.marks), () => set({ marks: state.marks ? 0 : 1 }));
  const list = find("#colormap");
  if (list.options.length === 0) {
    list.append(...["auto", ...Object.keys(catalogue.colormaps)].map((name) => h("option", { value: name }, name)));
    list.onchange = () => set({ colormap: list.value });
  }
  list.value = state.colormap;
  renderLegend(explained);
}

function renderLegend(explained) {
  const signed = Boolean(explained?.signed);
  const table = catalogue.colormaps[colours(state.colormap, signed)];
  const canvas = find("#legend");
  const context = canvas.getContext("2d");
  const image = context.createImageData(256, 1);
  for (let i = 0; i < 256; i += 1) image.data.set([...table.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  context.putImageData(image, 0, 0);
  const { min = 0, max = 0 } = explained?.range ?? {};
  const greatest = Math.max(Math.abs(min), Math.abs(max));
  find("#lowest").textContent = explained ? shown(signed ? -greatest : min) : "";
  find("#highest").textContent = explained ? shown(signed ? greatest : max) : "";
}

function toggle(selector, isOn, onclick) {
  const element = find(selector);
  element.setAttribute("aria-pressed", String(isOn));
  element.onclick = onclick;
}
