"""How close the single ONNX file comes to the ideal: realised over ideal speed-up, a forced mix of exits.

    python recipes/benchmarks/single_file.py --models deit-tiny --heads linear --batch-sizes 1 8 32
    python recipes/benchmarks/single_file.py --runtimes onnxruntime openvino --precisions float32 int8

All with one thread, in turn; what is printed are medians over the rounds. The plain backbone is a file of its own,
without heads; weights are random. By layers: the speed-up if only blocks cost; ideal: the blocks and heads that really
run, each segment a file of its own, on the samples that reach it. `no exit` and `all exits` are times over the plain
backbone's: every head decides and no sample exits, and every head runs without a decision, which is what the heads
cost.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import torch
from engine import MIX, MODELS, plans_of

from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.export.composition import compose_all_exits, compose_single, set_thresholds
from lgvit_hf.export.quantization import quantize
from lgvit_hf.export.segment_graphs import export_decisions, export_parts
from lgvit_hf.files import write_json
from lgvit_hf.policies import build_policy
from lgvit_hf.runtimes.openvino_session import open_openvino
from lgvit_hf.runtimes.single_file import parameter_inputs
from lgvit_hf.serving.device.session import open_session

OPEN = {"onnxruntime": open_session, "openvino": open_openvino}


class Sessions:
    """A model's ONNX files, opened: the single one, all exits, the plain backbone, and each segment."""

    def __init__(self, model, runtime, precision):
        self.model, self.depths = model, [segment.depth for segment in model.segments()]
        policy = build_policy({"name": "confidence", "threshold": 0.5}, len(self.depths) - 1)
        exits, inputs = list(range(len(self.depths))), parameter_inputs(policy, len(self.depths))
        decisions = export_decisions(policy, model.config.num_labels, exits, exits[-1])
        parts, plain = export_parts(model, exits), export_parts(model, exits[-1:])
        if precision == "int8":
            parts, plain = ([replace(part, model=quantize(part.model)) for part in each] for each in (parts, plain))
        single = compose_single(parts, decisions, self.depths, inputs)
        set_thresholds(single, "input")

        with tempfile.TemporaryDirectory() as folder:

            def session_of(content):
                file = Path(folder, "model.onnx")
                onnx.save(content, file)
                return OPEN[runtime](file, 1)

            self.single, self.all_exits = session_of(single), session_of(compose_all_exits(parts))
            self.segments, self.plain = [session_of(part.model) for part in parts], session_of(plain[0].model)
        self.numbers = {name: np.array(values, np.float32) for name, values in inputs.items()}

    def run_single(self, pixels, thresholds):
        numbers = {**self.numbers, "exit_thresholds": np.array(thresholds, np.float32)}
        return self.single.run(["exit_index"], {"pixel_values": pixels, **numbers})[0]

    def steps(self, pixels, counts):
        """What each segment is fed where only so many samples reach it; none where nobody does."""
        state, steps = {"pixel_values": pixels}, []
        for session, count in zip(self.segments, counts, strict=True):
            if count == 0:
                break
            state = {name: value[:count] for name, value in state.items()}
            steps.append(partial(session.run, None, state))
            names = [entry.name.removesuffix("_out") for entry in session.get_outputs()]
            found = dict(zip(names, session.run(None, state), strict=True))
            state = {name: value for name, value in found.items() if name != "logits"}
        return steps


def thresholds_for(sessions, pixels, plan):
    """Thresholds by which as many samples exit at each exit as the plan says; which ones is up to their scores."""
    (exit_logits,) = sessions.all_exits.run(["exit_logits"], {"pixel_values": pixels})
    here, thresholds = torch.arange(len(plan)), []
    for index, logits in enumerate(torch.from_numpy(exit_logits[:-1])):
        scores = logits[here].softmax(-1).amax(-1)
        ranked, leaving = scores.sort(descending=True).values.tolist(), plan.count(index)
        if leaving == 0:
            thresholds.append(2.0)
        elif leaving == len(here):
            thresholds.append(-1.0)
        else:
            thresholds.append((ranked[leaving - 1] + ranked[leaving]) / 2)
        here = here[scores < thresholds[-1]]
    return thresholds


def run_each(steps):
    for step in steps:
        step()


@torch.no_grad()
def measure(sessions, batch_size, repeats):
    torch.manual_seed(0)
    size, depths = sessions.model.config.image_size, sessions.depths
    pixels = torch.randn(batch_size, 3, size, size).numpy()
    plans, exits = plans_of(batch_size), len(depths) - 1
    runs = {
        "plain": partial(sessions.plain.run, None, {"pixel_values": pixels}),
        "all exits": partial(sessions.all_exits.run, None, {"pixel_values": pixels}),
        "never": partial(sessions.run_single, pixels, [2.0] * exits),
    }
    for plan, _ in plans:
        thresholds = thresholds_for(sessions, pixels, plan)
        left = sorted(sessions.run_single(pixels, thresholds).tolist())
        if left != sorted(plan):
            raise RuntimeError(f"the plan was not kept: {left}, not {sorted(plan)}; two scores are too close")
        runs["early", plan] = partial(sessions.run_single, pixels, thresholds)
        counts = [sum(leaves >= index for leaves in plan) for index in range(len(depths))]
        runs["ideal", plan] = partial(run_each, sessions.steps(pixels, counts))
    times = time_interleaved(runs, repeats=repeats)

    def total(kind):
        return [sum(weight * times[kind, plan][turn] for plan, weight in plans) for turn in range(repeats)]

    def ratio(above, below):
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    depth = sum(weight * sum(depths[index] for index in plan) / len(plan) for plan, weight in plans)
    layers, realised = depths[-1] / depth, ratio(times["plain"], total("early"))
    return {
        "batch_size": batch_size,
        "layer_speed_up": layers,
        "realised_speed_up": realised,
        "realised_over_layers": realised / layers,
        "realised_over_ideal": ratio(total("ideal"), total("early")),
        "no_exit": ratio(times["never"], times["plain"]),
        "all_exits": ratio(times["all exits"], times["plain"]),
        "plain_ms": 1e3 * statistics.median(times["plain"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deit-tiny", "swin-tiny"])
    parser.add_argument("--heads", default="linear", help="one type for all exits, or `lgvit` (default: linear)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--runtimes", nargs="+", choices=OPEN, default=["onnxruntime"])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "int8"), default=["float32"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    results = []
    print(
        f"{len(MIX)} exits, {options.heads} heads, one thread\n{'model':11}{'runtime':13}{'precision':9}  batch  "
        "by layers  realised  realised/layers  realised/ideal  no exit  all exits  plain, ms"
    )
    for name, runtime, precision in product(options.models, options.runtimes, options.precisions):
        torch.manual_seed(0)
        model = MODELS[name](**({} if options.heads == "lgvit" else {"exit_types": options.heads})).eval()
        sessions = Sessions(model, runtime, precision)
        for batch_size in options.batch_sizes:
            row = measure(sessions, batch_size, options.repeats)
            what = {"model": name, "heads": options.heads, "runtime": runtime, "precision": precision}
            results.append({**what, **row})
            print(
                f"{name:11}{runtime:13}{precision:9}  {batch_size:5}  {row['layer_speed_up']:8.2f}x  "
                f"{row['realised_speed_up']:7.2f}x  {row['realised_over_layers']:15.3f}  "
                f"{row['realised_over_ideal']:14.3f}  {row['no_exit']:7.3f}  {row['all_exits']:9.3f}  "
                f"{row['plain_ms']:9.1f}",
                flush=True,
            )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
