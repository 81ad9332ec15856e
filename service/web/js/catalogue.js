// What the service offers: models, methods, labels, layers, colour tables. Asked for once each.

import { get } from "./api.js";
import { state } from "./state.js";

const kept = new Map();

/** Models and methods; filled by `open`. */
export const catalogue = { cards: [], fallback: "", methods: [], colormaps: {} };

/** Load what the page needs before it can show anything. */
export async function open() {
  const [models, methods, tables] = await Promise.all([get("v1/models"), get("v1/methods"), get("page/colormaps.json")]);
  catalogue.cards = models.cards;
  catalogue.fallback = models.default;
  catalogue.methods = methods;
  for (const [name, text] of Object.entries(tables)) {
    catalogue.colormaps[name] = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  }
}

/** The card of the chosen model. */
export function card() {
  const name = state.model || catalogue.fallback;
  const byName = (c) => c.name === name || `${c.name}@${c.version}` === name;
  return catalogue.cards.find(byName) ?? catalogue.cards[0];
}

export const method = (name) => catalogue.methods.find((row) => row.name === name);

/** Whether a method takes long enough to show progress. */
export const isLong = (name) => ["many", "passes"].includes(method(name)?.cost);

/** Methods with the reason why the chosen model cannot use one, if so: [row, reason]. */
export function supported() {
  const rows = new Map((card()?.methods ?? []).map((row) => [row.name, row]));
  return catalogue.methods.map((row) => {
    const found = rows.get(row.name);
    return [row, found && !found.applicable ? (found.reason ?? "not applicable") : ""];
  });
}

export const labels = () => once(`v1/models/${modelPath()}/labels`);
export const layers = () => once(`v1/models/${modelPath()}/layers`);

const modelPath = () => encodeURIComponent(state.model || catalogue.fallback);

function once(path) {
  if (!kept.has(path)) {
    const asked = get(path);
    asked.catch(() => kept.delete(path));
    kept.set(path, asked);
  }
  return kept.get(path);
}
