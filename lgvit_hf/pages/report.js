// The report of `lgvit report`: draws what its data say of one setting. All figures were worked out in Python.
"use strict";

const data = JSON.parse(byId("data").textContent);
const state = { mode: 0, step: 0, exit: data.depths.length - 1 };
const cost = (value) => `${value.toPrecision(4)} ${data.cost.unit}`;
const points = (difference) => `${difference > 0 ? "+" : ""}${(100 * difference).toFixed(2)} points`;
const exitName = (index) => `block ${data.depths[index]}${index === data.depths.length - 1 ? ", final" : ""}`;
const setting = () => data.modes[state.mode].settings[state.step];

// -- accuracy against cost ------------------------------------------------------------------------------------

function curve() {
  const all = data.modes.flatMap((mode) => mode.settings);
  const floor = data.calibration && data.calibration.bound === "drop" ? data.full_accuracy - data.calibration.guaranteed_drop : null;
  const heights = [...all.map((each) => each.accuracy), data.full_accuracy, ...(floor === null ? [] : [floor])];
  const right = Math.max(...all.map((each) => each.cost), data.cost.full) * 1.05;
  const [low, high] = [Math.min(...heights), Math.max(...heights)];
  const room = Math.max(0.005, (high - low) * 0.08);
  const [bottom, top] = [Math.max(0, low - room), Math.min(1, high + room)];
  const x = (value) => 62 + (440 * value) / right;
  const y = (value) => 280 - (260 * (value - bottom)) / (top - bottom);
  const ticks = [0, 1, 2, 3, 4].map((step) => step / 4);
  const here = setting();
  const dot = (each, attributes) => svg("circle", { cx: x(each.cost), cy: y(each.accuracy), ...attributes });
  const line = data.modes[0].settings.map((each) => `${x(each.cost)},${y(each.accuracy)}`).join(" ");
  return svg(
    "svg",
    { viewBox: "0 0 520 330", role: "img", "aria-label": "Accuracy against cost, the present setting marked" },
    ...ticks.flatMap((share) => [
      svg("line", { x1: 62, x2: 502, y1: y(bottom + share * (top - bottom)), y2: y(bottom + share * (top - bottom)), stroke: "#e4e8ec" }),
      svg("text", { x: 56, y: y(bottom + share * (top - bottom)) + 4, "text-anchor": "end" }, percent(bottom + share * (top - bottom))),
      svg("text", { x: x(share * right), y: 298, "text-anchor": "middle" }, (share * right).toPrecision(3)),
    ]),
    svg("text", { x: 282, y: 320, "text-anchor": "middle" }, `${data.cost.name}, ${data.cost.unit}`),
    floor === null ? null : svg("line", { x1: 62, x2: 502, y1: y(floor), y2: y(floor), stroke: "#b3261e", "stroke-dasharray": "5 4" }),
    svg("polyline", { points: line, fill: "none", stroke: "#0b62a8", "stroke-width": 2 }),
    ...data.modes.slice(1).flatMap((mode) => mode.settings.map((each) => dot(each, { r: 4, fill: "#1b7f4b" }))),
    svg("path", { d: `M${x(data.cost.full)},${y(data.full_accuracy) - 7}l7,7l-7,7l-7,-7z`, fill: "#1c2430" }),
    dot(here, { r: 8, fill: "#c25700", stroke: "#fff", "stroke-width": 2, id: "point" }),
  );
}

// -- the other figures ----------------------------------------------------------------------------------------

function figures({ accuracy, cost: mean, mean_depth, exits, layer_speed_up, calibrated_accuracy }) {
  const early = 1 - exits[exits.length - 1].share;
  const figure = (name, value, small, id) => html("div", {}, html("dt", {}, name), html("dd", { id }, value, html("small", {}, small)));
  return [
    figure("accuracy", percent(accuracy, 2), `${points(accuracy - data.full_accuracy)} against the full model`, "accuracy"),
    figure(data.cost.name, cost(mean), `${(data.cost.full / mean).toFixed(2)}x against the full model`, "cost"),
    figure("mean depth", mean_depth.toFixed(2), `of ${data.depths[data.depths.length - 1]} blocks, ${layer_speed_up.toFixed(2)}x`, "depth"),
    figure("exit early", percent(early), `of ${data.samples.toLocaleString("en")} samples`, "early"),
    ...(calibrated_accuracy === undefined ? [] : [figure("when calibrated", percent(calibrated_accuracy, 2), "accuracy on other samples", "calibrated")]),
  ];
}

function exitTable(exits) {
  const rows = exits.map((exit, index) => [
    exitName(index), data.heads[index], exit.samples.toLocaleString("en"), percent(exit.share),
    percent(exit.accuracy_exited), percent(exit.accuracy_all),
  ]);
  return table(["exit", "head", "exited", "share", "accuracy of exited", "accuracy of all"], rows);
}

function reliability(diagrams) {
  const kinds = [["reliability_all", "#9bb8d3", "all"], ["reliability_exited", "#c25700", "exited"]];
  const x = (value) => 60 + 420 * value;
  const y = (value) => 280 - 260 * value;
  const marks = kinds.flatMap(([key, colour]) =>
    data.diagrams[diagrams[key]].flatMap((bin, index, bins) => {
      if (bin === null) return [];
      const [, confidence, accuracy] = bin;
      const width = 420 / bins.length;
      if (key === "reliability_exited") return [svg("circle", { cx: x(confidence), cy: y(accuracy), r: 5, fill: colour })];
      return [svg("rect", { x: x(index / bins.length) + 1, y: y(accuracy), width: width - 2, height: y(0) - y(accuracy), fill: colour })];
    }));
  const ticks = [0, 0.25, 0.5, 0.75, 1].flatMap((value) => [
    svg("text", { x: x(value), y: 298, "text-anchor": "middle" }, value.toString()),
    svg("text", { x: 54, y: y(value) + 4, "text-anchor": "end" }, percent(value, 0)),
  ]);
  return svg(
    "svg",
    { viewBox: "0 0 520 325", role: "img", "aria-label": "Accuracy by confidence" },
    ...marks, ...ticks,
    svg("line", { x1: x(0), y1: y(0), x2: x(1), y2: y(1), stroke: "#5b6675", "stroke-dasharray": "5 4" }),
    svg("text", { x: 270, y: 318, "text-anchor": "middle" }, "confidence"),
  );
}

function agreement({ agreement: [[both, early], [full, neither]], pairs }) {
  const name = (index) => data.class_names[index];
  const rows = pairs.map(([final, answered, count, right]) => [name(final), name(answered), `${count}`, `${right}`]);
  return [
    table(["", "full model right", "full model wrong"], [
      ["this setting right", `${both}`, `${early}`],
      ["this setting wrong", `${full}`, `${neither}`],
    ]),
    html("p", { class: "quiet" }, rows.length ? "Where the two answers differ, the most frequent first:" : "Both give the same answer to every sample."),
    html("div", { class: "scroll" }, rows.length ? table(["full model", "this setting", "samples", "of these right now"], rows) : ""),
  ];
}

function classes(rows) {
  const change = (difference) => html("span", { class: difference < 0 ? "bad" : difference > 0 ? "good" : "" }, points(difference));
  return table(
    ["class", "samples", "accuracy", "against the full model", "precision", "exit early", "mean depth"],
    rows.map(([index, samples, accuracy, full, precision, early, depth]) => [
      data.class_names[index], `${samples}`, percent(accuracy), change(accuracy - full), percent(precision), percent(early), depth.toFixed(2),
    ]),
  );
}

function images(found) {
  return found.map(([image, exit, answer]) => {
    const { source, label, small } = data.images[image];
    const [said, right] = [data.class_names[answer], data.class_names[label]];
    const words = answer === label ? html("span", { class: "good" }, said) : html("span", { class: "bad" }, `${said}, not ${right}`);
    const picture = html("img", { src: source, alt: `an image of class ${right}`, class: small ? "small" : "" });
    return html("figure", {}, picture, html("figcaption", {}, words, html("br"), exitName(exit)));
  });
}

function calibration(report) {
  if (report === null) {
    return [html("p", {}, "No calibration.json lies beside this checkpoint: `lgvit calibrate` chooses thresholds and writes it, with --delta certified ones.")];
  }
  const what = { drop: "accuracy drop against the full model", harm: "share of samples where only the full model is right" };
  const promise = report.bound === "none"
    ? `No guarantee: estimated on ${report.samples_tested.toLocaleString("en")} samples.`
    : `With probability ${1 - report.delta}, the ${what[report.bound]} is at most ${(100 * report.guaranteed_drop).toPrecision(3)} points, ` +
      `for samples drawn as those of the calibration; tested on ${report.samples_tested.toLocaleString("en")} that were not searched on.`;
  const rows = report.calibration_errors.map(({ before, after, exited }, index) => [exitName(index), ...[before, after, exited].map((error) => percent(error))]);
  return [
    html("p", {}, promise),
    html("p", { class: "quiet" }, "Calibration error of each exit, before and after its temperature:"),
    html("div", { class: "scroll" }, table(["exit", "before", "after", "of exited"], rows)),
  ];
}

// -- drawing --------------------------------------------------------------------------------------------------

function draw() {
  const here = setting();
  const slider = byId("slider");
  slider.max = data.modes[state.mode].settings.length - 1;
  slider.value = state.step;
  slider.disabled = slider.max === "0";
  slider.setAttribute("aria-valuetext", here.label);
  byId("position").textContent = here.label;
  byId("figures").replaceChildren(...figures(here));
  byId("curve").replaceChildren(curve());
  byId("exits").replaceChildren(
    bars(here.exits.map((exit, index) => ({ name: exitName(index), share: exit.share, text: percent(exit.share) })), "Share of samples that exit at each exit"),
  );
  byId("exit-table").replaceChildren(exitTable(here.exits));
  byId("agreement").replaceChildren(...agreement(here));
  byId("classes").replaceChildren(classes(here.classes));
  byId("first").replaceChildren(...images(here.first));
  byId("last").replaceChildren(...images(here.last));
  byId("settings").textContent = here.copy;
  byId("copied").textContent = "";
  drawReliability();
}

function drawReliability() {
  const exit = setting().exits[state.exit];
  byId("reliability").replaceChildren(reliability(exit));
  byId("reliability-note").textContent =
    `Bars: all samples (calibration error ${percent(exit.calibration_error_all)}); dots: those that exit here ` +
    `(${percent(exit.calibration_error_exited)}). On the dashed line confidence is accuracy.`;
}

function choose(mode) {
  state.mode = mode;
  state.step = Math.min(data.modes[mode].start, data.modes[mode].settings.length - 1);
  draw();
}

async function copy() {
  try {
    await navigator.clipboard.writeText(byId("settings").textContent);
    byId("copied").textContent = "copied";
  } catch {
    getSelection().selectAllChildren(byId("settings"));
    byId("copied").textContent = "selected: copy with Ctrl-C";
  }
}

byId("model").textContent = data.model;
document.title = `${data.model}: early-exit report`;
byId("about").textContent = `${data.samples.toLocaleString("en")} ${data.split} samples of ${data.data}; ${data.class_names.length} classes; ${data.cost.note}`;
byId("made").textContent = `Written by lgvit report, lgvit-hf ${data.version}. Figures are those of lgvit evaluate under the same policy.`;
byId("curve-note").textContent =
  "Line: one threshold for all exits. Green: " + data.modes.slice(1).map((mode) => mode.name.toLowerCase()).join(", ") +
  ". Diamond: the full model. Orange: the present setting." +
  (data.calibration && data.calibration.bound === "drop" ? " Dashed: the full model less the guaranteed drop." : "");
byId("classes-note").textContent = data.class_names.length > data.classes_shown
  ? `The ${data.classes_shown} of ${data.class_names.length} classes whose accuracy changes the most at this setting.` : "";
byId("calibration").replaceChildren(...calibration(data.calibration));
byId("modes").append(...data.modes.map((mode, index) => {
  const button = html("input", { type: "radio", name: "mode", value: index });
  button.checked = index === 0;
  button.addEventListener("change", () => choose(index));
  return html("label", {}, button, ` ${mode.name}`);
}));
byId("which").append(...data.depths.map((_, index) => html("option", { value: index }, exitName(index))));
state.exit = 0;
byId("which").addEventListener("change", (event) => { state.exit = Number(event.target.value); drawReliability(); });
byId("slider").addEventListener("input", (event) => { state.step = Number(event.target.value); draw(); });
byId("copy").addEventListener("click", copy);
choose(0);
