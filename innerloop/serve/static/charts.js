// Line charts over inner steps, as inline SVG.

// Okabe and Ito's colours, told apart by the colour-blind; those that stand out best from white first.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

export const colour = (index) => COLOURS[index % COLOURS.length];
const dash = (index) => DASHES[Math.floor(index / COLOURS.length) % DASHES.length];

/**
 * @param {SVGElement} svg
 * @param {object} chart
 * @param {{index: number, values: number[]}[]} chart.lines one value for each step 0..K
 * @param {number} chart.top of the vertical axis, which starts at 0
 * @param {(value: number) => string} chart.format of values
 * @param {number} chart.selected the step that is marked
 * @param {string} chart.summary for who cannot see it
 * @param {(step: number) => void} chart.choose called when a step is clicked
 * @param {boolean} chart.values whether the values are written at the points
 */
export function drawChart(svg, { lines, top, format, selected, summary, choose, values }) {
  const [width, height] = [svg.clientWidth || 320, svg.clientHeight || 170];
  const [left, right, above, below] = [44, 22, 18, 40];
  const steps = lines[0].values.length - 1;
  const x = (step) => left + (step / Math.max(steps, 1)) * (width - left - right);
  const y = (value) => height - below - (value / top) * (height - above - below);

  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", summary);
  svg.replaceChildren();
  const add = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    svg.append(element);
    return element;
  };

  for (const value of [0, top / 2, top]) {
    add("line", { class: value ? "grid" : "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) });
    add("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, format(value));
  }
  const every = Math.ceil(steps / Math.max(1, Math.floor((width - left - right) / 28)));
  for (let step = 0; step <= steps; step++) {
    if (step % every === 0) add("text", { x: x(step), y: height - below + 17, "text-anchor": "middle" }, step);
  }
  add("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, "inner steps taken");

  add("line", { class: "selected", x1: x(selected), x2: x(selected), y1: above - 8, y2: height - below });
  for (const { index, values: heights } of lines) {
    const stroke = colour(index);
    const points = heights.map((value, step) => `${x(step)},${y(value)}`).join(" ");
    add("polyline", { points, fill: "none", stroke, "stroke-width": 2.5, "stroke-dasharray": dash(index), "stroke-linejoin": "round" });
    heights.forEach((value, step) => {
      add("circle", { cx: x(step), cy: y(value), r: step === selected ? 5.5 : 3.5, fill: stroke, stroke: "#fff" });
    });
    if (values) {
      for (const step of new Set([0, selected])) {
        const end = step === steps && steps > 0;
        add("text", { x: x(step) + (end ? 8 : 7), y: y(heights[step]) - 8, "text-anchor": end ? "end" : "start", "font-weight": 700 }, format(heights[step]));
      }
    }
  }
  const half = (x(1) - x(0)) / 2 || 20;
  for (let step = 0; step <= steps; step++) {
    const area = add("rect", { class: "step", x: x(step) - half, y: 0, width: 2 * half, height });
    area.addEventListener("click", () => choose(step));
  }
}

/** A round number at or above a positive value. */
export function roundTop(value) {
  const magnitude = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((m) => m * magnitude).find((v) => v >= value * 0.999);
}
