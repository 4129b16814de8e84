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
function fields({ model, parameters }) {
  const { n, ...rest } = parameters;
  return { model, ...rest };
}

function nativeCurl(entry, keyed) {
  const json = JSON.stringify(fields(entry), null, 2);
  const head = `curl -s ${shell(`${root()}/v1/diffray/images`)} \\\n${keyed ? '  -H "Authorization: Bearer $DIFFRAY_API_KEY" \\\n' : ""}`;
  const tail = "\n  | jq -r '.images[0].image' | base64 -d > picture.png";
  if (!entry.source) return `${head}  -H 'Content-Type: application/json' \\\n  -d ${shell(json)} \\${tail}`;
  const pictures = [`init_image: $source`, ...(entry.mask ? ["mask: $mask"] : [])].join(", ");
  const files = `--arg source "$(base64 < source.png)"${entry.mask ? ' --arg mask "$(base64 < mask.png)"' : ""}`;
  return `jq ${files} \\\n  '. + {${pictures}}' <<'EOF' |\n${json}\nEOF\n${head}  -H 'Content-Type: application/json' -d @- \\${tail}`;
}

function nativePython(entry, keyed) {
  const lines = ["import base64", ...(keyed ? ["import os"] : []), "", "import httpx", ""];
  if (entry.source) lines.push("def picture(path):", "    return base64.b64encode(open(path, \"rb\").read()).decode()", "", "");
  lines.push("answer = httpx.post(", `    ${python(`${root()}/v1/diffray/images`)},`);
  if (keyed) lines.push('    headers={"Authorization": f"Bearer {os.environ[\'DIFFRAY_API_KEY\']}"},');
  lines.push("    json={");
  for (const [name, value] of Object.entries(fields(entry))) lines.push(`        ${python(name)}: ${python(value)},`);
  if (entry.source) lines.push('        "init_image": picture("source.png"),');
  if (entry.mask) lines.push('        "mask": picture("mask.png"),');
  lines.push("    },", "    timeout=600,", ")", "answer.raise_for_status()");
  lines.push('open("picture.png", "wb").write(base64.b64decode(answer.json()["images"][0]["image"]))');
  return lines.join("\n");
}

/** OpenAI's own fields, and the extensions that go beside them. */
function openaiFields({ model, parameters }) {
  const { prompt, width, height, steps, n, ...rest } = parameters;
  return [
    { model, prompt, size: `${width}x${height}`, response_format: "b64_json" },
    { num_inference_steps: steps, ...rest },
  ];
}

function openaiCurl(entry, keyed) {
  const [own, more] = openaiFields(entry);
  const key = keyed ? '  -H "Authorization: Bearer $DIFFRAY_API_KEY" \\\n' : "";
  const tail = "\n  | jq -r '.data[0].b64_json' | base64 -d > picture.png";
  if (!entry.source) {
    const json = JSON.stringify({ ...own, ...more }, null, 2);
    return `curl -s ${shell(`${root()}/v1/images/generations`)} \\\n${key}  -H 'Content-Type: application/json' \\\n  -d ${shell(json)} \\${tail}`;
  }
  const form = Object.entries({ ...own, ...more }).map(([name, value]) => `  --form-string ${shell(`${name}=${value}`)} \\\n`);
  const files = `  -F image=@source.png \\\n${entry.mask ? "  -F mask=@mask-openai.png \\\n" : ""}`;
  return `curl -s ${shell(`${root()}/v1/images/edits`)} \\\n${key}${files}${form.join("").replace(/\n$/, "")}${tail}`;
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
