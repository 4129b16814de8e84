/** The API key: asked for when the service wants one, kept in this tab's session storage. */

import { byId } from "./dom.js";
import { kept } from "./kept.js";

const NAME = "diffray.key";
const session = kept("sessionStorage");

export const key = () => session.get(NAME) ?? "";

export const forget = () => session.remove(NAME);

/** Ask for a key; resolves to whether one was given. `reason` is shown, such as why the last one failed. */
export function askKey(reason = "") {
  const dialog = byId("key");
  byId("key-value").value = "";
  byId("key-problem").textContent = reason;
  byId("key-problem").hidden = !reason;
  byId("key-cancel").onclick = () => dialog.close();
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      session.set(NAME, byId("key-value").value.trim());
      dialog.close("given");
    };
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
  });
}
