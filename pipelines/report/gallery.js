"use strict";
const { images, tiles, refused, summary } = JSON.parse(document.getElementById("data").textContent);
const PAGE = 60, FEW = 40;
const $ = (id) => document.getElementById(id);
// Text reaches the page through textContent alone, so a prompt is never markup.
const make = (tag, text, parent, className) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  if (parent) parent.append(node);
  return node;
};
const show = (value) =>
  typeof value === "number" ? (Number.isInteger(value) ? String(value) : String(+value.toPrecision(6)))
    : typeof value === "object" ? JSON.stringify(value) : String(value);

// Light and dark
const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
const paint = () => document.documentElement.classList.toggle("dark", chosen ?? system.matches);
system.addEventListener("change", paint);
$("theme").onclick = () => { chosen = !(chosen ?? system.matches); paint(); };
paint();

// Totals
$("summary").textContent = summary;
for (const [name, value] of tiles) {
  const tile = make("div", undefined, $("tiles"), "tile");
  make("b", value, tile);
  make("span", name, tile);
}
const reasons = $("reasons");
if (reasons) for (const row of refused) {
  const line = make("tr", undefined, reasons);
  row.forEach((cell, i) => make("td", cell, line, i === 2 ? "n" : ""));
}

const narrow = matchMedia("(max-width: 640px)").matches;
for (const details of document.querySelectorAll("details[open]")) details.open = !narrow;

// Columns: numbers get a range, few values a list, all others a text
const columns = new Map();
for (const image of images) for (const [name, value] of Object.entries(image.facts)) {
  if (!columns.has(name)) columns.set(name, new Set());
  columns.get(name).add(typeof value === "object" ? JSON.stringify(value) : value);
}
// Tables of text hold numbers as text; those that a number cannot hold exactly (large seeds) stay text.
const exact = (value) => typeof value === "number" || (typeof value === "string" && String(Number(value)) === value);
const numeric = (name) => [...columns.get(name)].every(exact);
for (const image of images)
  image.text = [image.id, ...Object.values(image.facts).map(show)].join("\n").toLowerCase();
make("option", "Any column", $("column")).value = "";
make("option", "Dataset order", $("sort")).value = "";
for (const [name, values] of columns) {
  if (values.size > 1) {
    if (name !== "prompt") make("option", name, $("column")).value = name;
    if (numeric(name)) make("option", "by " + name, $("sort")).value = name;
  }
}

let accept = () => true, found = images, page = 0, open = -1, reversed = false;
$("column").onchange = () => {
  const name = $("column").value, box = $("filter");
  box.replaceChildren();
  accept = () => true;
  if (name && numeric(name)) {
    const values = [...columns.get(name)], ends = [Math.min(...values), Math.max(...values)];
    const [least, most] = ["from", "to"].map((word, i) => {
      const input = make("input", undefined, box);
      Object.assign(input, { type: "number", step: "any", placeholder: word + " " + show(ends[i]) });
      input.setAttribute("aria-label", name + " " + word);
      input.oninput = refresh;
      return input;
    });
    accept = ({ facts }) =>
      (least.value === "" || facts[name] >= +least.value) && (most.value === "" || facts[name] <= +most.value);
  } else if (name && columns.get(name).size <= FEW) {
    const select = make("select", undefined, box);
    select.setAttribute("aria-label", name);
    make("option", "any", select).value = "";
    [...columns.get(name)].map(show).sort().forEach((value) => { make("option", value, select).value = "=" + value; });
    select.onchange = refresh;
    accept = ({ facts }) => !select.value || (name in facts && "=" + show(facts[name]) === select.value);
  } else if (name) {
    const input = make("input", undefined, box);
    input.placeholder = "contains";
    input.setAttribute("aria-label", name + " contains");
    input.oninput = refresh;
    accept = ({ facts }) => show(facts[name] ?? "").toLowerCase().includes(input.value.toLowerCase());
  }
  refresh();
};

function refresh() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), by = $("sort").value;
  found = images.filter((image) => accept(image) && words.every((word) => image.text.includes(word)));
  if (by) found.sort((a, b) => (a.facts[by] ?? Infinity) - (b.facts[by] ?? Infinity));
  if (reversed) found.reverse();
  page = 0;
  draw();
}

function draw() {
  const pages = Math.max(1, Math.ceil(found.length / PAGE)), grid = $("grid"), by = $("sort").value;
  grid.replaceChildren();
  found.slice(page * PAGE, (page + 1) * PAGE).forEach((image, i) => {
    const { facts } = image, cell = make("button", undefined, grid, "cell");
    cell.type = "button";
    const picture = make("img", undefined, cell);
    picture.loading = "lazy";
    picture.src = "data:image/webp;base64," + image.picture;
    picture.alt = facts.prompt ?? image.id;
    const box = make("div", undefined, cell);
    make("p", facts.prompt ?? "", box);
    const extra = by && !["seed", "width", "height"].includes(by) ? ` · ${by} ${show(facts[by] ?? "")}` : "";
    make("small", `${facts.width}×${facts.height}${extra} · seed ${facts.seed}`, box);
    cell.onclick = () => view(page * PAGE + i);
  });
  $("count").textContent = found.length === images.length ? `${images.length} shown` : `${found.length} of ${images.length}`;
  $("page").textContent = `page ${page + 1} of ${pages}`;
  $("pages").hidden = pages === 1;
  $("before").disabled = page === 0;
  $("after").disabled = page === pages - 1;
  $("empty").hidden = found.length > 0;
}

function turn(by) {
  const pages = Math.ceil(found.length / PAGE), next = page + by;
  if (next < 0 || next >= pages) return;
  page = next;
  draw();
  $("tools").scrollIntoView();
}

function view(index) {
  if (index < 0 || index >= found.length) return;
  open = index;
  const { id, picture, facts } = found[index], list = $("facts");
  $("large").src = "data:image/webp;base64," + picture;
  $("large").alt = facts.prompt ?? id;
  $("words").textContent = facts.prompt ?? "";
  list.replaceChildren();
  for (const [name, value] of [["id", id], ...Object.entries(facts)]) {
    if (name === "prompt") continue;
    make("dt", name, list);
    make("dd", show(value), list);
  }
  $("left").disabled = index === 0;
  $("right").disabled = index === found.length - 1;
  $("copy").textContent = "Copy parameters";
  if (!$("view").open) $("view").showModal();
  $("side").scrollTop = 0;
}

$("tools").onsubmit = (event) => event.preventDefault();
$("search").oninput = refresh;
$("sort").onchange = refresh;
$("reverse").onclick = () => { reversed = !reversed; $("reverse").textContent = reversed ? "↓" : "↑"; refresh(); };
$("before").onclick = () => turn(-1);
$("after").onclick = () => turn(1);
$("left").onclick = () => view(open - 1);
$("right").onclick = () => view(open + 1);
$("close").onclick = () => $("view").close();
$("view").onclick = (event) => { if (event.target === $("view")) $("view").close(); };
$("clear").onclick = () => { $("search").value = ""; $("column").value = ""; $("column").onchange(); };
$("copy").onclick = async () => {
  const text = JSON.stringify({ id: found[open].id, ...found[open].facts }, null, 2);
  try {
    await navigator.clipboard.writeText(text);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("facts"));
    $("copy").textContent = "Selected";
  }
};
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if ($("view").open) {
    if (step) { view(open + step); event.preventDefault(); }
  } else if (event.key === "/" && !typing) {
    $("search").focus();
    event.preventDefault();
  } else if (event.key === "Escape" && typing) {
    document.activeElement.blur();
  } else if (step && !typing) {
    turn(step);
  }
};
draw();
