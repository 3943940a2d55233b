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
const { slider } = data;
const state = { pixels: null, session: null, moved: null, turn: 0, stream: null, exits: [], busy: Promise.resolve() };

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

// -- the model ------------------------------------------------------------------------------------------------

const softmax = (logits) => {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
};

/** What the logits of an exit say: the class, or the classes, and how probable they are. */
function read(logits) {
  if (!data.several) {
    const shares = softmax(logits);
    const probability = Math.max(...shares);
    return { label: data.class_names[shares.indexOf(probability)] ?? "no answer", probability };
  }
  const label = data.class_names.filter((_, index) => logits[index] > 0).join(", ") || "none of the classes";
  return { label, probability: 1 / (1 + Math.exp(-Math.min(...logits.map(Math.abs)))) };
}

/** One run with some of the file's inputs changed; a session takes one at a time. */
function run(changes) {
  const done = state.busy.then(() => runNow(changes));
  state.busy = done.catch(() => null);
  return done;
}

async function runNow(changes) {
  const feeds = { pixel_values: new ort.Tensor("float32", state.pixels, shape) };
  for (const [name, list] of Object.entries({ ...data.inputs, ...changes })) {
    // what this policy has no use for may be no input of the file
    if (state.session.inputNames.includes(name)) feeds[name] = new ort.Tensor("float32", list, [list.length]);
  }
  const began = performance.now();
  const found = await state.session.run(feeds);
  const ms = performance.now() - began;
  const exit = Number(found.exit_index.data[0]);
  const logits = Array.from(found.logits.data, (logit) => logit / data.inputs.exit_temperatures[exit]);
  return { exit, ms, score: found.exit_score.data[0], known: logits.every(Number.isFinite), ...read(logits) };
}

/** The slider's input with the same number for all exits. */
const chosen = () => (state.moved === null ? {} : { [slider.input]: data.inputs[slider.input].map(() => state.moved) });

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
  const found = await run(chosen());
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

/** Every exit in turn, as far as the policy can be brought to take it; the page is drawn between them. */
async function everyExit(turn) {
  for (const changes of data.runs) {
    await new Promise((done) => setTimeout(done));
    if (turn !== state.turn) return;
    const found = await run(changes);
    if (turn !== state.turn) return;
    if (!state.exits.some(({ exit }) => exit === found.exit)) state.exits.push(found);
    drawExits();
  }
}

function drawExits() {
  const rows = state.exits.map(({ exit, probability }) => ({
    name: `block ${data.depths[exit]}`, share: probability, text: percent(probability), chosen: exit === state.taken,
  }));
  byId("exits").replaceChildren(bars(rows, "Probability of the answer of every exit"));
  byId("exit-table").replaceChildren(table(
    ["exit", "answer", "probability", "score", "ms"],
    state.exits.map(({ exit, label, probability, score, ms }) => [
      `block ${data.depths[exit]}${exit === state.taken ? ", taken" : ""}`, label, percent(probability), short(score), ms.toFixed(1),
    ]),
  ));
}

// -- what a person moves --------------------------------------------------------------------------------------

/** A number in at most four digits. */
const short = (value) => `${Number(value.toPrecision(4))}`;
/** The numbers of an input at the early exits that are in the file; a patience is one for all. */
const here = (name) => data.exits.slice(0, -1).map((exit) => data.inputs[name][exit] ?? data.inputs[name][0]);
const inWords = (name) => [...new Set(here(name).map(short))].join(", ");

function drawThreshold() {
  byId("slider").hidden = byId("reset").hidden = slider === null;
  if (slider === null) {
    byId("position").textContent = `${data.policy}: nothing can be set here, every image is answered after block ${data.depths[data.exits[0]]}.`;
    return;
  }
  const told = state.moved === null ? `${inWords(slider.input)} as exported` : `${short(state.moved)} for all exits`;
  const others = Object.keys(data.inputs)
    .filter((name) => name !== slider.input && name !== "exit_temperatures")
    .map((name) => ` ${name.replaceAll("_", " ")} stays ${inWords(name)}.`);
  byId("position").textContent = `${data.policy}, ${slider.score}: ${told}. ${slider.lower ? "Lower" : "Higher"} means fewer early exits.${others.join("")}`;
  byId("slider").max = slider.steps;
  byId("slider").value = Math.round((slider.steps * ((state.moved ?? here(slider.input)[0]) - slider.least)) / (slider.most - slider.least));
  byId("slider").setAttribute("aria-valuetext", told);
}

function move(value) {
  state.moved = value;
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
  byId("slider").addEventListener("input", (event) =>
    move(slider.least + ((slider.most - slider.least) * Number(event.target.value)) / slider.steps));
  byId("reset").addEventListener("click", () => move(null));
  byId("samples").append(...data.samples.map((file, index) => {
    const button = html("button", { type: "button" }, html("img", { src: file, class: "small", alt: `sample image ${index + 1}` }));
    button.addEventListener("click", () => look(async () => bitmapOf(await (await fetch(file)).blob()), `Sample image ${index + 1}`));
    return button;
  }));
}

/** The first runs take longer than those after them. */
async function warmUp() {
  state.pixels = new Float32Array(shape.reduce((product, side) => product * side));
  for (const changes of data.runs) await run(changes);
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
    state.session = await ort.InferenceSession.create(new Uint8Array(await file.arrayBuffer()), { executionProviders: ["wasm"], logSeverityLevel: 3 });
    await warmUp();
  } catch (error) {
    byId("message").textContent = `${data.file} does not open: ${error.message}. Export it again, and serve the whole folder.`;
    return;
  }
  byId("message").textContent = "Ready: choose an image.";
  listen();
}

start();
