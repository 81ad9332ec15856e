// How far a long method is, how long it will take, and the button that ends it.

import { method } from "./catalogue.js";
import { find } from "./dom.js";
import { cancel as cancelAnswer, onBusy, onProgress } from "./session.js";

const SLOW_MS = 400;
let timer = 0;
let cancel = cancelAnswer;

export function openProgress() {
  find("#cancel").onclick = () => cancel();
  onBusy.on(showBusy);
  onProgress.on((data) => data && showProgress(data));
}

/** A quick answer shows no bar at all. `stop` ends what is busy. */
function showBusy(isBusy, stop = cancelAnswer) {
  cancel = stop;
  clearTimeout(timer);
  find("#work").setAttribute("aria-busy", String(isBusy));
  if (!isBusy) {
    find("#progress").hidden = true;
    return;
  }
  timer = setTimeout(() => {
    const bar = find("#bar");
    bar.removeAttribute("value");
    find("#far").textContent = "Working…";
    find("#progress").hidden = false;
  }, SLOW_MS);
}

function showProgress({ what, done, total, seconds_left: seconds }) {
  clearTimeout(timer);
  find("#progress").hidden = false;
  const bar = find("#bar");
  if (total) Object.assign(bar, { max: total, value: done });
  else bar.removeAttribute("value");
  const of = total ? `: ${done.toLocaleString("en")} of ${total.toLocaleString("en")}` : "";
  const left = seconds === null ? "" : ` · about ${duration(seconds)} left`;
  find("#far").textContent = `${method(what)?.title ?? capital(what)}${of}${left}`;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function duration(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  return whole < 90 ? `${whole} s` : `${Math.round(whole / 60)} min`;
}
