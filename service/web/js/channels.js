// The strongest channels of a layer as thumbnails: see one over the picture, or switch it off.

import { post } from "./api.js";
import { catalogue } from "./catalogue.js";
import { button, h } from "./dom.js";
import { paint } from "./heatmap.js";
import { common, switchedOff, target, toggled } from "./request.js";
import { shown } from "./stage.js";
import { set, state } from "./state.js";

export const CHANNELS = 24;

/** The strongest channels of a layer: [{ index, mean, max, weight, map }] with maps from 0 to 1. */
export async function topChannels(picture, layer, signal) {
  const { interventions, ...options } = common();
  const asked = { ...options, layers: [layer], targets: [target()], channels: CHANNELS, grid: true, colormap: "gray" };
  const body = await post("v1/features", [picture], asked, { signal });
  const [found] = body.results[0].features;
  const maps = found.grid ? await tiles(found.grid, found.top_channels.length, found.shape) : [];
  const channels = found.top_channels.map((channel, i) => ({ ...channel, map: maps[i] }));
  return { channels, shape: found.shape, statistics: found, image: body.results[0].image };
}

/** A map from 0 to 1 for each tile of a grey grid: it is enlarged by a whole factor, with gaps of 2 pixels. */
async function tiles(grid, count, [, height, width]) {
  const image = new Image();
  image.src = `data:${grid.media_type};base64,${grid.data}`;
  await image.decode();
  const context = h("canvas", { width: grid.width, height: grid.height }).getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const columns = Math.ceil(Math.sqrt(count));
  const factor = Math.round(((grid.width + 2) / columns - 2) / width);
  return Array.from({ length: count }, (_, i) => {
    const left = (i % columns) * (width * factor + 2);
    const top = Math.floor(i / columns) * (height * factor + 2);
    const pixels = context.getImageData(left, top, width * factor, height * factor).data;
    const data = new Float32Array(width * height);
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) data[y * width + x] = pixels[4 * (y * factor * width * factor + x * factor)] / 255;
    }
    return { width, height, data };
  });
}

/** Thumbnails of channels of a layer. */
export function thumbnails(layer, channels) {
  const off = switchedOff();
  const isOff = (index) => off?.layer === layer && off.channels.includes(index);
  return h("ul", { class: "channels" }, ...channels.map((channel) => toItem(layer, channel, isOff(channel.index))));
}

function toItem(layer, { index, max, mean, weight, map }, isOff) {
  const canvas = h("canvas", { "aria-hidden": "true" });
  if (map) {
    const data = Uint8ClampedArray.from(map.data, (value) => 255 * value);
    paint(canvas, { ...map, data, signed: false }, { colormap: state.colormap === "auto" && catalogue.colormaps.viridis ? "viridis" : state.colormap, opacity: 1 });
  }
  const isOpen = state.channel === String(index);
  const facts = `channel ${index}: max ${shown(max)}, mean ${shown(mean)}${weight == null ? "" : `, weight ${shown(weight)}`}`;
  return h(
    "li", { class: isOff ? "off" : "" },
    h("button", { type: "button", class: "channel", "aria-pressed": String(isOpen), "aria-label": `Show ${facts}`, title: facts, data: { key: `channel-${index}` }, onclick: () => set({ channel: isOpen ? "" : String(index) }) }, canvas, h("small", {}, `${index}`)),
    button(isOff ? "off" : "on", () => set({ off: toggled(layer, index) }), { class: "switch", "aria-label": `Channel ${index} is ${isOff ? "off: switch it on" : "on: switch it off"}`, data: { key: `switch-${index}` } }),
  );
}
