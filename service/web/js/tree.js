// The model's layers as a tree; each layer with the strongest of its maps, drawn when it comes into sight.

import { card, layers } from "./catalogue.js";
import { button, h } from "./dom.js";
import { common } from "./request.js";
import { post } from "./api.js";
import { session } from "./session.js";
import { set, state } from "./state.js";

const AT_ONCE = 12;
const CHANNELS = 4;

const drawn = new Map();
let waiting = new Map();
let timer = 0;

const observer = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) want(target);
}, { rootMargin: "100px" });

/** The tree as a list of lists; `chosen` is the layer that is explained. */
export async function layerTree() {
  observer.disconnect();
  const rows = await layers();
  const root = { children: new Map() };
  for (const row of rows) place(root, row);
  const chosen = state.layer === "auto" ? card()?.target_layer : state.layer;
  return h("ul", { class: "tree", "aria-label": "Layers" }, ...[...root.children.values()].map((node) => toItem(node, chosen)));
}

function place(root, row) {
  let node = root;
  for (const part of row.name.split(".")) {
    if (!node.children.has(part)) node.children.set(part, { part, row: null, children: new Map() });
    node = node.children.get(part);
  }
  node.row = row;
}

function toItem({ part, row, children }, chosen) {
  const isOn = chosen === row?.name;
  const isInside = Boolean(row) && chosen?.startsWith(`${row.name}.`);
  const inner = children.size ? h("ul", { hidden: !isInside }) : null;
  const fill = () => inner.childElementCount || inner.append(...[...children.values()].map((node) => toItem(node, chosen)));
  if (isInside) fill();
  const twist = inner && h("button", {
    type: "button", class: "twist", "aria-expanded": String(isInside), "aria-label": `Layers in ${row?.name ?? part}`,
    onclick: () => {
      fill();
      inner.hidden = !inner.hidden;
      twist.setAttribute("aria-expanded", String(!inner.hidden));
    },
  });
  return h("li", {}, h("div", { class: "node" }, twist ?? h("span", { class: "twist" }), row ? toChoice(part, row, isOn) : h("span", {}, part)), inner);
}

function toChoice(part, row, isOn) {
  const canBe = row.spatial && row.usable;
  const image = canBe && row.output_shape.length === 3 && h("img", { alt: "", width: "34", height: "34", data: { layer: row.name } });
  if (image) observer.observe(image);
  return h(
    "button",
    {
      type: "button", class: "layer", "aria-pressed": String(isOn), disabled: !canBe, title: canBe ? row.name : `${row.name}: ${row.reason}`,
      onclick: () => set({ layer: row.recommended ? "auto" : row.name, channel: "", off: "" }),
    },
    image || h("span", { class: "blank" }),
    h("span", {}, h("b", {}, part), row.recommended && h("span", { class: "badge" }, "recommended"), h("small", {}, `${row.type} · ${row.output_shape.join(" × ") || "several outputs"}`)),
  );
}

/** Layers that come into sight together are asked for together. */
function want(image) {
  const name = image.dataset.layer;
  const key = `${session.current?.id} ${JSON.stringify(common())} ${name}`;
  if (drawn.has(key)) {
    image.src = drawn.get(key);
    return;
  }
  observer.unobserve(image);
  waiting.set(name, { image, key });
  clearTimeout(timer);
  timer = setTimeout(draw, 60);
}

async function draw() {
  const all = [...waiting.entries()];
  waiting = new Map();
  const picture = session.current;
  for (let i = 0; picture && i < all.length; i += AT_ONCE) {
    const some = new Map(all.slice(i, i + AT_ONCE));
    const options = { ...common(), layers: [...some.keys()], channels: CHANNELS, grid: true };
    try {
      const body = await post("v1/features", [picture], options);
      for (const { layer, grid } of body.results[0].features) show(some.get(layer), grid);
    } catch {
      // A thumbnail is a hint; the layer itself says what is wrong when it is chosen.
    }
  }
}

function show(wanted, grid) {
  if (!wanted || !grid) return;
  const url = `data:${grid.media_type};base64,${grid.data}`;
  drawn.set(wanted.key, url);
  wanted.image.src = url;
}
