/** Finished pictures with their parameters, in this browser's IndexedDB; the oldest leave when it gets full. */

const MOST = 80; // pictures
const BYTES = 96 * 2 ** 20;

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function database() {
  const request = indexedDB.open("diffray", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  return settled(request);
}

const size = (entry) => [entry.blob, entry.source, entry.mask].reduce((sum, blob) => sum + (blob?.size ?? 0), 0);

/**
 * Entries are {id, at, model, parameters, blob, source, mask, seconds}. Where the browser keeps nothing (some
 * private windows) they live as long as the page.
 */
export class History {
  constructor() {
    this.entries = []; // newest first
    this.database = null;
  }

  async open() {
    try {
      this.database = await database();
      this.entries = (await settled(this.#store("readonly").getAll())).reverse();
    } catch {
      this.database = null;
    }
    return this;
  }

  /** Keep one more; returns it with its id. */
  async add(entry) {
    try {
      entry.id = await settled(this.#store("readwrite").add(entry));
    } catch {
      entry.id ??= `memory-${crypto.randomUUID?.() ?? Math.random()}`;
    }
    this.entries.unshift(entry);
    let bytes = 0;
    const kept = this.entries.findIndex((one, index) => index >= MOST || ((bytes += size(one)) > BYTES && index > 0));
    if (kept > 0) for (const old of this.entries.slice(kept)) await this.remove(old.id);
    return entry;
  }

  async remove(id) {
    this.entries = this.entries.filter((entry) => entry.id !== id);
    await this.#quietly((store) => store.delete(id));
  }

  async clear() {
    this.entries = [];
    await this.#quietly((store) => store.clear());
  }

  #store(mode) {
    return this.database.transaction("pictures", mode).objectStore("pictures");
  }

  async #quietly(act) {
    try {
      await settled(act(this.#store("readwrite")));
    } catch {
      // nothing is kept, so nothing is left to remove
    }
  }
}
