// Is it true? Faithfulness on demand: what the model says as the map's strongest pixels are deleted or inserted,
// beside a random map's, and the picture as it is deleted step by step.

import { card } from "./catalogue.js";
import { interpolate, lineChart } from "./charts.js";
import { button, find, h } from "./dom.js";
import { isCancelled } from "./errors.js";
import { decode, enlarge } from "./heatmap.js";
import { lookOf } from "./look.js";
import { percent } from "./predictions.js";
import { explainOptions } from "./request.js";
import { answerFor, onAnswer, onBusy, onError, onPictures, session } from "./session.js";
import { shown, Stage } from "./stage.js";
import { set, state, watch } from "./state.js";

const MEASURES = {
  deletion: ["Deletion", "area under the curve as its strongest pixels go; low is good"],
  insertion: ["Insertion", "area under the curve as its strongest pixels return; high is good"],
  average_drop: ["Average drop", "share of the probability lost when only the map's part is seen; low is good"],
  increase: ["Increase", "whether the map's part alone is more convincing than the picture"],
  road: ["ROAD", "gain of removing the weakest over the strongest pixels; high is good"],
};
const PLAY_MS = 5000;
const TICKS = ["0 %", "50 %", "100 %"];

let stage;
let controller = null;
let measured = null;
let playing = 0;

export function openTruth() {
  stage = new Stage("Picture and the map in question");
  watch(["view", "truth"], render);
  watch(["share"], drawShare);
  onPictures.on(forget);
  watch(["model", "method", "layer", "target", "against", "samples", "off"], forget);
  onAnswer.on(() => !measured && render());
}

function forget() {
  controller?.abort();
  cancelAnimationFrame(playing);
  measured = null;
  find("#view-truth").replaceChildren();
  render();
}

/** How faithful the map that is shown was measured to be, by measure; empty if it was not. */
export const measurement = () => measured?.explained.faithfulness ?? {};

function render() {
  if (state.view !== "truth" || !session.answer || session.answer.isPartial) return;
  if (measured) return;
  if (state.truth && !controller) {
    measure();
    return;
  }
  const { image, explanations: [explained] } = session.answer.body.results[0];
  stage.setPicture(session.current);
  stage.setMap(explained.degenerate ? null : decode(explained.values), image, lookOf(explained));
  find("#view-truth").replaceChildren(
    h("div", { class: "ask" },
      stage.element,
      h("h2", { class: "minor" }, `Does the map for ${explained.target.label} show what matters?`),
      h("p", {}, `If it does, deleting the pixels that it ranks first takes away the model's ${percent(explained.target.probability)} sooner than deleting random ones.`),
      button(controller ? "Measuring…" : "Measure it", measure, { class: "primary", disabled: Boolean(controller) }),
    ),
  );
}

async function measure() {
  if (controller) return;
  const mine = (controller = new AbortController());
  const picture = session.current;
  const options = explainOptions({
    faithfulness: Object.keys(MEASURES), curves: true, outputs: ["values", "overlay"], alpha: 0, overlay_format: "png", timeout_s: 300,
  });
  set({ truth: 1 });
  render();
  onError.emit(null);
  const stop = () => mine.abort();
  onBusy.emit(true, stop);
  try {
    const body = await answerFor(picture, options, mine.signal, { follow: true, whenPartial: () => {} });
    if (picture !== session.current || mine.signal.aborted) return;
    measured = await prepare(body);
    show();
  } catch (error) {
    set({ truth: 0 });
    if (!isCancelled(error)) onError.emit(error);
  } finally {
    if (controller === mine) controller = null;
    onBusy.emit(false, stop);
    render();
  }
}

/** The model's input and the rank of each of its pixels. */
async function prepare(body) {
  const explained = body.results[0].explanations[0];
  const { data, width, height, media_type: type } = explained.overlay;
  const image = new Image();
  image.src = `data:${type};base64,${data}`;
  await image.decode();
  const context = h("canvas", { width, height }).getContext("2d");
  context.drawImage(image, 0, 0);
  const large = enlarge(decode(explained.values), width, height).data;
  const order = Uint32Array.from(large.keys()).sort((a, b) => large[b] - large[a] || a - b);
  return { explained, order, pixels: context.getImageData(0, 0, width, height), grey: meanColour(card()?.input) };
}

/** The colour that replaces deleted pixels: the mean that the network was trained with. */
function meanColour({ mean = [0.5], order = "rgb" } = {}) {
  const shades = mean.length === 3 ? mean : [mean[0], mean[0], mean[0]];
  return (order === "bgr" ? shades.toReversed() : shades).map((shade) => Math.round(255 * shade));
}

function show() {
  const { explained } = measured;
  const { deletion, insertion } = explained.faithfulness;
  measured.charts = [["Deletion: what is left of the probability", deletion], ["Insertion: what comes back of it", insertion]]
    .filter(([, measure]) => measure?.curve)
    .map(([title, { curve }]) => lineChart({
      title, range: [0, Math.max(0.05, ...curve.value, ...curve.random)], format: percent, ticks: TICKS, size: [480, 180],
      lines: [{ label: "random pixels", kind: "random", x: curve.share, y: curve.random }, { label: "this map's pixels", kind: "map", x: curve.share, y: curve.value }],
    }));
  const slider = h("input", { type: "range", id: "share", min: "0", max: "100", "aria-describedby": "left-over", oninput: () => {
    cancelAnimationFrame(playing);
    set({ share: Number(slider.value) / 100 });
  } });
  const { width, height } = measured.pixels;
  find("#view-truth").replaceChildren(
    h("p", { class: "verdict", id: "verdict" }, verdict(explained)),
    h("div", { class: "proof" },
      h("figure", { class: "deleting" },
        h("canvas", { id: "deleted", width, height, role: "img", "aria-label": "The model's input without its strongest pixels" }),
        h("div", { class: "slider" }, button("Play", play, { id: "play" }), h("label", {}, h("span", { class: "spoken" }, "Share of pixels deleted"), slider)),
        h("figcaption", { id: "left-over", "aria-live": "polite" }),
      ),
      h("div", { class: "charts two" }, ...measured.charts.map(({ element }) => element)),
    ),
    table(explained.faithfulness),
  );
  drawShare();
}

function verdict({ faithfulness: { deletion, insertion }, target }) {
  const wins = [deletion.value < deletion.random, insertion.value > insertion.random].filter(Boolean).length;
  const start = ["No: by both measures the map does no better than chance.", "Partly: by one of the two measures it beats chance.", "Yes: by both measures it beats chance."][wins];
  if (!deletion.curve) return start;
  const at = (line) => percent(interpolate(deletion.curve.share, line, 0.1));
  return `${start} Without its first 10 % of pixels, ${target.label} falls from ${percent(target.probability)} to ${at(deletion.curve.value)}; without a random 10 %, to ${at(deletion.curve.random)}.`;
}

function table(faithfulness) {
  const rows = Object.entries(faithfulness).map(([name, { value, random }]) =>
    h("tr", {}, h("th", { scope: "row" }, MEASURES[name][0], h("small", {}, MEASURES[name][1])), h("td", {}, shown(value)), h("td", {}, shown(random))),
  );
  return h("table", { class: "measures" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Measure"), h("th", { scope: "col" }, "This map"), h("th", { scope: "col" }, "Random map"))), h("tbody", {}, ...rows));
}

/** Draw the input without its first pixels, and mark the place on the curves. */
function drawShare() {
  if (!measured || !find("#deleted")) return;
  const { order, pixels, grey, charts, explained } = measured;
  const left = new ImageData(new Uint8ClampedArray(pixels.data), pixels.width, pixels.height);
  for (const at of order.subarray(0, Math.round(state.share * order.length))) left.data.set(grey, 4 * at);
  find("#deleted").getContext("2d").putImageData(left, 0, 0);
  find("#share").value = Math.round(100 * state.share);
  for (const chart of charts) chart.mark(state.share);
  const { curve } = explained.faithfulness.deletion;
  const said = curve ? `: ${explained.target.label} ${percent(interpolate(curve.share, curve.value, state.share))}, with random pixels ${percent(interpolate(curve.share, curve.random, state.share))}` : "";
  find("#left-over").textContent = `${Math.round(100 * state.share)} % deleted${said}`;
}

function play() {
  cancelAnimationFrame(playing);
  const begun = performance.now();
  const step = (now) => {
    const share = Math.min(1, (now - begun) / PLAY_MS);
    set({ share: Math.round(share * 100) / 100 });
    if (share < 1) playing = requestAnimationFrame(step);
  };
  playing = requestAnimationFrame(step);
}
