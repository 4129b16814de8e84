/** The shelf of earlier pictures. */

import { byId, make } from "./dom.js";

export class Gallery {
  /**
   * @param history the `History` that is shown.
   * @param onpick called with the entry that was clicked.
   */
  constructor(history, onpick) {
    this.history = history;
    this.onpick = onpick;
    this.urls = new Map();
    byId("history-clear").onclick = () => this.#clear();
  }

  /** Draw it again; `current` is the id of the entry on the stage. */
  show(current = null) {
    const { entries } = this.history;
    for (const [id, url] of this.urls) {
      if (entries.some((entry) => entry.id === id)) continue;
      URL.revokeObjectURL(url);
      this.urls.delete(id);
    }
    byId("history").hidden = entries.length === 0;
    byId("history-count").textContent = entries.length;
    byId("history-list").replaceChildren(...entries.map((entry) => this.#item(entry, entry.id === current)));
  }

  #item(entry, current) {
    if (!this.urls.has(entry.id)) this.urls.set(entry.id, URL.createObjectURL(entry.blob));
    const { prompt, width, height } = entry.parameters;
    const image = make("img", { src: this.urls.get(entry.id), alt: "", loading: "lazy" });
    if (Math.max(width, height) <= 128) image.className = "small";
    const label = `${prompt || "No prompt"}, ${new Date(entry.at).toLocaleString()}`;
    const item = make("button", { type: "button", title: prompt, "aria-label": label, onclick: () => this.onpick(entry) }, image);
    if (current) item.setAttribute("aria-current", "true");
    return make("li", {}, item);
  }

  async #clear() {
    if (!window.confirm("Remove all pictures from this browser's history?")) return;
    await this.history.clear();
    this.show();
  }
}
