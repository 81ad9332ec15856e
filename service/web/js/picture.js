// A picture that someone gave the page: its bytes, and how it is shown.

import { post } from "./api.js";

let count = 0;

export class Picture {
  /** `sample` is the name of the page's own picture that this is, if it is one. */
  constructor(blob, name, sample = "") {
    this.id = `picture-${(count += 1)}`;
    this.blob = blob;
    this.name = name || "picture.png";
    this.sample = sample;
    this.url = URL.createObjectURL(blob);
    this.result = null;
    this.error = null;
  }

  /** Show it in an `img`. What the browser cannot decode (TIFF), the service draws. */
  async showIn(image) {
    image.src = this.url;
    try {
      await image.decode();
    } catch {
      if (!this.drawn) this.drawn = this.#draw();
      image.src = this.url = await this.drawn;
      await image.decode();
    }
  }

  async #draw() {
    const options = { outputs: ["overlay"], canvas: "original", alpha: 0, overlay_format: "webp", statistics: false };
    const answer = await post("v1/explain", [this], options);
    const { media_type: type, data } = answer.results[0].explanations[0].overlay;
    return `data:${type};base64,${data}`;
  }

  release() {
    URL.revokeObjectURL(this.url);
  }
}

/** An `img` of a picture, decoded. */
export async function imageOf(picture) {
  const image = new Image();
  await picture.showIn(image);
  return image;
}
