// What the page shows, except for the pictures. Kept in the URL's hash, so that a link shows the same.

export const VIEWS = ["look", "compare", "layers", "truth", "gallery"];

const DEFAULTS = {
  view: "look",
  sample: "",
  model: "",
  method: "gradcam",
  layer: "auto",
  target: "top1",
  against: "",
  samples: 0,
  off: "",
  channel: "",
  colormap: "auto",
  opacity: 0.4,
  swipe: -1,
  marks: 0,
  axis: "methods",
  items: "",
  truth: 0,
  share: 0,
  order: "confident",
};

// Browsers throttle changes of the address, and a slider makes many.
const SETTLE_MS = 120;

const watchers = [];
let timer = 0;

/** The state. Only `set` changes it. */
export const state = { ...DEFAULTS, ...read() };

/** Change the state; whoever watches a changed key is told. */
export function set(patch) {
  const changed = Object.keys(patch).filter((key) => patch[key] !== state[key]);
  if (!changed.length) return;
  Object.assign(state, patch);
  clearTimeout(timer);
  if (changed.includes("view")) write("pushState");
  else timer = setTimeout(write, SETTLE_MS, "replaceState");
  tell(changed);
}

/** Run `reaction` after any of `keys` has changed. */
export function watch(keys, reaction) {
  watchers.push({ keys, reaction });
}

/** Numbers or names of a state value that holds several. */
export const list = (value) => value.split(",").filter(Boolean);

/** What asking anew begins with: the class, the layer and the channels of another model or picture mean nothing. */
export const fresh = () => ({ target: "top1", against: "", off: "", channel: "", truth: 0, share: 0 });

/** The address of this page, state included. */
export function address() {
  write("replaceState");
  return location.href;
}

function tell(changed) {
  for (const { keys, reaction } of watchers) {
    if (keys.some((key) => changed.includes(key))) reaction();
  }
}

function read() {
  const found = {};
  for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
    if (!(key in DEFAULTS)) continue;
    const isNumber = typeof DEFAULTS[key] === "number";
    const value = isNumber ? Number(text) : text;
    if (isNumber ? Number.isFinite(value) : key !== "view" || VIEWS.includes(value)) found[key] = value;
  }
  return found;
}

function write(how) {
  const hash = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (value !== DEFAULTS[key]) hash.set(key, value);
  }
  const text = hash.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
  history[how](null, "", text ? `#${text}` : location.pathname + location.search);
}

function restore() {
  const next = { ...DEFAULTS, ...read() };
  const changed = Object.keys(next).filter((key) => next[key] !== state[key]);
  Object.assign(state, next);
  tell(changed);
}

window.addEventListener("popstate", restore);
