// The page: classes and their examples, the adaptation, and questions to it.

import { colour, drawChart, roundTop } from "./charts.js";
import { Pad } from "./drawing.js";
import { drawGlyph, names as glyphNames } from "./glyphs.js";
import { onDrop, readPicture } from "./pictures.js";
import { Problem, adapt, forget, info, predict } from "./server.js";

const $ = (id) => document.getElementById(id);
const CALM = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const WAIT_AFTER_STROKE = 60; // milliseconds
const WAIT_BETWEEN_STEPS = 500;

let served = null; // what /api/info says
let classes = []; // {name, examples: [data: URL], pad, card}
let adapted = null; // what /api/adapt said
let changed = false; // the examples, since then
let adapting = false;
let prediction = null; // of the query, by step
let step = 0; // the inner step that is looked at
let player = null; // timer of Play
let demonstration = 0; // counts up; a demonstration ends when it is no longer the last
const asking = { timer: 0, abort: null };

const percent = (share) => {
  const whole = Math.round(share * 100);
  if (whole === 100 && share < 1) return ">99%";
  return whole === 0 && share > 0 ? "<1%" : `${whole}%`;
};
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// Problems

function showProblem(error) {
  if (error.name === "AbortError") return;
  const known = error instanceof Problem;
  if (!known) console.error(error);
  $("problem-text").textContent = known ? error.message : "Something went wrong in this page; load it again.";
  $("problem").hidden = false;
}

const hideProblem = () => ($("problem").hidden = true);

/** A listener whose errors are shown. */
const safely = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    showProblem(error);
  }
};

// 1: classes and examples

function addClass(name) {
  const card = $("class-card").content.firstElementChild.cloneNode(true);
  const of = (selector) => card.querySelector(selector);
  const added = { name: name ?? freeName(), examples: [], card, pad: new Pad(of(".pad"), update) };
  classes.push(added);
  $("classes").append(card);
  of(".name").value = added.name;
  of(".name").maxLength = served.limits.name_length;
  of(".name").addEventListener("input", () => {
    added.name = of(".name").value;
    examplesChanged();
  });
  of(".remove").addEventListener("click", () => {
    classes = classes.filter((other) => other !== added);
    card.remove();
    examplesChanged();
    $("add-class").focus();
  });
  of(".add").addEventListener("click", () => takeDrawing(added));
  of(".undo").addEventListener("click", () => added.pad.undo());
  of(".clear").addEventListener("click", () => added.pad.clear());
  of(".files").addEventListener("change", safely(async (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    await takeFiles(added, files);
  }));
  onDrop(card, safely((files) => takeFiles(added, files)));
  examplesChanged();
  return added;
}

/** A, B, C ...: the first that no class has. */
function freeName() {
  const taken = new Set(classes.map((c) => c.name.trim().toUpperCase()));
  for (let i = 0; ; i++) {
    const name = i < 26 ? String.fromCharCode(65 + i) : `Class ${i + 1}`;
    if (!taken.has(name.toUpperCase())) return name;
  }
}

function takeDrawing(to) {
  if (to.pad.empty) {
    showProblem(new Problem(`Draw something in the box of “${to.name}” first.`));
    return;
  }
  hideProblem();
  to.examples.push(to.pad.url());
  to.pad.clear();
  examplesChanged();
}

async function takeFiles(to, files) {
  hideProblem();
  for (const file of files) {
    to.examples.push((await readPicture(file, longestSide())).url);
    examplesChanged();
  }
}

const longestSide = () => Math.max(128, 3 * served.model.image_size);

function examplesChanged() {
  changed = true;
  update();
}

function showClass(one, index) {
  const of = (selector) => one.card.querySelector(selector);
  const name = one.name.trim() || `class ${index + 1}`;
  one.card.style.setProperty("--colour", colour(index));
  one.card.setAttribute("aria-label", `Class ${name}`);
  of(".name").setAttribute("aria-label", `Name of class ${index + 1}`);
  of(".pad").setAttribute("aria-label", `Draw an example of ${name} here with the mouse, a pen or a finger. Without one, choose files.`);
  of(".remove").setAttribute("aria-label", `Remove ${name}`);
  of(".remove").disabled = classes.length <= 2;
  of(".undo").disabled = of(".clear").disabled = one.pad.empty;
  const count = one.examples.length;
  of(".count").textContent = count ? "" : "No example yet: draw one and add it, or drop image files here.";
  const list = of(".thumbnails");
  if (list.childElementCount !== count || list.dataset.of !== name || list.dataset.last !== one.examples.at(-1)) {
    list.dataset.of = name;
    list.dataset.last = one.examples.at(-1) ?? "";
    list.replaceChildren(...one.examples.map((url, i) => thumbnail(one, name, url, i)));
  }
}

function thumbnail(one, name, url, i) {
  const item = document.createElement("li");
  const image = document.createElement("img");
  image.src = url;
  image.alt = `Example ${i + 1} of ${name}`;
  const remove = document.createElement("button");
  remove.type = "button";
  remove.textContent = "×";
  remove.setAttribute("aria-label", `Delete example ${i + 1} of ${name}`);
  remove.addEventListener("click", () => {
    one.examples.splice(i, 1);
    examplesChanged();
    one.card.querySelector(".thumbnails button")?.focus();
  });
  item.append(image, remove);
  return item;
}

/** What keeps the classes from being learned, in words, with where to mend it; null when nothing does. */
function missing() {
  const seen = new Set();
  for (const one of classes) {
    const name = one.name.trim();
    if (!name) return { text: "Give every class a name.", at: one.card.querySelector(".name") };
    if (seen.has(name.toLowerCase())) return { text: `Two classes are called “${name}”; rename one.`, at: one.card.querySelector(".name") };
    seen.add(name.toLowerCase());
  }
  const without = classes.filter((one) => !one.examples.length && one.pad.empty);
  if (without.length) {
    const names = without.map((one) => `“${one.name.trim()}”`);
    const last = names.pop();
    return { text: `Still without an example: ${names.length ? `${names.join(", ")} and ` : ""}${last}.`, at: without[0].card.querySelector(".add") };
  }
  return null;
}

// 2: adapt

async function learn() {
  if (adapting) return;
  hideProblem();
  const lacking = missing();
  if (lacking) {
    lacking.at.focus();
    throw new Problem(lacking.text);
  }
  // A drawing that was not added was meant.
  for (const one of classes) if (!one.pad.empty) takeDrawing(one);
  const examples = classes.map((one) => [one.name.trim(), one.examples]);
  if (examples.flat(2).join().length > 0.98 * served.limits.upload_bytes) {
    throw new Problem("The examples are too many or too large to be sent at once; delete some.");
  }
  stopPlaying();
  adapting = true;
  changed = false; // unless they change meanwhile
  update();
  try {
    const before = adapted;
    adapted = await adapt(examples, $("weigh-images").checked ? "images" : null);
    if (before) forget(before.id);
    prediction = null;
    step = adapted.steps;
  } catch (error) {
    changed = true;
    throw error;
  } finally {
    adapting = false;
    update();
  }
  // On a narrow screen the rest is below.
  $("adapt").scrollIntoView({ behavior: CALM ? "auto" : "smooth", block: window.innerWidth < 900 ? "start" : "nearest" });
  ask();
  play();
}

// 3: ask

function ask() {
  clearTimeout(asking.timer);
  asking.abort?.abort();
  if (!adapted || queryPad.empty) {
    prediction = null;
    update();
    return;
  }
  asking.timer = setTimeout(safely(answer), WAIT_AFTER_STROKE);
  update();
}

async function answer() {
  asking.abort = new AbortController();
  const { id } = adapted;
  try {
    const said = await predict(id, queryPad.url(), asking.abort.signal);
    if (adapted?.id !== id || queryPad.empty) return;
    prediction = { ...said.predictions[0], notes: said.notes };
    hideProblem();
  } catch (error) {
    if (adapted?.id !== id) return; // another was learned meanwhile
    if (error.status === 404) adapted = prediction = null;
    throw error;
  } finally {
    update();
  }
}

const takeQuery = safely(async (files) => {
  hideProblem();
  if (files.length) queryPad.showPicture(await readPicture(files[0], longestSide()));
});

const queryPad = new Pad($("query-pad"), ask);

// Watching the steps

function look(at) {
  step = at;
  update();
}

function play() {
  stopPlaying();
  if (CALM || !adapted) return;
  look(0);
  player = setInterval(() => {
    if (!adapted || step >= adapted.steps) stopPlaying();
    else look(step + 1);
    if (adapted && step >= adapted.steps) stopPlaying();
  }, WAIT_BETWEEN_STEPS);
  update();
}

function stopPlaying() {
  clearInterval(player);
  player = null;
  $("play").textContent = "Play";
}

function choose(at) {
  stopPlaying();
  look(at);
}

// What is seen

function guide() {
  if (adapting) return "Adapting to your examples…";
  if (!adapted || changed) {
    const lacking = missing();
    if (lacking) return "Step 1: draw an example of each class in its box and press “Add drawing”, or give it image files.";
    return adapted ? "Step 2: the examples have changed. Press “Adapt” to learn them." : "Step 2: press “Adapt” to learn these classes.";
  }
  if (!prediction) return "Step 3: draw in the box under “Ask”, and see which class it is taken for.";
  return "Drag the slider to watch the answer form. Or clear the box and ask again.";
}

function update() {
  if (!served) return;
  classes.forEach(showClass);
  $("add-class").disabled = classes.length >= served.model.most_classes;
  $("guide").textContent = guide();
  showAdaptation();
  showAnswer();
}

const equal = (counts) => Math.max(...counts) === Math.min(...counts);

/** What a share is one of: of unequal classes, a mean over them unless every example counts the same. */
const examplesMeant = (counts) =>
  adapted.weighing === "images" || equal(counts) ? "your examples are" : "each class's examples (a mean over the classes) are";

function showAdaptation() {
  const button = $("adapt-button");
  button.disabled = $("demo").disabled = $("start-over").disabled = adapting;
  button.textContent = adapting ? "Adapting…" : adapted ? "Adapt again" : "Adapt";
  const lacking = missing();
  const counts = classes.map((one) => one.examples.length);
  $("adapt-status").textContent =
    !adapting && (!adapted || changed) && lacking ? lacking.text
    : adapted && !changed ? `${percent(adapted.support_accuracies.at(-1))} of ${examplesMeant(counts)} recognised after ${plural(adapted.steps, "step")}; ${percent(adapted.support_accuracies[0])} before.`
    : "";
  $("weighing").hidden = equal(counts);
  $("loss").hidden = !adapted;
  const notes = [...(adapted?.notes ?? []), ...(prediction?.notes ?? [])];
  $("notes").hidden = !notes.length;
  $("notes").querySelector("ul").replaceChildren(...notes.map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
  if (!adapted) return;
  const losses = adapted.support_losses;
  drawChart($("loss-chart"), {
    lines: [{ index: 0, values: losses }],
    top: roundTop(Math.max(...losses, 0.1)),
    format: (value) => value.toFixed(value < 10 ? 2 : 0),
    selected: Math.min(step, adapted.steps),
    summary: `Loss on the examples after ${plural(adapted.steps, "inner step")}: ${losses.map((loss) => loss.toFixed(2)).join(", ")}`,
    choose,
    values: true,
  });
}

function showAnswer() {
  $("ask-first").hidden = Boolean(adapted);
  $("asking").hidden = !adapted;
  $("query-undo").disabled = $("query-clear").disabled = queryPad.empty;
  $("watch").hidden = $("course").hidden = !prediction;
  if (!adapted) return;
  if (!prediction) {
    $("answer").textContent = queryPad.empty ? "Draw in the box, or drop an image on it." : "…";
    return;
  }
  const shares = prediction.by_step[step];
  const best = shares.indexOf(Math.max(...shares));
  const name = document.createElement("strong");
  name.textContent = adapted.classes[best];
  $("answer").replaceChildren(step < adapted.steps ? `After ${step ? plural(step, "step") : "no step"}, the network says ` : "The network says ", name, `, ${percent(shares[best])} sure.`);
  showBars(shares, best);
  $("step").max = adapted.steps;
  $("step").value = step;
  $("step").setAttribute("aria-valuetext", `after ${step} of ${plural(adapted.steps, "inner step")}`);
  $("step-name").textContent = `${step} of ${adapted.steps}`;
  $("play").textContent = player ? "Stop" : "Play";
  $("play").hidden = CALM;
  drawChart($("course-chart"), {
    lines: adapted.classes.map((_, index) => ({ index, values: prediction.by_step.map((of) => of[index]) })),
    top: 1,
    format: percent,
    selected: step,
    summary: adapted.classes.map((of, i) => `${of}: ${prediction.by_step.map((shares) => percent(shares[i])).join(", ")}`).join("; "),
    choose,
    values: false,
  });
}

function showBars(shares, best) {
  const bars = $("bars");
  // Kept from one answer to the next, so that they grow and shrink.
  if (bars.dataset.of !== adapted.id) {
    bars.dataset.of = adapted.id;
    bars.replaceChildren(...adapted.classes.flatMap((name, i) => {
      const [label, track, bar, share] = ["span", "div", "div", "span"].map((tag) => document.createElement(tag));
      [label.className, track.className, bar.className, share.className] = ["label", "track", "bar", "share"];
      label.textContent = label.title = name;
      bar.style.setProperty("--colour", colour(i));
      track.append(bar);
      return [label, track, share];
    }));
  }
  shares.forEach((value, i) => {
    const [label, track, share] = [...bars.children].slice(3 * i, 3 * i + 3);
    label.classList.toggle("best", i === best);
    share.classList.toggle("best", i === best);
    track.firstElementChild.style.setProperty("--share", value);
    share.textContent = percent(value);
  });
}

// Demonstration

function startOver() {
  demonstration++;
  stopPlaying();
  hideProblem();
  if (adapted) forget(adapted.id);
  adapted = prediction = null;
  changed = false;
  for (const one of classes) one.card.remove();
  classes = [];
  queryPad.clear();
}

async function demonstrate() {
  startOver();
  const own = demonstration;
  const shown = glyphNames.slice(0, served.model.most_classes);
  for (const name of shown) {
    const one = addClass(name);
    for (let i = 0; i < 2; i++) {
      one.pad.show(drawGlyph(name));
      one.examples.push(one.pad.url());
    }
    one.pad.clear();
  }
  examplesChanged();
  await learn();
  await pause(CALM ? 0 : WAIT_BETWEEN_STEPS * (adapted.steps + 1));
  const glyph = drawGlyph(shown[Math.floor(Math.random() * shown.length)]);
  const drawn = [];
  for (const stroke of glyph) {
    for (let i = 1; i <= stroke.length && !CALM; i += 2) {
      if (own !== demonstration || queryPad.pointer !== null) return;
      queryPad.strokes = [...drawn, stroke.slice(0, i)];
      queryPad.paint();
      await pause(16);
    }
    if (own !== demonstration) return;
    drawn.push(stroke);
    queryPad.show([...drawn]);
  }
}

// Start

async function start() {
  try {
    served = await info();
  } catch (error) {
    $("guide").textContent = "This page could not ask the server what it serves. Load it again.";
    throw error;
  }
  const { model } = served;
  $("model").textContent = `The network was meta-trained on ${model.dataset}, ${model.ways}-way ${model.shots}-shot, and sees pictures of ${model.image_size} × ${model.image_size} pixels.`;
  addClass();
  addClass();
  changed = false;
  update();
}

$("demo").addEventListener("click", safely(demonstrate));
$("start-over").addEventListener("click", () => {
  startOver();
  addClass();
  addClass();
});
$("add-class").addEventListener("click", () => {
  const name = addClass().card.querySelector(".name");
  name.focus();
  name.select();
});
$("adapt-button").addEventListener("click", safely(learn));
$("problem-close").addEventListener("click", hideProblem);
$("query-undo").addEventListener("click", () => queryPad.undo());
$("query-clear").addEventListener("click", () => queryPad.clear());
$("query-file").addEventListener("change", (event) => {
  const files = [...event.target.files];
  event.target.value = "";
  takeQuery(files);
});
onDrop($("ask"), takeQuery);
// A file dropped beside a target must not replace the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
$("step").addEventListener("input", (event) => choose(Number(event.target.value)));
$("play").addEventListener("click", () => (player ? (stopPlaying(), update()) : play()));
window.addEventListener("resize", update);
window.addEventListener("pagehide", (event) => {
  if (adapted && !event.persisted) forget(adapted.id);
});
safely(start)();
