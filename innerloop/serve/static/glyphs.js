// Three characters for the demonstration, each drawing of one a little different from the last.

const line = (...points) => points;

function spiral() {
  const points = [];
  for (let t = 0; t <= 1; t += 0.02) {
    const angle = 4.4 * Math.PI * t;
    points.push([0.5 + 0.38 * t * Math.cos(angle), 0.5 + 0.38 * t * Math.sin(angle)]);
  }
  return [points];
}

const GLYPHS = {
  spiral,
  ladder: () => [
    line([0.3, 0.12], [0.3, 0.88]),
    line([0.7, 0.12], [0.7, 0.88]),
    line([0.3, 0.36], [0.7, 0.36]),
    line([0.3, 0.64], [0.7, 0.64]),
  ],
  bolt: () => [line([0.62, 0.1], [0.3, 0.52], [0.66, 0.5], [0.36, 0.9])],
};

export const names = Object.keys(GLYPHS);

/** Strokes of a glyph, shifted, turned, stretched and wobbled by chance. */
export function drawGlyph(name) {
  const chance = (size) => (Math.random() * 2 - 1) * size;
  const [turn, wide, high, dx, dy] = [chance(0.14), 1 + chance(0.1), 1 + chance(0.1), chance(0.04), chance(0.04)];
  const [cos, sin] = [Math.cos(turn), Math.sin(turn)];
  const place = ([px, py]) => {
    const [x, y] = [(px - 0.5) * wide, (py - 0.5) * high];
    return [0.5 + dx + x * cos - y * sin + chance(0.002), 0.5 + dy + x * sin + y * cos + chance(0.002)];
  };
  return GLYPHS[name]().map((stroke) => finer(stroke).map(place));
}

/** The same line with points close together, so that it can be drawn little by little. */
function finer(points) {
  const fine = [points[0]];
  for (let i = 1; i < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    const parts = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0) / 0.04));
    for (let k = 1; k <= parts; k++) fine.push([x0 + ((x1 - x0) * k) / parts, y0 + ((y1 - y0) * k) / parts]);
  }
  return fine;
}
