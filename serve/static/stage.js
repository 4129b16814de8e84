/** The stage: a tile for every picture, from the first preview to the finished file. */

import { named } from "./adapters.js";
import { button, byId, download, make, seconds } from "./dom.js";

const SMALL = 256; // pictures up to this side are shown with crisp pixels

/** One picture that forms, or is there. */
class Tile {
  constructor(width, height) {
    this.image = make("img", { hidden: true, alt: "" });
    this.waiting = make("p", { className: "waiting", textContent: "Waiting for a place…" });
    this.bar = make("progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.frame = make("div", { className: "frame" }, this.image, this.waiting, this.bar);
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.frame.style.maxWidth = `calc(66vh * ${width / height})`;
    this.caption = make("figcaption");
    this.element = make("figure", { className: "tile" }, this.frame, this.caption);
    this.began = performance.now();
    this.step = this.steps = 0;
    this.running = true;
    this.tick();
  }

  progress({ step, steps, preview }) {
    if (step > 0 && !this.step) this.first = performance.now();
    Object.assign(this, { step, steps });
    this.bar.max = Math.max(steps, 1);
    this.bar.value = step;
    if (step > 0) this.waiting.hidden = true;
    if (preview) {
      this.image.src = preview;
      this.image.hidden = false;
    }
    this.tick();
  }

  /** Refresh the clock. */
  tick() {
    if (!this.running) return;
    const now = performance.now();
    const parts = [seconds((now - this.began) / 1000)];
    if (this.step) parts.unshift(`Step ${this.step} of ${this.steps}`);
    const left = this.step > 1 ? (((now - this.first) / (this.step - 1)) * (this.steps - this.step)) / 1000 : 0;
    if (left > 1) parts.push(`about ${seconds(left)} left`);
    this.caption.textContent = parts.join(" · ");
  }

  /** It ends without a picture; what was seen of it stays. */
  stop(text) {
    if (!this.running) return;
    this.running = false;
    this.waiting.hidden = true;
    this.bar.hidden = true;
    this.frame.classList.add("stopped");
    this.caption.textContent = text + (this.step ? ` after ${this.step} of ${this.steps} steps` : "");
  }

  /** The finished picture with what can be done with it. */
  finish(entry, actions) {
    this.running = false;
    const { width, height, prompt, seed, steps, adapters } = entry.parameters;
    const worn = adapters?.length ? ` with ${named(adapters)}` : "";
    this.waiting.hidden = true;
    this.bar.hidden = true;
    this.url = URL.createObjectURL(entry.blob);
    this.image.src = this.url;
    this.image.alt = prompt || "A picture without a prompt";
    this.image.hidden = false;
    this.image.className = Math.max(width, height) <= SMALL ? "small" : "";
    const took = entry.seconds ? ` · ${seconds(entry.seconds)}` : "";
    this.caption.replaceChildren(
      make("span", { className: "said", textContent: prompt || "(no prompt)" }),
      make("span", { textContent: `${width} × ${height} · ${steps} steps · seed ${seed} · ${entry.model}${worn}${took}` }),
    );
    this.element.append(
      make("div", { className: "tools", role: "group", "aria-label": "This picture" },
        button("download", "Download", () => download(entry.blob, fileName(entry))),
        button("reuse", "Reuse settings", () => actions.reuse(entry)),
        button("picture", "Use as source", () => actions.startFrom(entry)),
        button("code", "API call", () => actions.call(entry)),
        button("bin", "Delete", () => actions.remove(entry))),
    );
  }

  close() {
    if (this.url) URL.revokeObjectURL(this.url);
  }
}

export class Stage {
  /** @param actions {reuse, startFrom, call, remove}, each called with a history entry. */
  constructor(actions) {
    this.actions = actions;
    this.tiles = [];
    setInterval(() => this.tiles.forEach((tile) => tile.tick()), 100);
  }

  /** Tiles for `count` pictures that are being made. */
  begin(count, width, height) {
    this.#replace(Array.from({ length: count }, () => new Tile(width, height)));
  }

  /** Show pictures of the history. */
  show(...entries) {
    const tiles = entries.map((entry) => {
      const tile = new Tile(entry.parameters.width, entry.parameters.height);
      tile.finish(entry, this.actions);
      return tile;
    });
    this.#replace(tiles);
  }

  progress(index, data) {
    this.tiles[index].progress(data);
  }

  finish(index, entry) {
    this.tiles[index].finish(entry, this.actions);
  }

  stop(text) {
    for (const tile of this.tiles) tile.stop(text);
  }

  /** An error that belongs to no control; "" takes it away. */
  problem(text, retry = null) {
    const again = retry && make("button", { type: "button", className: "small", textContent: "Try again", onclick: retry });
    byId("problem").replaceChildren(make("p", { textContent: text }), ...(again ? [again] : []));
    byId("problem").hidden = !text;
    if (text) byId("empty").hidden = true;
  }

  #replace(tiles) {
    for (const tile of this.tiles) tile.close();
    this.tiles = tiles;
    byId("tiles").replaceChildren(...tiles.map((tile) => tile.element));
    byId("tiles").classList.toggle("several", tiles.length > 1);
    byId("empty").hidden = tiles.length > 0;
  }
}

function fileName({ parameters, blob }) {
  const words = (parameters.prompt || "picture").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  const ending = { "image/jpeg": "jpg", "image/webp": "webp" }[blob.type] ?? "png";
  return `${words.replace(/^-|-$/g, "")}-${parameters.seed}.${ending}`;
}
