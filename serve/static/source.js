/** The picture that image-to-image starts from: dropped, pasted or chosen, and drawn upright on a canvas. */

import { byId, pngOf } from "./dom.js";
import { drawMarked, inkOf } from "./ink.js";

const LONGEST = 2048; // pixels of the longer side; more would only make the upload slow

export class Source {
  /** @param onchange called after a picture came or went, with the source. */
  constructor(onchange) {
    this.view = byId("source-view");
    this.canvas = null; // the whole picture
    this.mask = null; // a canvas of the same size, white where to repaint, or null
    this.onchange = onchange;
    byId("source-choose").onclick = () => byId("source-file").click();
    byId("source-remove").onclick = () => this.remove();
    byId("source-file").onchange = (event) => {
      this.take([...event.target.files]);
      event.target.value = "";
    };
    this.#watchDrops();
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length && !document.querySelector("dialog[open]")) {
        event.preventDefault();
        this.take(files);
      }
    });
  }

  #watchDrops() {
    let inside = 0;
    const carries = (event) => [...event.dataTransfer.types].includes("Files");
    const mark = (change) => {
      inside = Math.max(0, inside + change);
      document.body.classList.toggle("dragging", inside > 0);
    };
    document.addEventListener("dragenter", (event) => carries(event) && mark(1));
    document.addEventListener("dragleave", (event) => carries(event) && mark(-1));
    document.addEventListener("dragover", (event) => carries(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      mark(-inside);
      if (!carries(event)) return;
      event.preventDefault();
      this.take([...event.dataTransfer.files]);
    });
  }

  /** Use the first of `files` that is a picture. */
  async take(files) {
    const file = files.find((one) => one.type.startsWith("image/"));
    if (!file) return this.#complain("This is not a picture.");
    try {
      await this.show(file);
    } catch {
      this.#complain(`“${file.name || "The picture"}” cannot be read. PNG, JPEG and WebP always work.`);
    }
  }

  /** Use a blob, and a mask for it where there is one. */
  async show(blob, mask = null) {
    const canvas = await drawn(blob, LONGEST);
    this.canvas = canvas;
    this.mask = mask ? await drawn(mask, LONGEST) : null;
    this.#changed();
  }

  remove() {
    const had = this.canvas !== null;
    this.canvas = this.mask = null;
    this.#changed();
    if (had) byId("source-choose").focus();
  }

  setMask(canvas) {
    this.mask = canvas;
    this.#changed();
  }

  /** {source, mask}: PNG blobs, or nulls. */
  async blobs() {
    return {
      source: this.canvas && (await pngOf(this.canvas)),
      mask: this.mask && (await pngOf(this.mask)),
    };
  }

  #changed() {
    byId("source").hidden = !this.canvas;
    byId("source-choose").hidden = Boolean(this.canvas);
    byId("source-problem").hidden = true;
    byId("mask-open").querySelector("span").textContent = this.mask ? "Edit mask" : "Paint mask";
    byId("paste-back-row").hidden = !this.mask;
    if (this.canvas) this.#draw();
    this.onchange(this);
  }

  #draw() {
    const { width, height } = this.canvas;
    Object.assign(this.view, { width, height });
    const brush = this.view.getContext("2d", { willReadFrequently: true });
    drawMarked(brush, this.canvas, this.mask && inkOf(this.mask));
    this.view.setAttribute("aria-label", `The source picture, ${width} × ${height}${this.mask ? ", with a mask" : ""}`);
  }

  #complain(text) {
    byId("source-problem").textContent = text;
    byId("source-problem").hidden = false;
  }
}

/** A blob on a canvas, at most `longest` on its longer side, transparent parts white. */
async function drawn(blob, longest) {
  const bitmap = await createImageBitmap(blob); // upright, as EXIF says
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const brush = canvas.getContext("2d");
  brush.fillStyle = "#fff";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}
