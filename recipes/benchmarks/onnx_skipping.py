"""How close the single ONNX file comes to the ideal: realised over ideal speed-up, a forced mix of exits.

    python recipes/benchmarks/onnx_skipping.py --models deit-tiny --heads linear --batch-sizes 1 8 32

All in ONNX Runtime with one thread, in turn; what is printed are medians over the rounds. The plain backbone is a file
of its own, without heads; weights are random. By layers: the speed-up if only blocks cost; ideal: the blocks and heads
that really run, each segment a file of its own, on the rows that reach it. `never leaving` and `all exits` are times
over the plain backbone's: every head asked and nobody let go, and every head run without a decision, which is what the
heads cost.
"""

import argparse
import statistics
from functools import partial

import numpy as np
import onnxruntime
import torch
from engine import MIX, MODELS, plans_of

from lgvit_hf.engine import run_all
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.export.composition import compose_all_exits, compose_single
from lgvit_hf.export.segment_graphs import export_decision, export_parts
from lgvit_hf.files import write_json
from lgvit_hf.policies import build_policy
from lgvit_hf.runtimes.single_file import parameter_inputs
from lgvit_hf.segments import State


def session_of(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


class Sessions:
    """A model's ONNX files, opened: the single one, all exits, the plain backbone, and each segment."""

    def __init__(self, model):
        self.model, self.depths = model, [segment.depth for segment in model.segments()]
        policy = build_policy({"name": "confidence", "threshold": 0.5}, len(self.depths) - 1)
        parts = export_parts(model, range(len(self.depths)))
        decision, inputs = export_decision(policy, model.config.num_labels), parameter_inputs(policy, len(self.depths))
        self.single = session_of(compose_single(parts, decision, self.depths, inputs))
        self.all_exits = session_of(compose_all_exits(parts))
        self.segments = [session_of(part.model) for part in parts]
        self.plain = session_of(export_parts(model, [len(self.depths) - 1])[0].model)

    def run_single(self, pixels, thresholds):
        feeds = {"pixel_values": pixels, "exit_thresholds": np.array(thresholds, np.float32)}
        return self.single.run(None, feeds)

    def steps(self, pixels, counts):
        """What each segment is fed where only so many rows reach it; none where nobody does."""
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
    exit_logits = run_all(sessions.model.segments(), State({"pixel_values": torch.from_numpy(pixels)}))
    here, thresholds = torch.arange(len(plan)), []
    for index, logits in enumerate(exit_logits[:-1]):
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
def measure(name, head, batch_size, repeats, sessions):
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
        left = sorted(sessions.run_single(pixels, thresholds)[2].tolist())
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
        "model": name,
        "heads": head,
        "batch_size": batch_size,
        "layer_speed_up": layers,
        "realised_speed_up": realised,
        "realised_over_layers": realised / layers,
        "realised_over_ideal": ratio(total("ideal"), total("early")),
        "never_leaving": ratio(times["never"], times["plain"]),
        "all_exits": ratio(times["all exits"], times["plain"]),
        "plain_ms": 1e3 * statistics.median(times["plain"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deit-tiny", "swin-tiny"])
    parser.add_argument("--heads", default="linear", help="one type for all exits, or `lgvit` (default: linear)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    results = []
    print(
        f"{len(MIX)} exits, {options.heads} heads, one thread\n"
        "model      batch  by layers  realised  realised/layers  realised/ideal  never leaving  all exits  plain, ms"
    )
    for name in options.models:
        torch.manual_seed(0)
        sessions = Sessions(MODELS[name](**({} if options.heads == "lgvit" else {"exit_types": options.heads})).eval())
        for batch_size in options.batch_sizes:
            row = measure(name, options.heads, batch_size, options.repeats, sessions)
            results.append(row)
            print(
                f"{name:10} {batch_size:5}  {row['layer_speed_up']:8.2f}x  {row['realised_speed_up']:7.2f}x  "
                f"{row['realised_over_layers']:15.3f}  {row['realised_over_ideal']:14.3f}  "
                f"{row['never_leaving']:13.3f}  {row['all_exits']:9.3f}  {row['plain_ms']:9.1f}",
                flush=True,
            )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
