// Requests to the service: the key, errors as `ApiError`, and answers that arrive as a stream of events.

let key = "";
let askForKey = async () => "";

/** An error that the service, or the way to it, answered with. */
export class ApiError extends Error {
  constructor({ error, code, field = "", status = 0, retryAfter = 0 }) {
    super(error);
    Object.assign(this, { code, field, status, retryAfter });
  }
}

/** Who is asked for a key when the service wants one. It is kept in this module's memory alone. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => Boolean(key);

export function forgetKey() {
  key = "";
}

/** GET a path below the page. */
export async function get(path) {
  return (await send(path, {})).json();
}

/**
 * POST pictures with options.
 *
 * With `onProgress` or `onPartial` the answer is asked for as a stream. Aborting `signal` cancels the work.
 */
export async function post(path, pictures, options, { signal, onProgress, onPartial } = {}) {
  const body = new FormData();
  for (const picture of pictures) body.append("image", picture.blob, picture.name);
  body.append("options", JSON.stringify(options));
  const streamed = onProgress || onPartial;
  const headers = streamed ? { Accept: "text/event-stream, application/json;q=0.5" } : {};
  const response = await send(path, { method: "POST", body, headers, signal });
  if (!isOf(response, "text/event-stream")) return response.json();
  return follow(response, { onProgress, onPartial });
}

async function send(path, init) {
  const headers = { ...init.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...init, headers });
  } catch (cause) {
    if (init.signal?.aborted) throw cause;
    throw new ApiError({ code: "unreachable", error: "The service cannot be reached." });
  }
  if (response.ok) return response;
  const error = await toError(response);
  if (error.code === "unauthorized") {
    const given = await askForKey(key ? "That key is not known here." : "");
    if (given) {
      key = given;
      return send(path, init);
    }
  }
  throw error;
}

async function toError(response) {
  const status = response.status;
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  try {
    return new ApiError({ ...(await response.json()), status, retryAfter });
  } catch {
    return new ApiError({ error: "", code: "unreadable", status, retryAfter });
  }
}

async function follow(response, { onProgress, onPartial }) {
  let result = null;
  for await (const { event, data } of events(response.body)) {
    if (event === "progress") onProgress?.(data);
    else if (event === "partial") onPartial?.(data);
    else if (event === "error") throw new ApiError(data);
    else if (event === "result") result = data;
  }
  if (result) return result;
  throw new ApiError({ code: "unreachable", error: "The connection ended before the answer." });
}

/** Server-sent events of a body: one `event`, and `data` as JSON. */
async function* events(body) {
  let text = "";
  for await (const chunk of chunks(body.pipeThrough(new TextDecoderStream()))) {
    text += chunk.replaceAll("\r", "");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const of = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart());
      const data = of("data").join("\n");
      if (data) yield { event: of("event")[0], data: JSON.parse(data) };
    }
  }
}

/** A stream's chunks: not every browser iterates streams by itself. */
async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

const isOf = (response, type) => (response.headers.get("Content-Type") ?? "").startsWith(type);
