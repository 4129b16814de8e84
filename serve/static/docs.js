/** The documentation at /docs, drawn from openapi.json: without tools from elsewhere it also works offline. */

import { byId, make } from "./dom.js";

let components = {};

async function start() {
  try {
    const document_ = await (await fetch("openapi.json")).json();
    components = document_.components?.schemas ?? {};
    show(document_);
  } catch {
    byId("docs-status").textContent = "The description cannot be read. Is the service running?";
  }
  const page = await fetch("./", { method: "HEAD" }).catch(() => null);
  byId("to-page").hidden = !page?.ok;
}

function show({ info, paths }) {
  const groups = new Map();
  for (const [path, operations] of Object.entries(paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      const group = operation.tags?.[0] ?? "other";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push({ path, method, operation, id: `${method}${path.replace(/\W+/g, "-")}` });
    }
  }
  byId("text").replaceChildren(make("p", { textContent: plain(info.description) }));
  for (const [group, operations] of groups) {
    byId("contents").append(make("h2", { textContent: group }));
    byId("contents").append(...operations.map(({ path, method, id }) =>
      make("a", { href: `#${id}`, textContent: `${method.toUpperCase()} ${path}` })));
    byId("text").append(make("h2", { textContent: group }), ...operations.map(article));
  }
  if (location.hash) byId(location.hash.slice(1))?.scrollIntoView();
}

function article({ path, method, operation, id }) {
  const body = Object.entries(operation.requestBody?.content ?? {});
  return make("article", { id, className: "operation" },
    make("h3", {}, make("span", { className: "method", textContent: method.toUpperCase() }), path),
    make("p", { textContent: plain(operation.description ?? operation.summary) }),
    ...(operation.parameters?.length ? [make("h4", { textContent: "Parameters" }), fields(parameters(operation))] : []),
    ...body.flatMap(([media, { schema }]) => bodyOf(media, schema)),
    answers(operation.responses));
}

const parameters = ({ parameters: all }) =>
  all.map(({ name, in: where, required, schema, description }) =>
    [name, { ...resolved(schema), description: [description, `In the ${where}.`].filter(Boolean).join(" ") }, required]);

function bodyOf(media, schema) {
  const { properties = {}, required = [], examples = [] } = resolved(schema);
  const rows = Object.entries(properties).map(([name, value]) => [name, resolved(value), required.includes(name)]);
  return [
    make("h4", { textContent: `Body, ${media}` }),
    ...(rows.length ? [fields(rows)] : []),
    ...examples.slice(0, 2).map((example) => make("pre", { tabIndex: 0, textContent: JSON.stringify(example, null, 2) })),
  ];
}

/** A table of [name, schema, required]. */
function fields(rows) {
  const head = make("tr", {}, ...["Name", "Value", "Meaning"].map((text) => make("th", { scope: "col", textContent: text })));
  const line = ([name, schema, required]) =>
    make("tr", {},
      make("td", { textContent: name }),
      make("td", {}, type(schema), make("span", { className: "hint", textContent: required ? "required" : initial(schema) })),
      make("td", { textContent: plain(schema.description) }));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows.map(line)));
  return make("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": "Fields" }, table);
}

function answers(responses = {}) {
  const line = ([status, { description, content = {} }]) =>
    make("tr", {},
      make("td", { textContent: status }),
      make("td", { textContent: Object.keys(content).join(", ") }),
      make("td", { textContent: description }));
  const table = make("table", {}, make("tbody", {}, ...Object.entries(responses).map(line)));
  return make("details", {}, make("summary", { textContent: "Answers" }), table);
}

/** A schema without references, and without the alternative of being left out. */
function resolved(schema = {}) {
  if (schema.$ref) return { ...resolved(components[schema.$ref.split("/").pop()]), ...without(schema, "$ref") };
  const choices = schema.anyOf?.filter((choice) => choice.type !== "null");
  return choices?.length === 1 ? { ...resolved(choices[0]), ...without(schema, "anyOf") } : schema;
}

const without = (object, name) => Object.fromEntries(Object.entries(object).filter(([key]) => key !== name));

function type(schema) {
  const one = resolved(schema);
  if (one.const !== undefined) return JSON.stringify(one.const);
  if (one.enum) return one.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (one.anyOf) return one.anyOf.map(type).filter((text) => text !== "null").join(" | ");
  if (one.type === "array") return `list of ${type(one.items)}`;
  if (one.properties) return `{ ${Object.keys(one.properties).join(", ")} }`;
  return [one.format === "binary" ? "file" : one.type ?? "any", range(one)].filter(Boolean).join(", ");
}

function range({ minimum, exclusiveMinimum, maximum, maxLength }) {
  const low = minimum === undefined ? exclusiveMinimum !== undefined && `above ${exclusiveMinimum}` : `from ${minimum}`;
  if (low && maximum !== undefined) return `${low.replace("from ", "")} to ${maximum}`;
  if (low) return low;
  if (maximum !== undefined) return `up to ${maximum}`;
  return maxLength === undefined ? "" : `up to ${maxLength} characters`;
}

const initial = ({ default: value }) => (value === undefined || value === null ? "" : `default ${JSON.stringify(value)}`);

/** Descriptions are Markdown; what little of it they use reads well as text. */
const plain = (text = "") => (text ?? "").replaceAll("`", "").replace(/([^\n])\n(?=[^\n-])/g, "$1 ");

start();
