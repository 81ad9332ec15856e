// Walk through the network: its layers, statistics over depth, and the channels of one layer.

import { post } from "./api.js";
import { card } from "./catalogue.js";
import { topChannels, thumbnails } from "./channels.js";
import { lineChart } from "./charts.js";
import { find, h } from "./dom.js";
import { isCancelled, sentence } from "./errors.js";
import { decode } from "./heatmap.js";
import { caption, lookOf } from "./look.js";
import { common } from "./request.js";
import { onAnswer, onPictures, session } from "./session.js";
import { Stage } from "./stage.js";
import { state, watch } from "./state.js";
import { layerTree } from "./tree.js";

const CHARTS = [
  ["Mean", (row) => row.mean],
  ["Spread (standard deviation)", (row) => row.std],
  ["Values that are exactly 0", (row) => row.sparsity, [0, 1]],
  ["Dead channels", (row) => row.dead_channels / row.shape[0], [0, 1]],
];

let stage;
let controller = new AbortController();
let found = null;

export function openLayers() {
  stage = new Stage("Map of the layer or channel");
  const parts = ["tree", "charts", "channels"].map((name) => h("div", { id: `layers-${name}` }));
  const [tree, charts, channels] = parts;
  const trunk = h("div", { class: "trunk" }, h("nav", { "aria-label": "Layer tree" }, tree), charts);
  const middle = h("div", { class: "middle" }, h("h2", { class: "minor", id: "layer-title" }), stage.element, channels);
  find("#view-layers").append(trunk, middle);
  watch(["view", "model", "layer", "target", "against"], render);
  watch(["channel", "off", "colormap"], renderChannels);
  onPictures.on(render);
  onAnswer.on(showMap);
}

const chosenLayer = () => (state.layer === "auto" ? card()?.target_layer : state.layer);

async function render() {
  if (state.view !== "layers" || !session.current) return;
  controller.abort();
  const { signal } = (controller = new AbortController());
  stage.setPicture(session.current);
  try {
    find("#layers-tree").replaceChildren(await layerTree());
    find("#layers-tree [aria-pressed=true]")?.scrollIntoView({ block: "nearest" });
    found = await topChannels(session.current, chosenLayer(), signal);
    renderChannels();
    showMap();
    await renderCharts(signal);
  } catch (error) {
    if (!isCancelled(error)) find("#layers-channels").replaceChildren(h("p", { class: "notice" }, sentence(error)));
  }
}

function renderChannels() {
  if (state.view !== "layers" || !found) return;
  const layer = chosenLayer();
  const key = document.activeElement?.dataset.key;
  const [count, ...size] = found.shape;
  find("#layers-channels").replaceChildren(
    h("p", { class: "about" }, `The ${found.channels.length} strongest of ${count} channels, each ${size.join(" × ")}. Open one to see it over the picture; switch it off and watch the bars.`),
    thumbnails(layer, found.channels),
  );
  if (key) find(`#layers-channels [data-key="${key}"]`)?.focus();
  showMap();
}

/** The open channel's map, or that of the explanation. */
function showMap() {
  if (state.view !== "layers" || !found) return;
  const channel = found.channels.find(({ index }) => String(index) === state.channel);
  const title = find("#layer-title");
  if (channel?.map) {
    const scale = channel.max || 1;
    const map = { ...channel.map, data: channel.map.data.map((value) => value * scale) };
    stage.setMap(map, found.image, { signed: false, ofPixels: false });
    title.textContent = `Channel ${channel.index} of ${chosenLayer()}`;
    return;
  }
  const explained = session.answer?.body.results[0].explanations?.[0];
  if (!explained) return;
  stage.setMap(explained.degenerate ? null : decode(explained.values), session.answer.body.results[0].image, lookOf(explained));
  title.textContent = `${caption(explained)} · ${chosenLayer()}`;
}

async function renderCharts(signal) {
  const body = await post("v1/features", [session.current], { ...common(), channels: 1 }, { signal });
  const rows = body.results[0].features;
  const x = rows.map((_, i) => i / Math.max(1, rows.length - 1));
  const at = rows.findIndex((row) => row.layer === chosenLayer());
  const charts = CHARTS.map(([title, value, range]) => {
    const chart = lineChart({ title, lines: [{ label: title, kind: "map", x, y: rows.map(value) }], range, ticks: [rows[0].layer, rows[rows.length - 1].layer] });
    if (at >= 0) chart.mark(x[at]);
    return chart.element;
  });
  find("#layers-charts").replaceChildren(h("h2", { class: "minor" }, "Over the depth"), h("div", { class: "charts" }, ...charts));
}
