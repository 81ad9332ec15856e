// What people take along: the picture under its map, the answer as JSON, and a one-page record to print.

import { method } from "./catalogue.js";
import { snippets } from "./code.js";
import { openCode } from "./dialogs.js";
import { button, find, h } from "./dom.js";
import { decode, levels, paint } from "./heatmap.js";
import { caption, lookOf } from "./look.js";
import { imageOf } from "./picture.js";
import { percent, question } from "./predictions.js";
import { explainOptions } from "./request.js";
import { onAnswer, onPictures, session } from "./session.js";
import { shown } from "./stage.js";
import { address, state } from "./state.js";
import { measurement } from "./truth.js";

const MOST_PIXELS = 2048;

export function openExport() {
  const request = () => ({ name: session.current.name, options: explainOptions() });
  find("#actions").append(
    button("Copy as code", () => openCode(request())),
    button("PNG", savePicture, { "aria-label": "Download PNG" }),
    button("JSON", saveAnswer, { "aria-label": "Download JSON" }),
    button("Record", saveRecord, { "aria-label": "Download a one-page record" }),
  );
  onPictures.on(() => (find("#actions").hidden = true));
  onAnswer.on(() => (find("#actions").hidden = Boolean(session.answer.isPartial)));
  find("#actions").hidden = true;
}

const stem = () => session.current.name.replace(/\.[^.]*$/, "");

async function savePicture() {
  const canvas = await drawn();
  canvas.toBlob((blob) => save(blob, `${stem()}-${state.method}.png`), "image/png");
}

function saveAnswer() {
  const text = JSON.stringify(session.answer.body, null, 2);
  save(new Blob([text], { type: "application/json" }), `${stem()}-${state.method}.json`);
}

/** The picture under its map as it is seen now, on a canvas. */
async function drawn({ withMap = true } = {}) {
  const image = await imageOf(session.current);
  const scale = Math.min(1, MOST_PIXELS / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = h("canvas", { width: Math.round(image.naturalWidth * scale), height: Math.round(image.naturalHeight * scale) });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const { image: info, explanations: [explained] } = session.answer.body.results[0];
  if (!withMap || explained.degenerate) return canvas;
  const shaded = levels(decode(explained.values), { aspect: info.region.width / info.region.height, ...lookOf(explained) });
  if (!shaded) return canvas;
  const map = h("canvas");
  paint(map, shaded, state);
  const across = canvas.width / info.width;
  const down = canvas.height / info.height;
  const { x, y, width, height } = info.region;
  context.drawImage(map, x * across, y * down, width * across, height * down);
  if (state.marks && explained.box) drawMarks(context, explained, across, down);
  return canvas;
}

function drawMarks(context, { peak, box }, across, down) {
  const size = Math.max(context.canvas.width, context.canvas.height) / 60;
  for (const [colour, width] of [["rgb(0 0 0 / 60%)", size / 2], ["#fff", size / 5]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(box.x * across, box.y * down, box.width * across, box.height * down);
    context.beginPath();
    context.moveTo(peak.x * across - size, peak.y * down);
    context.lineTo(peak.x * across + size, peak.y * down);
    context.moveTo(peak.x * across, peak.y * down - size);
    context.lineTo(peak.x * across, peak.y * down + size);
    context.stroke();
  }
}

/** One file that needs nothing else: pictures, numbers, and what it takes to ask again. */
async function saveRecord() {
  const style = await (await fetch("page/css/record.css")).text();
  const [plain, mapped] = [await drawn({ withMap: false }), await drawn()].map((canvas) => canvas.toDataURL("image/jpeg", 0.88));
  const body = record(session.answer, plain, mapped);
  const charts = [...document.querySelectorAll("#view-truth .chart")].map((chart) => chart.outerHTML).join("");
  const title = h("title", {}, `Heatlens: ${session.current.name}`).outerHTML;
  const html = `<!doctype html><html lang="en"><head><meta charset="utf-8">${title}<style>${style}</style></head><body>${body.outerHTML}<div class="charts">${charts}</div></body></html>`;
  save(new Blob([html], { type: "text/html" }), `${stem()}-${state.method}.html`);
}

function record({ picture, options, body }, plain, mapped) {
  const result = body.results[0];
  const explained = result.explanations[0];
  const [chosen, other] = question();
  const row = method(explained.method);
  const facts = {
    Picture: `${picture.name}, ${result.image.width} × ${result.image.height}`,
    Model: `${body.model.name}, version ${body.model.version}, ${body.model.precision} on ${body.model.device}`,
    Method: `${row.title} (${row.paper})`,
    Formula: row.formula,
    Layer: explained.layer || "the input itself",
    Values: `${shown(explained.range.min)} to ${shown(explained.range.max)}`,
    Peak: explained.peak ? `${Math.round(explained.peak.x)}, ${Math.round(explained.peak.y)}` : "none",
    Faithfulness: Object.entries(measurement()).map(([name, { value, random }]) => `${name} ${shown(value)} (random ${shown(random)})`).join("; "),
    Request: `${body.request_id}, ${new Date().toISOString().slice(0, 16).replace("T", " ")} UTC`,
    Link: address(),
  };
  const bars = result.predictions.slice(0, 5).map(({ label, probability }) =>
    h("tr", {}, h("th", {}, label), h("td", {}, h("meter", { min: "0", max: "1", value: probability.toFixed(4) })), h("td", {}, percent(probability))),
  );
  return h(
    "main", {},
    h("h1", {}, `Why ${chosen}${other ? ` and not ${other}` : ""}?`),
    h("div", { class: "pictures" }, h("img", { src: plain, alt: "The picture" }), h("img", { src: mapped, alt: `The picture under its map: ${caption(explained)}` })),
    h("table", {}, ...bars),
    h("dl", {}, ...Object.entries(facts).filter(([, text]) => text).flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
    h("pre", {}, snippets({ name: picture.name, options }).curl),
  );
}

function save(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
