/** The painter of the mask: pointer (mouse, pen, finger) and keyboard. White is repainted. */

import { byId } from "./dom.js";
import { drawMarked, inkOf, maskOf } from "./ink.js";

const UNDO = 20; // strokes that can be taken back

export class Painter {
  /** @param source the `Source` whose picture is painted on. */
  constructor(source) {
    this.source = source;
    this.dialog = byId("mask");
    this.easel = byId("easel");
    this.ink = document.createElement("canvas"); // opaque where to repaint, clear elsewhere
    this.ink.getContext("2d", { willReadFrequently: true }); // undo reads it after every stroke
    this.past = [];
    this.cursor = null;
    byId("mask-open").onclick = () => this.open();
    byId("mask-done").onclick = () => {
      this.#hand(); // at once: the event of closing comes later, maybe after the next opening
      this.dialog.close();
    };
    byId("mask-undo").onclick = () => this.#undo();
    byId("mask-clear").onclick = () => this.#change((brush) => brush.clearRect(0, 0, this.ink.width, this.ink.height));
    byId("mask-invert").onclick = () => this.#change((brush) => this.#invert(brush));
    this.dialog.addEventListener("close", () => this.dialog.open || this.#hand());
    this.easel.addEventListener("pointerdown", (event) => this.#begin(event));
    this.easel.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) this.easel.addEventListener(end, () => (this.stroke = null));
    this.easel.addEventListener("keydown", (event) => this.#key(event));
    this.easel.addEventListener("blur", () => this.#show((this.cursor = null)));
  }

  open() {
    const { width, height } = this.source.canvas;
    Object.assign(this.ink, { width, height });
    Object.assign(this.easel, { width, height });
    if (this.source.mask) this.ink.getContext("2d").drawImage(inkOf(this.source.mask, width, height), 0, 0);
    this.past = [];
    this.dialog.showModal();
    const room = this.easel.parentElement.clientWidth;
    const tall = window.innerHeight - 200;
    const scale = Math.min(room / width, tall / height);
    this.easel.style.width = `${Math.round(width * scale)}px`;
    this.easel.style.imageRendering = scale > 3 ? "pixelated" : "auto";
    this.#show();
    this.easel.focus();
  }

  get #erasing() {
    return this.dialog.querySelector("[name=tool]:checked").value === "erase";
  }

  /** Brush width in pixels of the picture; the slider is in percent of its shorter side. */
  get #width() {
    return Math.max(1, (Number(byId("brush").value) / 100) * Math.min(this.ink.width, this.ink.height));
  }

  #begin(event) {
    if (event.button) return;
    event.preventDefault();
    this.easel.focus();
    this.easel.setPointerCapture(event.pointerId);
    this.#remember();
    this.cursor = null;
    this.stroke = this.#place(event);
    this.#line(this.stroke, this.stroke);
  }

  #move(event) {
    if (!this.stroke) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) {
      const to = this.#place(one);
      this.#line(this.stroke, to);
      this.stroke = to;
    }
  }

  #place(event) {
    const box = this.easel.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.ink.width,
      ((event.clientY - box.top) / box.height) * this.ink.height,
    ];
  }

  #line(from, to) {
    const brush = this.ink.getContext("2d");
    brush.globalCompositeOperation = this.#erasing ? "destination-out" : "source-over";
    brush.strokeStyle = brush.fillStyle = "#fff";
    brush.lineWidth = this.#width;
    brush.lineCap = "round";
    brush.beginPath();
    brush.moveTo(...from);
    brush.lineTo(...to);
    brush.stroke();
    brush.beginPath();
    brush.arc(...to, this.#width / 2, 0, 2 * Math.PI); // a line of no length draws nothing
    brush.fill();
    brush.globalCompositeOperation = "source-over";
    this.#show();
  }

  #key(event) {
    const step = this.#width / 2;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const move = moves[event.key];
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) return this.#undo();
    if (!move && event.key !== " ") return;
    event.preventDefault();
    const [x, y] = this.cursor ?? [this.ink.width / 2, this.ink.height / 2];
    const limit = (value, most) => Math.min(most, Math.max(0, value));
    this.cursor = move ? [limit(x + move[0], this.ink.width), limit(y + move[1], this.ink.height)] : [x, y];
    if (event.key === " ") {
      if (!event.repeat) this.#remember();
      this.#line(this.cursor, this.cursor);
    }
    this.#show();
  }

  #remember() {
    this.past.push(this.ink.getContext("2d").getImageData(0, 0, this.ink.width, this.ink.height));
    if (this.past.length > UNDO) this.past.shift();
  }

  #undo() {
    const last = this.past.pop();
    if (last) this.ink.getContext("2d").putImageData(last, 0, 0);
    this.#show();
  }

  #change(paint) {
    this.#remember();
    paint(this.ink.getContext("2d"));
    this.#show();
  }

  #invert(brush) {
    brush.globalCompositeOperation = "source-out"; // white where the ink was clear, nothing where it was not
    brush.fillStyle = "#fff";
    brush.fillRect(0, 0, this.ink.width, this.ink.height);
    brush.globalCompositeOperation = "source-over";
  }

  /** Draw the picture, what is inked, and the cursor of the keyboard. */
  #show() {
    const brush = this.easel.getContext("2d");
    drawMarked(brush, this.source.canvas, this.ink);
    if (this.cursor) this.#ring(brush);
  }

  #ring(brush) {
    const radius = this.#width / 2;
    const thin = Math.max(0.5, this.ink.width / 400);
    for (const [colour, width] of [["#000", 3 * thin], ["#fff", thin]]) {
      brush.strokeStyle = colour;
      brush.lineWidth = width;
      brush.beginPath();
      brush.arc(...this.cursor, radius, 0, 2 * Math.PI);
      brush.stroke();
    }
  }

  /** Give the source its mask; none where nothing is painted. */
  #hand() {
    this.source.setMask(maskOf(this.ink));
    byId("mask-open").focus();
  }
}
