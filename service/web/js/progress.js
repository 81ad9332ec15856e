// How far a long method is, how long it will take, and the button that ends it.

import { method } from "./catalogue.js";
import { find } from "./dom.js";
import { onBusy, onProgress } from "./session.js";

const SLOW_MS = 400;

/** What is being done: for each, the function that stops it. */
const running = new Set();
let timer = 0;

export function openProgress() {
  find("#cancel").onclick = () => running.forEach((stop) => stop());
  onBusy.on(showBusy);
  onProgress.on(showProgress);
}

/** A quick answer shows no bar at all. */
function showBusy(isBusy, stop) {
  if (isBusy) running.add(stop);
  else running.delete(stop);
  find("#work").setAttribute("aria-busy", String(running.size > 0));
  clearTimeout(timer);
  if (running.size) timer = setTimeout(showWorking, SLOW_MS);
  else find("#progress").hidden = true;
}

function showWorking() {
  if (!find("#progress").hidden) return;
  find("#bar").removeAttribute("value");
  find("#far").textContent = "Working…";
  find("#progress").hidden = false;
}

function showProgress({ what, done, total, seconds_left: seconds }) {
  if (!running.size) return;
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
