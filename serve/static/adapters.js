/** The adapters of the chosen model: which are on, and how strongly each works. */

import { byId, make } from "./dom.js";

export class Adapters {
  constructor() {
    this.rows = new Map(); // name -> [its check box, its weight]
  }

  /** Show a model's adapters; those that are on stay on if the model has them. */
  offer(names) {
    const kept = this.value;
    this.rows = new Map();
    byId("adapter-list").replaceChildren(...names.map((name) => this.#row(name)));
    byId("adapters").hidden = names.length === 0;
    this.value = kept;
  }

  #row(name) {
    const box = make("input", { type: "checkbox" });
    const weight = make("input", { type: "number", min: -10, max: 10, step: 0.05, value: 1, hidden: true, "aria-label": `Weight of ${name}` });
    box.onchange = () => (weight.hidden = !box.checked);
    this.rows.set(name, [box, weight]);
    return make("li", {}, make("label", { className: "check" }, box, make("span", { textContent: name })), weight);
  }

  /** [{name, weight}] of those that are on; a weight that is no number is NaN. */
  get value() {
    const on = [...this.rows].filter(([, [box]]) => box.checked);
    return on.map(([name, [, weight]]) => ({ name, weight: weight.value === "" ? NaN : Number(weight.value) }));
  }

  /** Names that the model does not have are left out, and in `missing`. */
  set value(chosen) {
    const wanted = new Map(chosen.map(({ name, weight }) => [name, weight]));
    for (const [name, [box, weight]] of this.rows) {
      box.checked = wanted.has(name);
      weight.hidden = !box.checked;
      weight.value = wanted.get(name) ?? 1;
    }
    this.missing = [...wanted.keys()].filter((name) => !this.rows.has(name));
  }
}

/** How people read them: "watercolour, ink 0.8". */
export const named = (adapters = []) =>
  adapters.map(({ name, weight }) => (weight === 1 ? name : `${name} ${weight}`)).join(", ");
