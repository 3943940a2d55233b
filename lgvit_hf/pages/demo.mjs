// The demo of `lgvit export --web`: an image, its answer, the exit it took, and what every exit says of it.
/* global byId, html, percent, table, bars */
import { prepare } from "./pixels.mjs";
import * as ort from "./ort.wasm.min.mjs";

const data = JSON.parse(byId("data").textContent);
const MAX_BYTES = 32e6;
const MAX_PIXELS = 50e6;
const MAX_SIDE = 32768;
const last = data.depths.length - 1;
const shape = [1, data.image.channels, ...(data.image.crop ?? data.image.size)];
const state = { pixels: null, session: null, threshold: null, turn: 0, stream: null, exits: [], busy: Promise.resolve() };

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

// -- the model ------------------------------------------------------------------------------------------------

const softmax = (logits) => {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
};

/** One run, with a threshold per exit; a session takes one at a time. */
function run(thresholds) {
  const done = state.busy.then(() => runNow(thresholds));
  state.busy = done.catch(() => null);
  return done;
}

async function runNow(thresholds) {
  const inputs = { ...data.inputs, exit_thresholds: thresholds };
  const feeds = Object.fromEntries(Object.entries(inputs).map(([name, list]) => [name, new ort.Tensor("float32", list, [list.length])]));
  const began = performance.now();
  const found = await state.session.run({ pixel_values: new ort.Tensor("float32", state.pixels, shape), ...feeds });
  const ms = performance.now() - began;
  const exit = Number(found.exit_index.data[0]);
  const logits = found.logits.data;
  const shares = softmax(Array.from(logits, (logit) => logit / data.inputs.exit_temperatures[exit]));
  const probability = Math.max(...shares);
  return { exit, ms, probability, label: data.class_names[shares.indexOf(probability)], known: Number.isFinite(probability) };
}

const thresholds = () => data.inputs.exit_thresholds.map((number) => state.threshold ?? number);

/** Thresholds by which an image exits at one exit, whatever it shows. */
const forced = (exit) => data.inputs.exit_thresholds.map((_, index) => (index === exit ? data.always : data.never));

// -- an image -------------------------------------------------------------------------------------------------

/** Bytes of a picture as the model's image reader has them: upright, over white, without colour profiles. */
function bytesOf(source, width, height) {
  if (!width || !height) throw new Error(`it has ${width} x ${height} pixels`);
  if (width * height > MAX_PIXELS || Math.max(width, height) > MAX_SIDE) {
    throw new Error(`it has ${width} x ${height} pixels; at most ${MAX_PIXELS / 1e6} million are taken, and ${MAX_SIDE} on one side`);
  }
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("this browser has no room to read it");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0);
  return { canvas, rgba: context.getImageData(0, 0, width, height).data };
}

async function bitmapOf(file) {
  if (!file) throw new Error("no file was dropped: drag an image file");
  if (!file.size) throw new Error("the file is empty");
  if (file.size > MAX_BYTES) throw new Error(`the file has ${(file.size / 1e6).toFixed(0)} MB; at most ${MAX_BYTES / 1e6} MB are taken`);
  try {
    return await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error("it is no image that this browser reads, as PNG, JPEG or WebP");
  }
}

/** Shows and classifies a picture; says in a sentence why not. */
async function look(open, name) {
  const turn = (state.turn += 1);
  byId("message").hidden = false;
  byId("message").textContent = `${name} is being classified.`;
  try {
    const source = await open();
    const [width, height] = [source.videoWidth ?? source.width, source.videoHeight ?? source.height];
    const { canvas, rgba } = bytesOf(source, width, height);
    if (turn !== state.turn) return;
    state.pixels = prepare(rgba, [height, width], data.image);
    state.exits = [];
    byId("shown").src = preview(canvas);
    byId("shown").className = Math.max(width, height) < 64 ? "small" : "";
    byId("shown").hidden = false;
    await answer(turn);
    await everyExit(turn);
  } catch (error) {
    if (turn === state.turn) byId("message").textContent = `${name}: ${error.message}.`;
  }
}

/** A copy for the eye, small enough for a page. */
function preview(canvas) {
  const shrink = Math.min(1, 640 / Math.max(canvas.width, canvas.height));
  const small = document.createElement("canvas");
  [small.width, small.height] = [Math.max(1, canvas.width * shrink), Math.max(1, canvas.height * shrink)];
  small.getContext("2d").drawImage(canvas, 0, 0, small.width, small.height);
  return small.toDataURL();
}

// -- answers --------------------------------------------------------------------------------------------------

async function answer(turn) {
  const found = await run(thresholds());
  if (turn !== state.turn) return;
  const figure = (name, value, small, id) => html("div", {}, html("dt", {}, name), html("dd", { id }, value, html("small", {}, small)));
  byId("message").hidden = true;
  byId("answer").replaceChildren(
    figure("class", found.label, found.known ? `probability ${percent(found.probability)}` : "the model gave no number", "label"),
    figure("exit", `after block ${data.depths[found.exit]}`, `of ${data.depths[last]}, exit ${found.exit} of ${last}`, "exit"),
    figure("time", `${found.ms.toFixed(1)} ms`, "in this browser, one thread", "time"),
  );
  state.taken = found.exit;
  drawExits();
}

/** Every exit in turn, forced; the page is drawn between them. */
async function everyExit(turn) {
  for (const exit of data.exits) {
    await new Promise((done) => setTimeout(done));
    if (turn !== state.turn) return;
    const found = await run(forced(exit));
    if (turn !== state.turn) return;
    state.exits.push(found);
    drawExits();
  }
}

function drawExits() {
  const rows = state.exits.map(({ exit, probability }) => ({
    name: `block ${data.depths[exit]}`, share: probability, text: percent(probability), chosen: exit === state.taken,
  }));
  byId("exits").replaceChildren(bars(rows, "Probability of the answer of every exit"));
  byId("exit-table").replaceChildren(table(
    ["exit", "answer", "probability", "ms until there"],
    state.exits.map(({ exit, label, probability, ms }) => [
      `block ${data.depths[exit]}${exit === state.taken ? ", taken" : ""}`, label, percent(probability), ms.toFixed(1),
    ]),
  ));
}

// -- what a person moves --------------------------------------------------------------------------------------

function drawThreshold() {
  const number = (value) => value.toPrecision(3);
  const exported = data.inputs.exit_thresholds.map(number);
  const told = state.threshold === null ? `as exported: ${[...new Set(exported)].join(", ")}` : `${number(state.threshold)} for all exits`;
  byId("position").textContent = `${data.policy}: ${told}. ${data.lower ? "Lower" : "Higher"} means fewer early exits.`;
  byId("slider").value = Math.round((1000 * (state.threshold ?? data.inputs.exit_thresholds[0])) / data.most);
  byId("slider").setAttribute("aria-valuetext", told);
}

function setThreshold(value) {
  state.threshold = value;
  drawThreshold();
  clearTimeout(state.timer);
  if (state.pixels !== null) state.timer = setTimeout(() => answer(state.turn), 30);
}

async function toggleCamera() {
  const video = byId("video");
  if (state.stream) {
    state.stream.getTracks().forEach((track) => track.stop());
    state.stream = null;
  } else {
    try {
      state.stream = await navigator.mediaDevices.getUserMedia({ video: true });
      video.srcObject = state.stream;
      await video.play();
    } catch {
      byId("message").hidden = false;
      byId("message").textContent = "The webcam does not start: there is none, or this page may not use it (browsers ask for https or localhost).";
    }
  }
  video.hidden = byId("frame").hidden = state.stream === null;
  byId("camera").textContent = state.stream === null ? "Start webcam" : "Stop webcam";
}

function listen() {
  const drop = byId("drop");
  const over = (event, isOver) => { event.preventDefault(); drop.classList.toggle("over", isOver); };
  // a file dropped beside the field must not take the page's place
  addEventListener("dragover", (event) => over(event, drop.contains(event.target)));
  addEventListener("drop", (event) => {
    over(event, false);
    const file = event.dataTransfer.files[0];
    look(() => bitmapOf(file), file ? file.name : "What was dropped");
  });
  byId("file").addEventListener("change", (event) => {
    const file = event.target.files[0];
    if (file) look(() => bitmapOf(file), file.name);
    event.target.value = "";
  });
  byId("camera").addEventListener("click", toggleCamera);
  byId("frame").addEventListener("click", () => look(async () => byId("video"), "The frame"));
  byId("slider").addEventListener("input", (event) => setThreshold((data.most * Number(event.target.value)) / 1000));
  byId("reset").addEventListener("click", () => setThreshold(null));
  byId("samples").append(...data.samples.map((file, index) => {
    const button = html("button", { type: "button" }, html("img", { src: file, class: "small", alt: `sample image ${index + 1}` }));
    button.addEventListener("click", () => look(async () => bitmapOf(await (await fetch(file)).blob()), `Sample image ${index + 1}`));
    return button;
  }));
}

/** The first runs take longer than those after them. */
async function warmUp() {
  state.pixels = new Float32Array(shape.reduce((product, side) => product * side));
  for (const exit of data.exits) await run(forced(exit));
  state.pixels = null;
}

async function start() {
  byId("model").textContent = data.model;
  document.title = `${data.model}: early exits in a browser`;
  byId("about").textContent = `${data.class_names.length} classes; exits after blocks ${data.exits.map((exit) => data.depths[exit]).join(", ")}; ${data.precision}`;
  byId("made").textContent = `Written by lgvit export --web, lgvit-hf ${data.version}; onnxruntime-web ${data.runtime}.`;
  drawThreshold();
  try {
    const file = await fetch(data.file);
    if (!file.ok) throw new Error(`the server says ${file.status}`);
    state.session = await ort.InferenceSession.create(new Uint8Array(await file.arrayBuffer()), { executionProviders: ["wasm"] });
    await warmUp();
  } catch (error) {
    byId("message").textContent = `${data.file} does not open: ${error.message}. Export it again, and serve the whole folder.`;
    return;
  }
  byId("message").textContent = "Ready: choose an image.";
  listen();
}

start();
