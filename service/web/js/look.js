// The picture, large, under its heatmap.

import { card, method } from "./catalogue.js";
import { find } from "./dom.js";
import { decode } from "./heatmap.js";
import { onAnswer, onPictures, session } from "./session.js";
import { Stage } from "./stage.js";

let stage;

export function openLook() {
  stage = new Stage("Picture and heatmap. Arrow keys read the map's values.");
  find("#view-look").append(stage.element);
  onPictures.on(() => session.current && stage.setPicture(session.current));
  onAnswer.on(showAnswer);
}

/** How a map of an explanation is to be drawn. */
export const lookOf = (explained) => ({
  signed: explained.signed,
  ofPixels: method(explained.method)?.family === "pixels",
  peak: explained.peak,
  box: explained.box,
});

/** The class, method and layer of an explanation as a line of text. */
export function caption(explained) {
  const title = method(explained.method)?.title ?? explained.method;
  return explained.layer && explained.layer !== card()?.target_layer ? `${title} at ${explained.layer}` : title;
}

function showAnswer() {
  const { image, explanations } = session.answer.body.results[0];
  const explained = explanations?.[0];
  if (!image || !explained) return;
  stage.setMap(explained.degenerate ? null : decode(explained.values), image, lookOf(explained));
  stage.image.alt = `${session.current.name}: ${caption(explained)} for ${explained.target.label}`;
  // The next frame begins when this one has been painted.
  requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("heatlens:shown")));
}
