// A picture under its heatmap: swipe between both, marks, and the raw value under the pointer.

import { h, s, setVariables } from "./dom.js";
import { colours, levels, paint } from "./heatmap.js";
import { set, state, watch } from "./state.js";

const stages = new Set();

/** The number as people read it: three digits. */
export const shown = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? `${Number(value.toPrecision(3))}` : value.toExponential(1)).replace("-", "−");

export class Stage {
  constructor(label) {
    this.image = h("img", { class: "picture", alt: "", draggable: "false" });
    this.canvas = h("canvas", { class: "heat", "aria-hidden": "true" });
    this.region = h("div", { class: "region" }, this.canvas);
    this.cover = h("div", { class: "cover" }, this.region);
    this.marks = s("svg", { class: "marks", "aria-hidden": "true", preserveAspectRatio: "none" });
    this.cell = h("div", { class: "cell", hidden: true });
    this.tip = h("div", { class: "tip", hidden: true });
    this.spoken = h("span", { class: "spoken", role: "status" });
    this.handle = swipeHandle(() => this.frame);
    this.frame = h(
      "div",
      { class: "frame", tabindex: "0", role: "group", "aria-label": label, ...this.#listeners() },
      this.image, this.cover, this.marks, this.cell, this.tip, this.handle,
    );
    this.element = h("div", { class: "stage" }, this.frame, this.spoken);
    this.map = this.info = null;
    stages.add(this);
  }

  remove() {
    stages.delete(this);
    this.element.remove();
  }

  /** Show a picture, without a map yet. */
  async setPicture(picture) {
    if (this.picture === picture) return;
    this.picture = picture;
    this.info = null;
    this.setMap(null);
    this.image.alt = picture.name;
    // The answer about a picture that cannot be read says so; here is nothing to add.
    await picture.showIn(this.image).catch(() => {});
    if (!this.info) this.#fit(this.image.naturalWidth, this.image.naturalHeight);
  }

  /**
   * Lay a map over the picture.
   *
   * `info` is the answer's `image`; `map` the raw values; `look` says `signed`, `ofPixels`, and may have `peak`
   * and `box`.
   */
  setMap(map, info = this.info, look = {}) {
    Object.assign(this, { map, info, look });
    this.cell.hidden = this.tip.hidden = true;
    if (info) {
      this.#fit(info.width, info.height);
      const { x, y, width, height } = info.region;
      const share = { "--x": x / info.width, "--y": y / info.height, "--w": width / info.width, "--h": height / info.height };
      setVariables(this.region, share);
    }
    const aspect = info ? info.region.width / info.region.height : 1;
    this.levels = map && levels(map, { aspect, ...look });
    this.paint();
    this.drawMarks();
    this.swipe();
  }

  paint() {
    this.region.hidden = !this.levels;
    if (this.levels) paint(this.canvas, this.levels, state);
  }

  /** Peak and box of the map, where the state shows them. */
  drawMarks() {
    this.marks.replaceChildren();
    const { peak, box } = this.look ?? {};
    if (!state.marks || !this.info || !peak) return;
    this.marks.setAttribute("viewBox", `0 0 ${this.info.width} ${this.info.height}`);
    const size = Math.max(this.info.width, this.info.height) / 60;
    for (const kind of ["under", "over"]) {
      this.marks.append(
        s("rect", { class: kind, x: box.x, y: box.y, width: box.width, height: box.height, rx: size / 3 }),
        s("path", { class: kind, d: `M${peak.x - size} ${peak.y}h${2 * size}M${peak.x} ${peak.y - size}v${2 * size}` }),
      );
    }
  }

  swipe() {
    const isOn = state.swipe >= 0 && Boolean(this.levels);
    this.handle.hidden = !isOn;
    setVariables(this.frame, { "--swipe": `${isOn ? state.swipe : 0}%` });
    this.handle.setAttribute("aria-valuenow", Math.round(state.swipe));
  }

  /** Show the raw value at a place of the picture, given in shares of its sides; without one, hide it. */
  probe(place) {
    const cell = place && this.map && this.#cellAt(place);
    this.cell.hidden = this.tip.hidden = !cell;
    if (!cell) return;
    const { x, y, width, height } = this.info.region;
    const [w, hh] = [width / this.map.width / this.info.width, height / this.map.height / this.info.height];
    const corner = { "--x": x / this.info.width + cell.column * w, "--y": y / this.info.height + cell.row * hh };
    setVariables(this.cell, { ...corner, "--w": w, "--h": hh });
    setVariables(this.tip, { "--x": place.x, "--y": place.y });
    this.tip.dataset.side = place.x > 0.75 ? "left" : "right";
    this.tip.textContent = shown(cell.value);
  }

  #cellAt({ x, y }) {
    const { region, width, height } = this.info;
    const column = Math.floor(((x * width - region.x) / region.width) * this.map.width);
    const row = Math.floor(((y * height - region.y) / region.height) * this.map.height);
    const isInside = column >= 0 && row >= 0 && column < this.map.width && row < this.map.height;
    return isInside ? { column, row, value: this.map.data[row * this.map.width + column] } : null;
  }

  #fit(width, height) {
    setVariables(this.element, { "--aspect": width / height });
  }

  #listeners() {
    return {
      onpointermove: (event) => {
        const area = this.frame.getBoundingClientRect();
        this.#together({ x: (event.clientX - area.left) / area.width, y: (event.clientY - area.top) / area.height });
      },
      onpointerleave: () => this.#together(null),
      onblur: () => this.#together(null),
      onkeydown: (event) => this.#walk(event),
    };
  }

  /** Arrow keys walk from cell to cell. */
  #walk(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !this.map || event.target !== this.frame) return;
    event.preventDefault();
    const { region, width, height } = this.info;
    const at = this.walked ?? { column: this.map.width >> 1, row: this.map.height >> 1 };
    const limit = (value, count) => Math.min(count - 1, Math.max(0, value));
    this.walked = { column: limit(at.column + step[0], this.map.width), row: limit(at.row + step[1], this.map.height) };
    const x = (region.x + ((this.walked.column + 0.5) / this.map.width) * region.width) / width;
    const y = (region.y + ((this.walked.row + 0.5) / this.map.height) * region.height) / height;
    this.#together({ x, y });
    this.spoken.textContent = `Row ${this.walked.row + 1}, column ${this.walked.column + 1}: ${this.tip.textContent}`;
  }

  /** All maps of the same picture are probed at the same place. */
  #together(place) {
    for (const stage of stages) if (stage.picture === this.picture) stage.probe(place);
  }

  /** The name of the colours in which the map is drawn. */
  get colours() {
    return colours(state.colormap, Boolean(this.look?.signed));
  }
}

function swipeHandle(frame) {
  const move = (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const area = frame().getBoundingClientRect();
    set({ swipe: Math.round(Math.min(100, Math.max(0, ((event.clientX - area.left) / area.width) * 100))) });
  };
  const press = (event) => {
    const step = { ArrowLeft: -5, ArrowRight: 5, Home: -100, End: 100 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    set({ swipe: Math.min(100, Math.max(0, state.swipe + step)) });
  };
  const handle = h("div", {
    class: "handle", role: "slider", tabindex: "0", hidden: true,
    "aria-label": "Swipe between picture and heatmap", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": "50",
    onpointerdown: (event) => handle.setPointerCapture(event.pointerId),
    onpointermove: move,
    onkeydown: press,
  });
  return handle;
}

watch(["colormap", "opacity"], () => stages.forEach((stage) => stage.paint()));
watch(["swipe"], () => stages.forEach((stage) => stage.swipe()));
watch(["marks"], () => stages.forEach((stage) => stage.drawMarks()));
