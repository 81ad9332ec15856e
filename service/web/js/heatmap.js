// From a map's raw values to coloured pixels, as the service draws them: enlarge, normalise, colour.

import { catalogue } from "./catalogue.js";

// Beyond this the browser enlarges, which looks the same and costs nothing.
const SIDE = 256;

/** The strongest share of single-pixel maps that saturates; without it a few pixels hide all others. */
const PIXEL_CLIP = 0.01;

/** Decode `values` of an explanation: { width, height, data }. */
export function decode({ shape: [height, width], data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  return { width, height, data: new Float32Array(bytes.buffer) };
}

/** Enlarge bilinearly between pixel centres. */
export function enlarge(map, width, height) {
  const columns = weights(map.width, width);
  const rows = weights(map.height, height);
  const data = new Float32Array(width * height);
  for (let y = 0; y < height; y += 1) {
    const top = rows.low[y] * map.width;
    const bottom = rows.high[y] * map.width;
    for (let x = 0; x < width; x += 1) {
      const left = columns.low[x];
      const right = columns.high[x];
      const share = columns.share[x];
      const above = map.data[top + left] * (1 - share) + map.data[top + right] * share;
      const below = map.data[bottom + left] * (1 - share) + map.data[bottom + right] * share;
      data[y * width + x] = above * (1 - rows.share[y]) + below * rows.share[y];
    }
  }
  return { width, height, data };
}

/** Levels 0 to 255 of a map, enlarged to about the shape of its region; null if it shows nothing. */
export function levels(map, { aspect, signed, ofPixels }) {
  const long = Math.max(SIDE, map.width, map.height);
  const width = Math.max(1, Math.round(aspect >= 1 ? long : long * aspect));
  const height = Math.max(1, Math.round(aspect >= 1 ? long / aspect : long));
  const large = enlarge(map, width, height);
  const [low, high] = bounds(large.data, signed, ofPixels ? PIXEL_CLIP : 0);
  if (!(high > low)) return null;
  const data = new Uint8ClampedArray(large.data.length);
  for (let i = 0; i < data.length; i += 1) data[i] = Math.round((255 * (large.data[i] - low)) / (high - low));
  return { width, height, data, signed };
}

/** Paint levels on a canvas. At half opacity a pixel is as opaque as it is strong; above, all become opaque. */
export function paint(canvas, shaded, { colormap, opacity }) {
  canvas.width = shaded.width;
  canvas.height = shaded.height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(shaded.width, shaded.height);
  const pixels = new Uint32Array(image.data.buffer);
  const colours = palette(colormap, shaded.signed, opacity);
  for (let i = 0; i < pixels.length; i += 1) pixels[i] = colours[shaded.data[i]];
  context.putImageData(image, 0, 0);
}

/** The name of the colours that `auto` stands for. */
export const colours = (name, signed) => (name !== "auto" && catalogue.colormaps[name] ? name : signed ? "coolwarm" : "turbo");

/** 256 RGBA colours as one number each. */
function palette(name, signed, opacity) {
  const table = catalogue.colormaps[colours(name, signed)];
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const strength = signed ? Math.min(1, Math.abs(i - 128) / 127) : i / 255;
    const alpha = opacity <= 0.5 ? 2 * opacity * strength : strength + (2 * opacity - 1) * (1 - strength);
    const [red, green, blue] = table.subarray(3 * i, 3 * i + 3);
    return ((Math.round(255 * alpha) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  });
}

function bounds(data, signed, clip) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of data) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const greatest = Math.max(Math.abs(low), Math.abs(high));
  if (!(high - low > 5e-7 * greatest)) return [0, 0];
  let limit = signed ? greatest : high;
  const count = Math.floor(clip * data.length);
  if (count) {
    const sorted = Float32Array.from(data, signed ? Math.abs : undefined).sort();
    const found = sorted[sorted.length - 1 - count];
    if (found > (signed ? 0 : low)) limit = found;
  }
  return signed ? [-limit, limit] : [low, limit];
}

function weights(source, target) {
  const low = new Uint16Array(target);
  const high = new Uint16Array(target);
  const share = new Float32Array(target);
  for (let i = 0; i < target; i += 1) {
    const position = Math.min(source - 1, Math.max(0, ((i + 0.5) * source) / target - 0.5));
    low[i] = Math.floor(position);
    high[i] = Math.min(low[i] + 1, source - 1);
    share[i] = position - low[i];
  }
  return { low, high, share };
}
