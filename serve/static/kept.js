/** What the browser keeps for the page; where it keeps nothing (blocked site data), it lives as long as the page. */

/** Texts by name in "localStorage" or "sessionStorage", of which even the mention fails where they are blocked. */
export function kept(area) {
  const memory = new Map();
  const attempt = (act, instead) => {
    try {
      return act(window[area]);
    } catch {
      return instead();
    }
  };
  return {
    get: (name) => attempt((storage) => storage.getItem(name), () => memory.get(name) ?? null),
    set: (name, text) => attempt((storage) => storage.setItem(name, text), () => memory.set(name, text)),
    remove: (name) => attempt((storage) => storage.removeItem(name), () => memory.delete(name)),
  };
}
