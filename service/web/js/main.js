// The page's beginning: load what the service offers, open every part, follow the state.

import { onKeyNeeded } from "./api.js";
import { open as openCatalogue } from "./catalogue.js";
import { openCompare } from "./compare.js";
import { openControls } from "./controls.js";
import { askForKey } from "./dialogs.js";
import { find } from "./dom.js";
import { sentence } from "./errors.js";
import { openExport } from "./export.js";
import { openGallery } from "./gallery.js";
import { openIntake } from "./intake.js";
import { openLayers } from "./layers.js";
import { openLook } from "./look.js";
import { openPredictions } from "./predictions.js";
import { openProgress } from "./progress.js";
import { clear, explain, onError, onPictures, session } from "./session.js";
import { set, state, VIEWS, watch } from "./state.js";
import { openTheme } from "./theme.js";
import { openTruth } from "./truth.js";

openTheme();
onKeyNeeded(askForKey);
onError.on((error) => report(error ? sentence(error) : "", explain));
start();

async function start() {
  try {
    await openCatalogue();
  } catch (error) {
    report(sentence(error), start);
    return;
  }
  report("");
  openControls();
  openPredictions();
  openProgress();
  for (const openView of [openLook, openCompare, openLayers, openTruth, openGallery, openExport]) openView();
  openTabs();
  onPictures.on(showPictures);
  find("#new").onclick = clear;
  openIntake(report);
  showPictures();
}

/** Say in words what went wrong; `again` is offered as a button. */
function report(text, again) {
  find("#problem").hidden = !text;
  find("#problem-text").textContent = text;
  find("#again").hidden = !again;
  find("#again").onclick = again;
}

function showPictures() {
  const isEmpty = !session.pictures.length;
  document.body.classList.toggle("empty", isEmpty);
  find("#welcome").hidden = !isEmpty;
  find("#work").hidden = find("#new").hidden = isEmpty;
  find("#tab-gallery").hidden = session.pictures.length < 2;
}

function openTabs() {
  const tabs = VIEWS.map((view) => find(`#tab-${view}`));
  tabs.forEach((tab, i) => {
    tab.onclick = () => set({ view: VIEWS[i] });
    tab.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const open = tabs.filter((other) => !other.hidden);
      const next = open[(open.indexOf(tab) + step + open.length) % open.length];
      next.focus();
      next.click();
    };
  });
  watch(["view"], showView);
  showView();
}

function showView() {
  for (const view of VIEWS) {
    const isOpen = view === state.view;
    const tab = find(`#tab-${view}`);
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
    find(`#view-${view}`).hidden = !isOpen;
  }
  document.body.dataset.view = state.view;
}
