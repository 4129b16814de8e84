/** The controls: their values as parameters of a request, and back. */

import { Adapters, named } from "./adapters.js";
import { byId, make } from "./dom.js";

const NUMBERS = ["width", "height", "steps", "guidance_scale", "seed", "n", "strength"];
const TEXTS = ["prompt", "negative_prompt", "model", "sampler", "schedule"];
const SHAPES = [
  ["Square", 1, 1],
  ["Landscape 4:3", 4, 3],
  ["Landscape 3:2", 3, 2],
  ["Wide 16:9", 16, 9],
  ["Portrait 3:4", 3, 4],
  ["Portrait 2:3", 2, 3],
  ["Tall 9:16", 9, 16],
];
const NEEDS = {
  inpaint: "This model repaints: give it a picture and paint a mask.",
  edit: "This model edits: give it a picture, and say what to change.",
  upscale: "This model enlarges: give it a picture.",
};

export class Form {
  constructor() {
    this.element = byId("form");
    this.models = [];
    this.adapters = new Adapters();
    this.source = null; // [width, height] of the source picture
    for (const slider of this.element.querySelectorAll("[data-of]")) this.#pair(slider, byId(slider.dataset.of));
    byId("model").onchange = () => this.#useDefaults();
    byId("shape").onchange = () => this.#useShape();
    for (const name of ["width", "height"]) byId(name).addEventListener("input", () => this.#nameShape());
    byId("seed-clear").onclick = () => this.fill({ seed: "" });
    this.element.addEventListener("input", (event) => {
      this.#excuse(event.target.closest("#adapters") ?? event.target);
      this.#digest();
    });
    if (window.matchMedia("(max-width: 899px)").matches) byId("settings").open = false;
  }

  #pair(slider, number) {
    slider.addEventListener("input", () => {
      number.value = slider.value;
      this.#digest();
    });
    number.addEventListener("input", () => (slider.value = number.value));
  }

  /** Fill the menus with what the service offers; what was typed before would be lost, so the controls wait for this. */
  offer({ models, samplers, schedules }) {
    this.models = models;
    const options = (names) => names.map((name) => make("option", { value: name, textContent: name }));
    byId("model").replaceChildren(...options(models.map((model) => model.name)));
    byId("sampler").replaceChildren(...options(samplers));
    byId("schedule").replaceChildren(...options(schedules));
    this.#useDefaults();
    byId("controls").disabled = false;
  }

  get card() {
    return this.models.find((model) => model.name === byId("model").value);
  }

  #useDefaults() {
    const card = this.card;
    if (!card) return;
    const { width, height, steps, guidance_scale, sampler, schedule, factor } = card;
    for (const name of ["width", "height"]) Object.assign(byId(name), { step: factor, min: factor });
    this.#offerShapes();
    this.adapters.offer(card.adapters);
    this.fill({ width, height, steps, guidance_scale, sampler, schedule });
    if (this.source) this.fill(fitted(this.source[0] / this.source[1], card));
    this.#complainOr(byId("model"), "");
    const needs = NEEDS[card.task];
    if (needs) byId("model-field").append(make("p", { className: "hint needs", textContent: needs }));
  }

  #offerShapes() {
    const names = SHAPES.map(([name]) => name);
    if (this.source) names.unshift("Like the picture");
    byId("shape").replaceChildren(...[...names, "Custom"].map((name) => make("option", { value: name, textContent: name })));
    byId("model-field").querySelector(".needs")?.remove();
    this.#nameShape();
  }

  #sizeOf(shape) {
    if (shape === "Like the picture") return fitted(this.source[0] / this.source[1], this.card);
    const found = SHAPES.find(([name]) => name === shape);
    return found && fitted(found[1] / found[2], this.card);
  }

  #useShape() {
    const size = this.#sizeOf(byId("shape").value);
    if (size) this.fill(size);
    else byId("width").focus();
  }

  #nameShape() {
    if (!this.card) return;
    const [width, height] = [Number(byId("width").value), Number(byId("height").value)];
    const same = (shape) => {
      const size = this.#sizeOf(shape.value);
      return size?.width === width && size?.height === height;
    };
    byId("shape").value = [...byId("shape").options].find(same)?.value ?? "Custom";
  }

  /** A source picture came ([width, height]) or went (null): the size follows its shape. */
  useSource(size) {
    const changed = String(size) !== String(this.source);
    this.source = size;
    if (!changed || !this.card) return;
    this.#offerShapes();
    this.fill(size ? fitted(size[0] / size[1], this.card) : { width: this.card.width, height: this.card.height });
  }

  /** Set controls; names without a control are left out. */
  fill(values) {
    for (const [name, value] of Object.entries(values)) {
      const control = this.element.elements[name];
      if (!control || value === undefined || name === "adapters") continue;
      if (control.type === "checkbox") control.checked = Boolean(value);
      else control.value = value ?? "";
      const slider = this.element.querySelector(`[data-of="${name}"]`);
      if (slider) slider.value = control.value;
      this.#excuse(control);
    }
    if (values.model !== undefined && this.card) this.adapters.offer(this.card.adapters);
    if (values.adapters) this.#wear(values.adapters);
    this.#nameShape();
    this.#digest();
  }

  /** Switch adapters on; those that are not there any more are told. */
  #wear(adapters) {
    this.adapters.value = adapters;
    const { missing } = this.adapters;
    this.#complainOr(byId("adapters"), missing.length ? `This model does not have ${missing.join(", ")}.` : "");
    if (missing.length) byId("adapters").hidden = false;
  }

  /** The parameters, without what is left open; null, with the mistake shown, where one is not a number. */
  read() {
    const values = {};
    for (const name of TEXTS) if (byId(name).value) values[name] = byId(name).value;
    for (const name of NUMBERS) {
      const control = byId(name);
      if (control.validity.badInput) {
        this.complain(name, "This is not a number.");
        return null;
      }
      if (control.value !== "") values[name] = Number(control.value);
    }
    const adapters = this.adapters.value;
    const odd = adapters.find(({ weight }) => Number.isNaN(weight));
    if (odd) {
      this.complain("adapters", `The weight of ${odd.name} is not a number.`);
      return null;
    }
    if (adapters.length) values.adapters = adapters;
    values.prompt ??= "";
    values.n ??= 1;
    if (this.source === null) delete values.strength;
    return values;
  }

  /** Show a mistake at its control, and go there. False where there is no such control. */
  complain(field, text) {
    const control = field && this.element.elements[field.replace(/[[.]?\d.*$/, "")];
    if (!control?.closest) return false;
    const settings = control.closest("details");
    if (settings) settings.open = true;
    this.#complainOr(control, text);
    control.focus();
    return true;
  }

  #excuse(control) {
    if (control.getAttribute?.("aria-invalid")) this.#complainOr(control, "");
  }

  #complainOr(control, text) {
    const id = `${control.id}-problem`;
    byId(id)?.remove();
    control.toggleAttribute("aria-invalid", false);
    control.removeAttribute("aria-describedby");
    if (!text) return;
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-describedby", id);
    control.closest(".field, .dial").append(make("p", { id, className: "problem", textContent: text, role: "alert" }));
  }

  /** What the folded settings say about themselves. */
  #digest() {
    const value = (name) => byId(name).value;
    const parts = [`${value("width")} × ${value("height")}`, `${value("steps")} steps`, value("sampler"), named(this.adapters.value)];
    byId("settings-digest").textContent = parts.filter(Boolean).join(", ");
  }
}

/** The size of a shape at the number of pixels the model is made for. */
function fitted(ratio, { width, height, factor }) {
  const grid = width * height < 65536 ? factor : 8 * factor; // coarse steps give the sizes that people know
  const round = (value) => Math.max(factor, Math.round(value / grid) * grid);
  return { width: round(Math.sqrt(width * height * ratio)), height: round(Math.sqrt((width * height) / ratio)) };
}
