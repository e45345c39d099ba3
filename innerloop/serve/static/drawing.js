// A square of white paper to draw on with mouse, pen or finger, in dark ink.

const INK = "#111";
// Of the paper's width: about the pen of the drawings that the packaged model has seen.
const PEN = 0.05;
// Of the pictures that are sent, in pixels.
const SENT = 224;
// Drawings are sent at one size and place, as the model has seen them, however small and wherever they were drawn. Of
// the picture's width, from the middle of the pen to the middle of the pen.
const FILL = 0.7;
// A dot is not blown up to fill the picture.
const MOST_ENLARGED = 5;

export class Pad {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {() => void} changed called after every stroke, undo and clear
   */
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.strokes = []; // each a list of [x, y] from 0 to 1
    this.picture = null; // an image file laid on the paper: {bitmap, url}
    this.pointer = null;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.#up(event));
    new ResizeObserver(() => this.paint()).observe(canvas);
  }

  get empty() {
    return this.strokes.length === 0 && this.picture === null;
  }

  undo() {
    if (this.strokes.length) this.strokes.pop();
    else this.picture = null;
    this.#update();
  }

  clear() {
    this.strokes = [];
    this.picture = null;
    this.#update();
  }

  /** Lays strokes on the paper in place of what is there. */
  show(strokes) {
    this.picture = null;
    this.strokes = strokes;
    this.#update();
  }

  /** Lays an image on the paper in place of what is there. */
  showPicture(picture) {
    this.strokes = [];
    this.picture = picture;
    this.#update();
  }

  /** The drawing as the data: URL of a PNG, dark on white, centred and enlarged; a picture as it was read. */
  url() {
    if (this.picture) return this.picture.url;
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SENT;
    drawStrokes(canvas.getContext("2d"), SENT, centred(this.strokes));
    return canvas.toDataURL("image/png");
  }

  paint() {
    const size = Math.round(this.canvas.clientWidth * window.devicePixelRatio);
    if (!size) return;
    if (this.canvas.width !== size) this.canvas.width = this.canvas.height = size;
    this.#draw(this.canvas.getContext("2d"), size);
  }

  #draw(context, size) {
    drawStrokes(context, size, this.strokes);
    if (this.picture) {
      const { bitmap } = this.picture;
      const scale = size / Math.max(bitmap.width, bitmap.height);
      const [width, height] = [bitmap.width * scale, bitmap.height * scale];
      context.drawImage(bitmap, (size - width) / 2, (size - height) / 2, width, height);
    }
  }

  #place(event) {
    const paper = this.canvas.getBoundingClientRect();
    return [(event.clientX - paper.left) / paper.width, (event.clientY - paper.top) / paper.height];
  }

  #down(event) {
    if (event.button !== 0 || this.pointer !== null) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.pointer = event.pointerId;
    this.picture = null;
    this.strokes.push([this.#place(event)]);
    this.paint();
  }

  #move(event) {
    if (event.pointerId !== this.pointer) return;
    const between = event.getCoalescedEvents?.() ?? [];
    this.strokes.at(-1).push(...(between.length ? between : [event]).map((e) => this.#place(e)));
    this.paint();
  }

  #up(event) {
    if (event.pointerId !== this.pointer) return;
    this.pointer = null;
    this.#update();
  }

  #update() {
    this.paint();
    this.changed();
  }
}

/** Strokes in dark ink on white paper. */
function drawStrokes(context, size, strokes) {
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size, size);
  context.strokeStyle = INK;
  context.lineWidth = PEN * size;
  context.lineCap = context.lineJoin = "round";
  for (const points of strokes) {
    context.beginPath();
    context.moveTo(points[0][0] * size, points[0][1] * size);
    // A tap is a dot: a line of no length has round ends.
    for (const [x, y] of points.length > 1 ? points.slice(1) : points) context.lineTo(x * size, y * size);
    context.stroke();
  }
}

/** The same strokes in the middle of the paper, the longer side of their box as long as FILL. */
function centred(strokes) {
  const [xs, ys] = [0, 1].map((axis) => strokes.flat().map((point) => point[axis]));
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const scale = Math.min(MOST_ENLARGED, FILL / Math.max(right - left, bottom - top));
  return strokes.map((points) =>
    points.map(([x, y]) => [0.5 + (x - (left + right) / 2) * scale, 0.5 + (y - (top + bottom) / 2) * scale]),
  );
}
