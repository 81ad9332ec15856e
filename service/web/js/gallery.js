// All pictures of this visit with their heatmaps, sorted by how sure the model is.

import { isLong } from "./catalogue.js";
import { post } from "./api.js";
import { button, find, h, select } from "./dom.js";
import { isCancelled, sentence } from "./errors.js";
import { decode } from "./heatmap.js";
import { lookOf } from "./look.js";
import { percent } from "./predictions.js";
import { explainOptions } from "./request.js";
import { onPictures, open, session } from "./session.js";
import { Stage } from "./stage.js";
import { state, set, watch } from "./state.js";

const AT_ONCE = 8;
const ORDERS = [["confident", "Most confident first"], ["unsure", "Least confident first"], ["label", "By class"], ["taken", "As they came"]];

const items = new Map();
let controller = new AbortController();
let askedFor = "";

export function openGallery() {
  watch(["view", "model", "method", "layer", "target", "against", "off"], render);
  watch(["order"], arrange);
  onPictures.on(render);
}

async function render() {
  if (state.view !== "gallery") return;
  forgetOthers();
  const options = explainOptions(isLong(state.method) ? { methods: ["gradcam"] } : {});
  const fingerprint = JSON.stringify(options);
  if (fingerprint !== askedFor) for (const item of items.values()) item.result = null;
  askedFor = fingerprint;
  for (const picture of session.pictures) if (!items.has(picture.id)) items.set(picture.id, toItem(picture));
  arrange();
  controller.abort();
  const { signal } = (controller = new AbortController());
  const open = [...items.values()].filter((item) => !item.result);
  for (let i = 0; i < open.length; i += AT_ONCE) await ask(open.slice(i, i + AT_ONCE), options, signal);
}

async function ask(some, options, signal) {
  if (signal.aborted) return;
  try {
    const body = await post("v1/explain", some.map(({ picture }) => picture), options, { signal });
    some.forEach((item, i) => show(item, body.results[i]));
  } catch (error) {
    if (isCancelled(error)) return;
    for (const item of some) show(item, { error: { error: error.message, code: error.code } });
  }
  arrange();
}

function toItem(picture) {
  const stage = new Stage(`Heatmap: ${picture.name}`);
  stage.setPicture(picture);
  const text = h("span", {}, "Working…");
  const opener = button("", () => {
    set({ view: "look" });
    open(picture, { sample: picture.sample });
  }, { class: "opener" });
  opener.append(h("b", {}, picture.name), text);
  return { picture, stage, text, result: null, element: h("li", { class: "card" }, stage.element, opener) };
}

function show(item, result) {
  item.result = result;
  item.element.classList.toggle("failed", Boolean(result.error));
  if (result.error) {
    item.text.textContent = sentence({ message: result.error.error, code: result.error.code });
    return;
  }
  const [explained] = result.explanations;
  item.stage.setMap(explained.degenerate ? null : decode(explained.values), result.image, lookOf(explained));
  const [first] = result.predictions;
  item.text.textContent = `${first.label}, ${percent(first.probability)}`;
}

function arrange() {
  if (state.view !== "gallery") return;
  const first = ({ result }) => result?.predictions?.[0];
  const sure = (item) => first(item)?.probability ?? -1;
  const by = {
    confident: (a, b) => sure(b) - sure(a),
    unsure: (a, b) => sure(a) - sure(b),
    label: (a, b) => (first(a)?.label ?? "~").localeCompare(first(b)?.label ?? "~") || sure(b) - sure(a),
    taken: () => 0,
  };
  const sorted = [...items.values()].sort(by[state.order] ?? by.confident);
  const panel = find("#view-gallery");
  if (!panel.childElementCount) {
    panel.append(h("div", { class: "chips" }, h("span", { id: "gallery-count" }), select("Sort", ORDERS, state.order, (order) => set({ order }))), h("ul", { class: "compared gallery" }));
  }
  find("#gallery-count").textContent = `${items.size} pictures`;
  find(".gallery", panel).replaceChildren(...sorted.map(({ element }) => element));
}

function forgetOthers() {
  const known = new Set(session.pictures.map(({ id }) => id));
  for (const [id, item] of items) {
    if (known.has(id)) continue;
    item.stage.remove();
    items.delete(id);
  }
}
