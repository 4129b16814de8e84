/** The page at `/`: puts the parts together. */

import { Refused, catalogue, generate } from "./api.js";
import { showCall } from "./calls.js";
import { byId, decoded, encoded, make } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { History } from "./history.js";
import { kept } from "./kept.js";
import { askKey, key } from "./key.js";
import { Painter } from "./mask.js";
import { Source } from "./source.js";
import { Stage } from "./stage.js";

const DRAFT = "diffray.draft"; // the last settings that were used
const SHOWN = ["prompt", "width", "height", "steps", "guidance_scale", "sampler", "schedule", "seed"]; // of every picture
const EXAMPLES = {
  embedded: ["a large red circle on a blue background", "a green triangle left of a yellow star", "a small white square on a purple background"],
  other: ["a lighthouse on a cliff at dawn, soft light", "a bowl of oranges, still life, oil painting", "a fox in fresh snow, photograph"],
};

const settings = kept("localStorage");
const form = new Form();
const source = new Source(({ canvas }) => form.useSource(canvas && [canvas.width, canvas.height]));
new Painter(source);
const history = new History();
const gallery = new Gallery(history, (entry) => pick(entry));
const stage = new Stage({ reuse, startFrom, call: showCall, remove });
let running = null; // the AbortController of what is being made

const narrow = () => window.matchMedia("(max-width: 899px)").matches;
const say = (text) => (byId("status").textContent = text);

async function start() {
  byId("form").onsubmit = (event) => {
    event.preventDefault();
    run();
  };
  byId("cancel").onclick = () => running?.abort();
  byId("key-open").onclick = () => askKey();
  document.addEventListener("keydown", shortcuts);
  await history.open();
  gallery.show();
  await connect();
}

/** Ask the service what it offers. */
async function connect() {
  try {
    form.offer(await catalogue());
  } catch (error) {
    return stage.problem(error.message, connect);
  }
  stage.problem("");
  byId("key-open").hidden = !key();
  const draft = JSON.parse(settings.get(DRAFT) ?? "{}");
  if (form.models.some(({ name }) => name === draft.model)) form.fill(draft);
  offerExamples();
  if (!narrow()) byId("prompt").focus();
}

function offerExamples() {
  const texts = EXAMPLES[form.card.name] ?? EXAMPLES.other;
  const example = (text) => make("li", {}, make("button", { type: "button", textContent: text, onclick: () => tryOut(text) }));
  byId("examples").replaceChildren(...texts.map(example));
}

function tryOut(prompt) {
  form.fill({ prompt });
  byId("form").requestSubmit();
}

function shortcuts(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    byId("form").requestSubmit();
  } else if (event.key === "Escape" && running) {
    event.preventDefault();
    running.abort();
  }
}

/** Make what the form says, and show it as it forms. */
async function run() {
  const wanted = running ? null : form.read();
  if (!wanted) return;
  settings.set(DRAFT, JSON.stringify(wanted));
  running = new AbortController();
  busy(true);
  try {
    const pictures = await source.blobs();
    const body = await bodyOf(wanted, pictures);
    stage.problem("");
    const began = performance.now();
    for await (const { event, data } of generate(body, running.signal)) {
      if (event === "accepted") begin(body);
      if (event === "progress") stage.progress(data.index, { ...data, preview: data.preview && `data:image/jpeg;base64,${data.preview}` });
      if (event === "result") await keep(body, pictures, data, (performance.now() - began) / 1000);
    }
    say("Finished.");
  } catch (error) {
    fail(error);
  } finally {
    running = null;
    busy(false);
  }
}

function begin({ n, width = form.card.width, height = form.card.height }) {
  stage.begin(n, width, height);
  if (narrow()) byId("stage").scrollIntoView({ block: "start" });
  say(`Generating ${n === 1 ? "a picture" : `${n} pictures`}.`);
}

/** The request's body: about forty previews, the pictures inside. */
async function bodyOf(wanted, { source, mask }) {
  const body = { ...wanted, preview_every: Math.max(1, Math.round((wanted.steps ?? form.card.steps) / 40)) };
  body.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  if (source) body.init_image = await encoded(source);
  if (mask) Object.assign(body, { mask: await encoded(mask), paste_back: byId("paste_back").checked });
  return body;
}

/** A finished picture goes onto the stage and into the history. */
async function keep(body, { source, mask }, { index, model, image, format, parameters }, seconds) {
  const kept = {};
  for (const name of new Set([...SHOWN, ...Object.keys(body)])) {
    if (parameters[name] !== undefined && parameters[name] !== null) kept[name] = parameters[name];
  }
  const blob = decoded(image, `image/${format}`);
  const entry = await history.add({ at: Date.now(), model, parameters: kept, blob, source, mask, seconds });
  stage.finish(index, entry);
  gallery.show(entry.id);
}

function fail(error) {
  if (error.name === "AbortError") {
    stage.stop("Cancelled");
    return say("Cancelled.");
  }
  if (!(error instanceof Refused)) console.error(error);
  const text = error instanceof Refused ? error.message : "This page made a mistake. Reload it and try again.";
  stage.stop("Stopped");
  if (!form.complain(error.field, text)) stage.problem(text);
}

function busy(is) {
  const generateButton = byId("generate");
  const hadFocus = document.activeElement === byId("cancel");
  generateButton.setAttribute("aria-disabled", String(is));
  generateButton.firstChild.textContent = is ? "Generating… " : "Generate ";
  byId("cancel").hidden = !is;
  byId("stage").setAttribute("aria-busy", String(is));
  byId("key-open").hidden = !key();
  if (!is && hadFocus) generateButton.focus();
}

// ---- what can be done with a picture ----

function pick(entry) {
  if (running) return;
  stage.problem("");
  stage.show(entry);
  gallery.show(entry.id);
  byId("stage").scrollIntoView({ block: "nearest" });
}

/** The controls as they were when `entry` was made. */
async function reuse(entry) {
  if (entry.source) await source.show(entry.source, entry.mask);
  else source.remove();
  form.fill({ negative_prompt: "", adapters: [], ...entry.parameters, model: entry.model, n: 1 });
  byId("prompt").focus();
  say("The settings of this picture are in the form.");
}

async function startFrom(entry) {
  await source.show(entry.blob);
  byId("mask-open").focus();
  say("The picture is the source now.");
}

async function remove(entry) {
  await history.remove(entry.id);
  stage.show();
  gallery.show();
  byId("prompt").focus();
  say("Deleted.");
}

start();
