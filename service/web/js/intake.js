// How pictures get in: dropped, pasted, chosen, photographed, or one of the samples.

import { button, find, h } from "./dom.js";
import { session, take } from "./session.js";
import { state } from "./state.js";

export const SAMPLES = {
  cat: { file: "cat.jpg", title: "A cat" },
  coffee: { file: "coffee.jpg", title: "A cup of coffee" },
};

export function openIntake(report) {
  openDrop();
  document.addEventListener("paste", (event) => takeFiles(event.clipboardData?.files ?? []));
  const chooser = find("#chooser");
  chooser.addEventListener("change", () => {
    takeFiles(chooser.files);
    chooser.value = "";
  });
  for (const opener of document.querySelectorAll("[data-choose]")) opener.onclick = () => chooser.click();
  for (const opener of document.querySelectorAll("[data-camera]")) opener.onclick = () => openCamera(report);
  find("#samples-list").append(...Object.entries(SAMPLES).map(([name, sample]) => sampleButton(name, sample, report)));
  if (SAMPLES[state.sample]) takeSample(state.sample, report);
}

function sampleButton(name, { file, title }, report) {
  const image = h("img", { src: `page/samples/${file}`, alt: "", width: "120", height: "90" });
  return h("button", { type: "button", class: "sample", onclick: () => takeSample(name, report) }, image, h("span", {}, title));
}

async function takeSample(name, report) {
  try {
    const { file } = SAMPLES[name];
    const response = await fetch(`page/samples/${file}`);
    take([new File([await response.blob()], file)], { sample: name });
  } catch {
    report("The sample could not be loaded. Check your connection, then try again.");
  }
}

function takeFiles(files) {
  const pictures = [...files].filter((file) => !file.type || file.type.startsWith("image/"));
  if (pictures.length) take(pictures);
}

function openDrop() {
  const veil = find("#veil");
  let depth = 0;
  const show = (isShown) => {
    veil.hidden = !isShown;
    if (!isShown) depth = 0;
  };
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (!holdsFiles(event)) return;
    depth += 1;
    show(true);
  });
  document.addEventListener("dragleave", () => {
    depth -= 1;
    if (depth <= 0) show(false);
  });
  document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    show(false);
    takeFiles(event.dataTransfer.files);
  });
}

/** Photograph in a dialog; where a page may not use the camera, the device's own app is asked. */
async function openCamera(report) {
  if (!navigator.mediaDevices?.getUserMedia) {
    find("#photographer").click();
    find("#photographer").onchange = (event) => takeFiles(event.target.files);
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: 1280 } });
  } catch {
    report("The camera cannot be used. Allow it for this page in the browser's settings, or choose a picture instead.");
    return;
  }
  const video = h("video", { autoplay: true, playsinline: true, muted: true, "aria-label": "What the camera sees" });
  video.srcObject = stream;
  const shoot = async () => {
    const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
    dialog.close();
    take([new File([blob], `photograph-${session.pictures.length + 1}.jpg`, { type: "image/jpeg" })]);
  };
  const dialog = h(
    "dialog", { class: "camera", "aria-label": "Take a photograph", onclose: stop }, video,
    h("div", { class: "actions" }, button("Take the photograph", shoot, { class: "primary", autofocus: true }), button("Cancel", () => dialog.close())),
  );
  function stop() {
    for (const track of stream.getTracks()) track.stop();
    dialog.remove();
  }
  document.body.append(dialog);
  dialog.showModal();
}
