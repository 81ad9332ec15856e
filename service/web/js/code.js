// The current request as curl, Python and JavaScript, ready to run.

import { hasKey } from "./api.js";

const PLAIN = ["model", "methods", "targets", "layers", "samples", "timeout_s"];

/** Programs by language for a request: `{ name, options }` with the file's name and the page's options. */
export function snippets({ name, options }) {
  const url = new URL("v1/explain", document.baseURI).href;
  const asked = forOthers(options);
  return {
    curl: curl(url, name, asked),
    Python: python(url, name, asked),
    JavaScript: javascript(url, asked),
  };
}

/** Without what only this page needs, and without what is the default. */
function forOthers({ outputs, top_k, statistics, ...options }) {
  const isDefault = { methods: "gradcam", layers: "auto", targets: "top1" };
  return Object.fromEntries(Object.entries(options).filter(([key, value]) => String(value) !== isDefault[key]));
}

function curl(url, name, options) {
  const key = hasKey() ? " \\\n  -H \"Authorization: Bearer $HEATLENS_KEY\"" : "";
  const isPlain = Object.entries(options).every(([option, value]) => PLAIN.includes(option) && [value].flat().every((v) => typeof v !== "object"));
  const file = ` \\\n  -F ${quote(`image=@"${name.replaceAll('"', '\\"')}"`)}`;
  if (isPlain) {
    const query = new URLSearchParams(Object.entries(options).map(([option, value]) => [option, String(value)])).toString();
    return `curl ${quote(query ? `${url}?${query.replaceAll("%2C", ",")}` : url)}${key}${file}`;
  }
  return `curl ${quote(url)}${key}${file} \\\n  -F ${quote(`options=${JSON.stringify(options)};type=application/json`)}`;
}

function python(url, name, options) {
  const headers = hasKey() ? "\n    headers={\"Authorization\": f\"Bearer {os.environ['HEATLENS_KEY']}\"}," : "";
  return `import base64
import json
${hasKey() ? "import os\n" : ""}from pathlib import Path

import httpx

options = json.loads(${pythonString(JSON.stringify(options))})
answer = httpx.post(
    ${pythonString(url)},
    files={"image": Path(${pythonString(name)}).read_bytes()},
    data={"options": json.dumps(options)},${headers}
    timeout=${options.timeout_s ?? 30},
).raise_for_status().json()

result = answer["results"][0]
for prediction in result["predictions"]:
    print(f"{prediction['probability']:7.1%}  {prediction['label']}")
overlay = result["explanations"][0]["overlay"]
Path("overlay.jpg").write_bytes(base64.b64decode(overlay["data"]))
`;
}

function javascript(url, options) {
  const headers = hasKey() ? "\n  headers: { Authorization: `Bearer ${key}` }," : "";
  return `// \`file\` is a File or Blob, such as input.files[0].
const body = new FormData();
body.append("image", file);
body.append("options", JSON.stringify(${JSON.stringify(options)}));
const response = await fetch(${JSON.stringify(url)}, {
  method: "POST",
  body,${headers}
});
const answer = await response.json();
if (!response.ok) throw new Error(answer.error);
const { predictions, explanations } = answer.results[0];
const { media_type, data } = explanations[0].overlay;
document.querySelector("img").src = \`data:\${media_type};base64,\${data}\`;
`;
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// A JSON string is a Python string too: Python knows the same escapes, except for lone surrogates.
const pythonString = (text) => JSON.stringify(text);
