"""How close the engine comes to the ideal: realised over ideal speed-up, with random weights and a forced mix of exits.

    python recipes/benchmarks/engine.py --models deit-tiny swin-tiny vit-base --batch-sizes 1 8 32

The ideal run costs the blocks and heads that really run, each timed alone on the rows that reach it; realised is the
engine's own wall-clock. Both are taken in one interleaved run with the head-free backbone, so that the ratio is fair on
a noisy machine. `never` is the overhead of a policy that asks at every exit and lets nobody go, beside the heads' share.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch

from lgvit_hf import DeiTHighway, DeiTHighwayConfig, SwinHighway, SwinHighwayConfig, ViTHighway, ViTHighwayConfig
from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.benchmark import time_interleaved
from lgvit_hf.files import write_json
from lgvit_hf.policies import ConfidencePolicy, NeverPolicy
from lgvit_hf.segments import State

# rows leaving at each of eight exits and at the end, as LGViT's ViT-B does on CIFAR-100 at a threshold of 0.8
MIX = [0.43, 0.16, 0.09, 0.09, 0.11, 0.05, 0.02, 0.01, 0.03]

MODELS = {
    "deit-tiny": lambda: DeiTHighway(
        DeiTHighwayConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=100)
    ),
    "swin-tiny": lambda: SwinHighway(SwinHighwayConfig(num_labels=100)),
    "vit-base": lambda: ViTHighway(ViTHighwayConfig(num_labels=100)),
}


@dataclass(frozen=True)
class ForcedExits(ConfidencePolicy):
    """Does the work of the confidence policy, then lets each row leave where the plan says."""

    plan: tuple[int, ...] = ()

    def start(self, batch_size, device):
        return {"plan": torch.tensor(self.plan, device=device)}

    def __call__(self, logits, memory, exit_index=0):
        _, scored = super().__call__(logits, memory, exit_index)
        return memory["plan"] <= exit_index, {"plan": memory["plan"], **scored}


def planned_exits(batch_size, total=256):
    """Batches of planned exits that together show the mix."""
    counts = [round(share * total) for share in MIX]
    counts[0] += total - sum(counts)
    rows = [index for index, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order]
    return [tuple(rows[start : start + batch_size]) for start in range(0, total, batch_size)]


def time_parts(segments, pixels, plan):
    """Seconds of every block and head that a plan really runs, each timed alone, on the rows that reach it."""
    state, seconds = State({"pixel_values": pixels}), 0.0
    alive = torch.tensor(plan)
    for index, segment in enumerate(segments):
        for block in segment.blocks:
            start = time.perf_counter()
            state = block(state)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        segment.answer(state)
        seconds += time.perf_counter() - start
        keep = (alive > index).nonzero().squeeze(1)
        if len(keep) == 0:
            break
        if len(keep) < len(alive):
            state, alive = state.select(keep), alive[keep]
    return seconds


@torch.no_grad()
def measure(name, batch_size, repeats):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    segments, image_size = model.segments(), model.config.image_size
    plans = planned_exits(batch_size)
    if batch_size == 1:  # one image per exit, weighted by the mix
        plans = [(index,) for index in range(len(MIX))]
    weights = MIX if batch_size == 1 else [1 / len(plans)] * len(plans)
    chosen = plans if batch_size == 1 else plans[:2]
    weights = weights if batch_size == 1 else [1 / len(chosen)] * len(chosen)
    result = {"model": name, "batch_size": batch_size, "threads": torch.get_num_threads()}
    totals = {"ideal": 0.0, "early": 0.0, "backbone": 0.0}
    pixels = torch.randn(batch_size, 3, image_size, image_size)
    state = State({"pixel_values": pixels})
    for plan, weight in zip(chosen, weights, strict=True):
        policy = ForcedExits(threshold=0.5, plan=plan)
        parts = []
        runs = {
            "early": partial(run_early, segments, state, policy),
            "parts": lambda plan=plan, parts=parts: parts.append(time_parts(segments, pixels, plan)),
            "backbone": partial(run_early, segments, state, NeverPolicy()),
        }
        times = time_interleaved(runs, repeats=repeats)
        totals["early"] += weight * statistics.median(times["early"])
        totals["backbone"] += weight * statistics.median(times["backbone"])
        totals["ideal"] += weight * statistics.median(parts[-repeats:])
    result["ideal_speed_up"] = totals["backbone"] / totals["ideal"]
    result["realised_speed_up"] = totals["backbone"] / totals["early"]
    result["realised_over_ideal"] = totals["ideal"] / totals["early"]
    result |= measure_never(segments, state, repeats)
    return result


def measure_never(segments, state, repeats):
    """Overhead of asking every exit when nobody leaves, and the share of it that is the heads themselves."""
    asking = ConfidencePolicy(threshold=2.0)
    heads = []

    def time_heads():
        current, seconds = state, 0.0
        for segment in segments[:-1]:
            current = segment.advance(current)
            start = time.perf_counter()
            segment.answer(current)
            seconds += time.perf_counter() - start
        heads.append(seconds)

    times = time_interleaved(
        {
            "asking": partial(run_early, segments, state, asking),
            "backbone": partial(run_early, segments, state, NeverPolicy()),
            "heads": time_heads,
        },
        repeats=repeats,
    )
    backbone = statistics.median(times["backbone"])
    return {
        "never_overhead": statistics.median(times["asking"]) / backbone - 1,
        "heads_share": statistics.median(heads[-repeats:]) / backbone,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    results = []
    print("model      batch  ideal  realised  realised/ideal  never asked...  heads alone")
    for name in options.models:
        for batch_size in options.batch_sizes:
            row = measure(name, batch_size, options.repeats)
            results.append(row)
            print(
                f"{name:10} {batch_size:5}  {row['ideal_speed_up']:4.2f}x  {row['realised_speed_up']:7.2f}x  "
                f"{row['realised_over_ideal']:14.3f}  {row['never_overhead']:13.1%}  {row['heads_share']:11.1%}",
                flush=True,
            )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
