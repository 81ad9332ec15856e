// The options of a request, from the state.

import { isLong, method } from "./catalogue.js";
import { list, state } from "./state.js";

const LONG_S = 300;

/** Options of `/v1/explain` for what the state asks; `extra` adds to them or replaces them. */
export function explainOptions(extra = {}) {
  const chosen = {
    methods: [state.method],
    targets: [target()],
    layers: [state.layer],
    outputs: ["values"],
    top_k: state.off ? 100 : 10,
    statistics: false,
    ...common(),
    ...extra,
  };
  if (state.samples && chosen.methods.some((name) => method(name)?.defaults.samples)) chosen.samples = state.samples;
  if (chosen.methods.some(isLong)) chosen.timeout_s = LONG_S;
  return chosen;
}

/** Options that every request shares. */
export function common() {
  const found = {};
  if (state.model) found.model = state.model;
  const off = switchedOff();
  if (off) found.interventions = [{ ...off, op: "zero" }];
  return found;
}

/** The target that the state asks for. */
export function target() {
  return state.against ? { class: classOf(state.target), against: [classOf(state.against)] } : classOf(state.target);
}

/** The channels that are switched off: { layer, channels }, or null. */
export function switchedOff() {
  const at = state.off.lastIndexOf(":");
  if (at < 0) return null;
  const channels = list(state.off.slice(at + 1)).map(Number);
  return channels.length ? { layer: state.off.slice(0, at), channels } : null;
}

/** Switch a channel of a layer off, or on again; only one layer has channels that are off. */
export function toggled(layer, channel) {
  const now = switchedOff();
  const channels = new Set(now?.layer === layer ? now.channels : []);
  if (!channels.delete(channel)) channels.add(channel);
  return channels.size ? `${layer}:${[...channels].join(",")}` : "";
}

const classOf = (text) => (/^\d+$/.test(text) ? Number(text) : text);
