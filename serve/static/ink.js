/** A mask in its two forms: black and white, as the service takes it, and ink on a clear ground, as it is painted. */

import { make } from "./dom.js";

const BOARD = ["rgb(230 30 110)", "#fff"]; // a checkerboard shows on every colour

function copyOf(image, width, height) {
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(image, 0, 0, width, height);
  return canvas;
}

/** Ink where `mask` is white. */
export function inkOf(mask, width = mask.width, height = mask.height) {
  const canvas = copyOf(mask, width, height);
  const brush = canvas.getContext("2d");
  const pixels = brush.getImageData(0, 0, width, height);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at];
  brush.putImageData(pixels, 0, 0);
  return canvas;
}

/** White where there is ink, black elsewhere; null where there is none at all. */
export function maskOf(ink) {
  const canvas = make("canvas", { width: ink.width, height: ink.height });
  const brush = canvas.getContext("2d", { willReadFrequently: true });
  brush.fillRect(0, 0, ink.width, ink.height);
  brush.drawImage(ink, 0, 0);
  const painted = brush.getImageData(0, 0, ink.width, ink.height).data.some((value, at) => at % 4 === 0 && value > 127);
  return painted ? canvas : null;
}

/** Draw `picture` with what is inked marked on it. */
export function drawMarked(brush, picture, ink) {
  const { width, height } = brush.canvas;
  brush.drawImage(picture, 0, 0, width, height);
  if (!ink) return;
  const mark = copyOf(ink, width, height);
  const colour = mark.getContext("2d");
  colour.globalCompositeOperation = "source-in";
  colour.fillStyle = colour.createPattern(board(Math.max(1, Math.round(Math.min(width, height) / 48))), "repeat");
  colour.fillRect(0, 0, width, height);
  brush.globalAlpha = 0.65;
  brush.drawImage(mark, 0, 0);
  brush.globalAlpha = 1;
}

function board(cell) {
  const canvas = make("canvas", { width: 2 * cell, height: 2 * cell });
  const brush = canvas.getContext("2d");
  for (const [x, y] of [[0, 0], [0, 1], [1, 0], [1, 1]]) {
    brush.fillStyle = BOARD[(x + y) % 2];
    brush.fillRect(x * cell, y * cell, cell, cell);
  }
  return canvas;
}
