// Small line charts as SVG.

import { h, s } from "./dom.js";
import { shown } from "./stage.js";

const PAD = { left: 38, right: 8, top: 8, bottom: 22 };

/**
 * A chart of lines that share their axes.
 *
 * `lines` are { label, kind, x, y } with x from 0 to 1; `range` the values of the axis; `ticks` texts of the x axis;
 * `size` about the pixels that it will fill, so that texts have the page's size.
 */
export function lineChart({ title, lines, range, format = shown, ticks, size: [width, height] = [260, 140] }) {
  const inner = { width: width - PAD.left - PAD.right, height: height - PAD.top - PAD.bottom };
  const [low, high] = range ?? extent(lines.flatMap(({ y }) => y));
  const at = (x, y) => [PAD.left + x * inner.width, PAD.top + (1 - (y - low) / (high - low || 1)) * inner.height];
  const grid = [low, (low + high) / 2, high].map((value) => {
    const [, y] = at(0, value);
    return [
      s("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y, y2: y }),
      s("text", { x: PAD.left - 5, y: y + 3.5, "text-anchor": "end" }, format(value)),
    ];
  });
  const feet = ticks.map((text, i) => {
    const anchor = i === 0 ? "start" : i === ticks.length - 1 ? "end" : "middle";
    return s("text", { x: PAD.left + (i / (ticks.length - 1)) * inner.width, y: height - 6, "text-anchor": anchor }, text);
  });
  const paths = lines.map(({ kind, x, y }) =>
    s("path", { class: `line ${kind}`, d: x.map((share, i) => `${i ? "L" : "M"}${at(share, y[i]).map((n) => n.toFixed(1)).join(" ")}`).join("") }),
  );
  const marker = s("g", { class: "marker" });
  const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${describe(lines, format)}` }, ...grid.flat(), ...feet, ...paths, marker);
  const legend = lines.length > 1 && h("p", { class: "key" }, ...lines.map(({ label, kind }) => h("span", { class: kind }, label)));
  const element = h("figure", { class: "chart" }, h("figcaption", {}, title), picture, legend);

  /** Mark a place of the x axis on every line. */
  const mark = (share) => {
    const points = lines.map(({ kind, x, y }) => {
      const [px, py] = at(share, interpolate(x, y, share));
      return s("circle", { class: kind, cx: px, cy: py, r: 3.5 });
    });
    const [px] = at(share, low);
    marker.replaceChildren(s("line", { x1: px, x2: px, y1: PAD.top, y2: PAD.top + inner.height }), ...points);
  };
  return { element, mark };
}

/** The value of a line at a place between its points. */
export function interpolate(x, y, share) {
  const next = x.findIndex((value) => value >= share);
  if (next <= 0) return next ? y[y.length - 1] : y[0];
  const part = (share - x[next - 1]) / (x[next] - x[next - 1]);
  return y[next - 1] + part * (y[next] - y[next - 1]);
}

function extent(values) {
  const low = Math.min(0, ...values);
  return [low, Math.max(...values, low + 1e-9)];
}

const describe = (lines, format) =>
  lines.map(({ label, y }) => `${label} from ${format(y[0])} to ${format(y[y.length - 1])}`).join("; ");
