// The pictures of this visit, and the answer about the current one.

import { post } from "./api.js";
import { isLong } from "./catalogue.js";
import { isCancelled } from "./errors.js";
import { Picture } from "./picture.js";
import { common, explainOptions } from "./request.js";
import { signal } from "./signal.js";
import { fresh, set, state, watch } from "./state.js";

const KEPT_ANSWERS = 24;
const ASKED_BY = ["model", "method", "layer", "target", "against", "samples", "off"];

/**
 * `current` is the picture that is shown; `answer` the last one about it, as `{ picture, options, body }`;
 * `before` its predictions with every channel on, while some are off.
 */
export const session = { pictures: [], current: null, answer: null, before: null, error: null };

export const onPictures = signal();
export const onAnswer = signal();
export const onProgress = signal();
export const onBusy = signal();
export const onError = signal();

let running = null;
let isDue = false;
const kept = new Map();

/** Take pictures; the first is shown, or all as a gallery. */
export function take(blobs, { sample = "" } = {}) {
  if (!blobs.length) return;
  performance.mark("heatlens:taken");
  const pictures = blobs.map((blob) => new Picture(blob, blob.name, sample));
  const isFirst = !session.pictures.length;
  session.pictures.push(...pictures);
  const patch = { sample: pictures.length === 1 ? sample : "", view: pictures.length > 1 ? "gallery" : state.view };
  if (patch.view === "gallery" && pictures.length === 1) patch.view = "look";
  open(pictures[0], isFirst ? patch : { ...patch, ...fresh() });
}

/** Show one of the pictures. */
export function open(picture, patch = { sample: picture.sample, ...fresh() }) {
  session.current = picture;
  session.answer = session.before = null;
  set(patch);
  onPictures.emit();
  askSoon();
}

/** Put all pictures away. */
export function clear() {
  running?.abort();
  for (const picture of session.pictures) picture.release();
  Object.assign(session, { pictures: [], current: null, answer: null, before: null });
  kept.clear();
  set({ view: "look", sample: "", ...fresh() });
  onPictures.emit();
}

/** Ask once for all that changes at the same time. */
function askSoon() {
  if (isDue) return;
  isDue = true;
  queueMicrotask(() => {
    isDue = false;
    explain();
  });
}

/** Ask what the state asks about the current picture; an earlier question that is still open is dropped. */
export async function explain() {
  running?.abort();
  const picture = session.current;
  if (!picture) return;
  const controller = (running = new AbortController());
  const options = explainOptions();
  const stop = () => controller.abort();
  onBusy.emit(true, stop);
  onError.emit(null);
  try {
    const body = await answerFor(picture, options, controller.signal);
    await compareBefore(picture, body, controller.signal);
    if (running === controller) finish({ picture, options, body });
  } catch (error) {
    if (running === controller && !isCancelled(error)) onError.emit(error);
  } finally {
    if (running === controller) running = null;
    onBusy.emit(false, stop);
  }
}

/** An answer, from those kept or from the service; long methods show how far they are. */
export async function answerFor(picture, options, abort, { follow = isLong(options.methods[0]), whenPartial } = {}) {
  const name = picture.id + JSON.stringify(options);
  if (kept.has(name)) return kept.get(name);
  const showPartial = whenPartial ?? ((partial) => finish({ picture, options, body: partial, isPartial: true }));
  const streaming = follow && {
    onProgress: onProgress.emit,
    onPartial: ({ explanation }) => showPartial(partialBody(explanation)),
  };
  const asked = follow ? { ...options, partial_maps: true } : options;
  const body = await post("v1/explain", [picture], asked, { signal: abort, ...streaming });
  kept.set(name, body);
  if (kept.size > KEPT_ANSWERS) kept.delete(kept.keys().next().value);
  return body;
}

function finish(answer) {
  session.answer = answer;
  if (!answer.isPartial) answer.picture.result = answer.body.results[0];
  onAnswer.emit();
}

/** An answer in which only the map is new. */
function partialBody(explanation) {
  const known = session.answer?.body ?? { results: [{ predictions: [] }] };
  return { ...known, results: [{ ...known.results[0], explanations: [explanation] }] };
}

/** While channels are off, know what the model said with all of them on. */
async function compareBefore(picture, body, abort) {
  if (!state.off) {
    session.before = null;
    return;
  }
  if (session.before) return;
  const { interventions, ...options } = common();
  const plain = await post("v1/predict", [picture], { ...options, top_k: 10 }, { signal: abort });
  session.before = plain.results[0].predictions;
}

watch(ASKED_BY, askSoon);
