/** The call that makes a picture again, as text: for curl and Python, in the native and the OpenAI dialect. */

/** A string or number for a shell, in single quotes. */
const shell = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** A JSON value as a Python literal. */
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  return value === null ? "None" : JSON.stringify(value);
}

const root = () => new URL(".", document.baseURI).href.replace(/\/$/, "");

/** The fields of the native request that are plain values; the pictures are files beside the script. */
const fields = ({ model, parameters }) => ({ model, ...parameters });

const NATIVE = '["images"][0]["image"]'; // where an answer has its picture
const OPENAI = '["data"][0]["b64_json"]';
const HEADER = "-H 'Content-Type: application/json'";
const keyHeader = (keyed) => (keyed ? ' \\\n  -H "Authorization: Bearer $DIFFRAY_API_KEY"' : "");

function nativeCurl(entry, keyed) {
  const json = JSON.stringify(fields(entry), null, 2);
  const call = `curl -s ${shell(`${root()}/v1/diffray/images`)}${keyHeader(keyed)} \\\n  ${HEADER} -H 'Accept: image/png' -o picture.png -d`;
  if (!entry.source) return `${call} ${shell(json)}`;
  const file = (name, path) => `  printf ',"%s":"%s"' ${name} "$(base64 < ${path} | tr -d '\\n')"\n`;
  const files = file("init_image", "source.png") + (entry.mask ? file("mask", "mask.png") : "");
  return `{\n  printf %s ${shell(json.slice(0, -2))}\n${files}  printf '}'\n} | ${call} @-`;
}

function nativePython(entry, keyed) {
  const lines = ["import base64", "import json", ...(keyed ? ["import os"] : []), "import urllib.request", ""];
  if (entry.source) lines.push("", "def picture(path):", '    return base64.b64encode(open(path, "rb").read()).decode()', "", "");
  lines.push("body = {");
  for (const [name, value] of Object.entries(fields(entry))) lines.push(`    ${python(name)}: ${python(value)},`);
  if (entry.source) lines.push('    "init_image": picture("source.png"),');
  if (entry.mask) lines.push('    "mask": picture("mask.png"),');
  lines.push("}", 'headers = {"Content-Type": "application/json"}');
  if (keyed) lines.push('headers["Authorization"] = "Bearer " + os.environ["DIFFRAY_API_KEY"]');
  lines.push(`call = urllib.request.Request(${python(`${root()}/v1/diffray/images`)}, json.dumps(body).encode(), headers)`);
  lines.push(`image = json.load(urllib.request.urlopen(call))${NATIVE}`, 'open("picture.png", "wb").write(base64.b64decode(image))');
  return lines.join("\n");
}

/** OpenAI's own fields, and the extensions that go beside them. */
function openaiFields({ model, parameters }) {
  const { prompt, width, height, steps, schedule, adapters, paste_back, ...rest } = parameters; // an edit always pastes back
  const lora = adapters?.map(({ name, weight }) => ({ name, scale: weight }));
  return [
    { model, prompt, size: `${width}x${height}`, response_format: "b64_json" },
    { num_inference_steps: steps, scheduler: schedule, ...(lora && { lora }), ...rest },
  ];
}

/** Takes the picture out of the answer. */
const unpack = () =>
  `| python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)${OPENAI}))' > picture.png`;

function openaiCurl(entry, keyed) {
  const [own, more] = openaiFields(entry);
  const all = { ...own, ...more };
  const call = (path) => `curl -s ${shell(`${root()}/v1/images/${path}`)}${keyHeader(keyed)} \\\n  `;
  if (!entry.source) return `${call("generations")}${HEADER} -d ${shell(JSON.stringify(all, null, 2))} \\\n  ${unpack()}`;
  const files = ["-F image=@source.png", ...(entry.mask ? ["-F mask=@mask-openai.png"] : [])];
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : value);
  const texts = Object.entries(all).map(([name, value]) => `--form-string ${shell(`${name}=${text(value)}`)}`);
  return `${call("edits")}${[...files, ...texts].join(" \\\n  ")} \\\n  ${unpack()}`;
}

function openaiPython(entry, keyed) {
  const [own, more] = openaiFields(entry);
  const key = keyed ? 'os.environ["DIFFRAY_API_KEY"]' : '"none"';
  const lines = ["import base64", ...(keyed ? ["import os"] : []), "", "from openai import OpenAI", ""];
  lines.push(`client = OpenAI(base_url=${python(`${root()}/v1`)}, api_key=${key})`);
  lines.push(`answer = client.images.${entry.source ? "edit" : "generate"}(`);
  if (entry.source) lines.push('    image=open("source.png", "rb"),');
  if (entry.mask) lines.push('    mask=open("mask-openai.png", "rb"),  # clear where to repaint');
  for (const [name, value] of Object.entries(own)) lines.push(`    ${name}=${python(value)},`);
  lines.push("    extra_body={");
  for (const [name, value] of Object.entries(more)) lines.push(`        ${python(name)}: ${python(value)},`);
  lines.push("    },", ")", 'open("picture.png", "wb").write(base64.b64decode(answer.data[0].b64_json))');
  return lines.join("\n");
}

export const KINDS = {
  "curl": nativeCurl,
  "Python": nativePython,
  "OpenAI, curl": openaiCurl,
  "OpenAI, Python": openaiPython,
};
