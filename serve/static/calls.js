/** The dialog with the API call of a picture. */

import { byId, download, make, pngOf } from "./dom.js";
import { key } from "./key.js";
import { KINDS } from "./snippets.js";

/** Show how `entry` is made through the API. */
export function showCall(entry) {
  const dialog = byId("calls");
  const show = (kind) => (byId("calls-code").textContent = KINDS[kind](entry, Boolean(key())));
  const choice = (kind, index) =>
    make("label", {},
      make("input", { type: "radio", name: "kind", value: kind, checked: index === 0, onchange: () => show(kind) }),
      make("span", { textContent: kind }));
  byId("calls-kinds").replaceChildren(...Object.keys(KINDS).map(choice));
  byId("calls-files").replaceChildren(...files(entry));
  show(Object.keys(KINDS)[0]);
  byId("calls-copy").textContent = "Copy";
  byId("calls-copy").onclick = copy;
  byId("calls-close").onclick = () => dialog.close();
  dialog.showModal();
  byId("calls-copy").focus();
}

async function copy() {
  const code = byId("calls-code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    byId("calls-copy").textContent = "Copied";
  } catch {
    window.getSelection().selectAllChildren(code); // no clipboard without https: let the user copy what is marked
    byId("calls-copy").textContent = "Press Ctrl+C";
  }
}

/** The pictures that the call reads from files. */
function files({ source, mask }) {
  const offer = (name, blob) =>
    make("button", { type: "button", className: "small", textContent: name, onclick: async () => download(await blob(), name) });
  return [
    ...(source ? [offer("source.png", () => source)] : []),
    ...(mask ? [offer("mask.png", () => mask), offer("mask-openai.png", () => clear(mask))] : []),
  ];
}

/** The mask as OpenAI's API has it: clear where to repaint. */
async function clear(mask) {
  const bitmap = await createImageBitmap(mask);
  const canvas = make("canvas", { width: bitmap.width, height: bitmap.height });
  const brush = canvas.getContext("2d");
  brush.drawImage(bitmap, 0, 0);
  const pixels = brush.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = 255 - pixels.data[at];
  brush.putImageData(pixels, 0, 0);
  return pngOf(canvas);
}
