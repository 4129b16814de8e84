/** The painter of the mask: pointer (mouse, pen, finger) and keyboard. White is repainted. */

import { byId } from "./dom.js";

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
    byId("mask-done").onclick = () => this.dialog.close();
    byId("mask-undo").onclick = () => this.#undo();
    byId("mask-clear").onclick = () => this.#change((brush) => brush.clearRect(0, 0, this.ink.width, this.ink.height));
    byId("mask-invert").onclick = () => this.#change((brush) => this.#invert(brush));
    this.dialog.addEventListener("close", () => this.#hand());
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
    if (this.source.mask) this.#read(this.source.mask);
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

  /** Draw the picture, the ink as a tint, and the cursor of the keyboard. */
  #show() {
    const { width, height } = this.ink;
    const tint = document.createElement("canvas");
    Object.assign(tint, { width, height });
    const colour = tint.getContext("2d");
    colour.drawImage(this.ink, 0, 0);
    colour.globalCompositeOperation = "source-in";
    colour.fillStyle = "rgb(230 30 110)";
    colour.fillRect(0, 0, width, height);
    const brush = this.easel.getContext("2d");
    brush.globalAlpha = 1;
    brush.drawImage(this.source.canvas, 0, 0);
    brush.globalAlpha = 0.6;
    brush.drawImage(tint, 0, 0);
    brush.globalAlpha = 1;
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

  /** Take the white of a finished mask as ink. */
  #read(mask) {
    const brush = this.ink.getContext("2d");
    brush.drawImage(mask, 0, 0, this.ink.width, this.ink.height);
    const pixels = brush.getImageData(0, 0, this.ink.width, this.ink.height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at];
    brush.putImageData(pixels, 0, 0);
  }

  /** Give the source its mask: black and white; none where nothing is painted. */
  #hand() {
    const { width, height } = this.ink;
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width, height });
    const brush = canvas.getContext("2d");
    brush.fillStyle = "#000";
    brush.fillRect(0, 0, width, height);
    brush.drawImage(this.ink, 0, 0);
    const painted = brush.getImageData(0, 0, width, height).data.some((value, at) => at % 4 === 0 && value > 127);
    this.source.setMask(painted ? canvas : null);
    byId("mask-open").focus();
  }
}
