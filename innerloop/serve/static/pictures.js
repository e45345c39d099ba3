// Image files that a person chooses or drops.

import { Problem } from "./server.js";

const LARGEST_FILE = 50 * 2 ** 20;

/**
 * An image file, made small, for it is made smaller still before the network sees it.
 * @param {File} file
 * @param {number} longest longest side in pixels
 * @returns {Promise<{bitmap: ImageBitmap, url: string}>} url: a data: URL of a PNG
 */
export async function readPicture(file, longest) {
  if (file.size > LARGEST_FILE) throw new Problem(`“${file.name}” is larger than 50 MB; choose a smaller image.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Problem(`“${file.name}” is not an image that this browser can open; choose a PNG, JPEG, GIF or WebP file.`);
  }
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // under what is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return { bitmap, url: canvas.toDataURL("image/png") };
}

/**
 * Calls `take` with the files that are dropped on an element, and shows that it can.
 * @param {HTMLElement} element
 * @param {(files: File[]) => void} take
 */
export function onDrop(element, take) {
  let inside = 0; // dragenter comes for every child
  const show = (change) => {
    inside = Math.max(0, inside + change);
    element.classList.toggle("dropping", inside > 0);
  };
  element.addEventListener("dragenter", () => show(1));
  element.addEventListener("dragleave", () => show(-1));
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    show(-inside);
    take([...event.dataTransfer.files]);
  });
}
