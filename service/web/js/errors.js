// Errors as sentences that say what to do.

const ADVICE = {
  unreachable: "Check that it is running and that you are connected, then try again.",
  unreadable: "Something between this page and the service answered instead. Try again; if it stays, tell whoever runs it.",
  malformed_body: "Reload the page and try again.",
  unauthorized: "Ask whoever runs the service for a key, then try again.",
  forbidden: "Ask whoever runs the service for a key that may do this.",
  unknown_model: "Choose another model: this one is not served.",
  unknown_label: "Choose a class from the list.",
  unknown_layer: "Choose another layer in the layer tree.",
  body_too_large: "Send fewer or smaller pictures.",
  image_too_large: "Make the picture smaller and drop it again.",
  too_many_images: "Drop fewer pictures at once.",
  unsupported_media_type: "Use a JPEG, PNG, WebP, BMP, GIF or TIFF picture.",
  image_undecodable: "The file may be damaged. Open it in an image editor, save it as JPEG or PNG, and drop that.",
  image_too_small: "Use a larger picture.",
  target_out_of_range: "Choose another class.",
  method_not_applicable: "Choose another method.",
  invalid_option: "Change this setting and try again.",
  overloaded: "Many people are asking right now. Wait a moment, then try again.",
  deadline_exceeded: "Ask for fewer samples, or choose a faster method.",
  not_ready: "A model is still loading. Wait a few seconds, then try again.",
  model_replaced: "The model was just replaced. Try again.",
  draining: "The service is restarting. Wait a few seconds, then try again.",
  worker_lost: "The device stopped and is being restarted. Wait a few seconds, then try again.",
  input_quarantined: "This picture stopped the device before, so it is refused. Use another one.",
  internal: "Try again; if it happens again, tell whoever runs the service.",
};

/** Two sentences: what happened and what to do. */
export function sentence(error) {
  const what = error.message || `The answer (status ${error.status}) was not readable.`;
  return `${what} ${ADVICE[error.code] ?? ADVICE.internal}`;
}

/** Whether this is the page's own cancelling, not an error. */
export const isCancelled = (error) => error.name === "AbortError";
