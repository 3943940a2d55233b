"""How close the engine comes to the ideal: realised over ideal speed-up, random weights, a forced mix of exits.

    python recipes/benchmarks/engine.py --models deit-tiny swin-tiny vit-base --batch-sizes 1 8 32

The ideal run costs the blocks and heads that really run, each timed alone on the rows that reach it; realised is the
engine's own wall-clock. Engine, parts and the head-free backbone take turns, and ratios are taken within a round, so
that a slow moment of the machine hits all alike; what is printed are medians over the rounds. `asking` is the overhead
of a policy that asks at every exit and lets nobody go, to be compared with the heads' share: of the same heads run
without a decision (`all exits`), and timed alone, which leaves out that blocks find colder caches behind a head.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch

from lgvit_hf import DeiTHighway, DeiTHighwayConfig, SwinHighway, SwinHighwayConfig, ViTHighway, ViTHighwayConfig
from lgvit_hf.engine import run_all, run_early
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.files import write_json
from lgvit_hf.policies import ConfidencePolicy, NeverPolicy
from lgvit_hf.segments import State

# rows leaving at each of eight exits and at the end, as LGViT's ViT-B does on CIFAR-100 at a threshold of 0.8
MIX = [0.43, 0.16, 0.09, 0.09, 0.11, 0.05, 0.02, 0.01, 0.03]

MODELS = {
    "deit-tiny": lambda **settings: DeiTHighway(
        DeiTHighwayConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=100, **settings)
    ),
    "swin-tiny": lambda **settings: SwinHighway(SwinHighwayConfig(num_labels=100, **settings)),
    "vit-base": lambda **settings: ViTHighway(ViTHighwayConfig(num_labels=100, **settings)),
}


@dataclass(frozen=True)
class ForcedExits(ConfidencePolicy):
    """Does the work of the confidence policy, then lets each sample exit where the plan says."""

    plan: tuple[int, ...] = ()

    def start(self, batch_size, device):
        return {"plan": torch.tensor(self.plan, device=device)}

    def __call__(self, logits, memory, exit_index=0):
        _, scored = super().__call__(logits, memory, exit_index)
        return memory["plan"] <= exit_index, {"plan": memory["plan"], **scored}


def plans_of(batch_size):
    """Which exit each row of a batch takes, and the weight of that batch; single images take every exit in turn."""
    if batch_size == 1:
        return [((index,), share) for index, share in enumerate(MIX)]
    ends = [round(sum(MIX[: index + 1]) * batch_size) for index in range(len(MIX))]
    rows = [next(index for index, end in enumerate(ends) if row < end) for row in range(batch_size)]
    order = torch.randperm(batch_size, generator=torch.Generator().manual_seed(0)).tolist()
    return [(tuple(rows[row] for row in order), 1.0)]


def time_parts(segments, state, alive):
    """Seconds of the blocks and of the heads that really run, each timed alone on the rows that reach it."""
    backbone = heads = 0.0
    for index, segment in enumerate(segments):
        for block in segment.blocks:
            start = time.perf_counter()
            state = block(state)
            backbone += time.perf_counter() - start
        start = time.perf_counter()
        segment.answer(state)
        heads += time.perf_counter() - start
        stay = (alive > index).nonzero().squeeze(1)
        if len(stay) == 0:
            break
        if len(stay) < len(alive):
            state, alive = state.select(stay), alive[stay]
    return backbone, heads


@torch.no_grad()
def measure(name, batch_size, repeats):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    segments, size = model.segments(), model.config.image_size
    state = State({"pixel_values": torch.randn(batch_size, 3, size, size)})
    plans = plans_of(batch_size)
    nobody = torch.full((batch_size,), len(segments))
    alone = {"ideal": [], "heads": []}

    def run_parts():
        alone["ideal"].append(sum(w * sum(time_parts(segments, state, torch.tensor(plan))) for plan, w in plans))

    def run_heads():
        alone["heads"].append(time_parts(segments[:-1], state, nobody)[1])

    runs = {
        "parts": run_parts,
        "heads": run_heads,
        "all exits": partial(run_all, segments, state),
        "backbone": partial(run_early, segments, state, NeverPolicy()),
        # a threshold of 1 would switch the exits off; random weights are never this sure
        "asking": partial(run_early, segments, state, ConfidencePolicy(threshold=0.9999)),
    }
    runs |= {plan: partial(run_early, segments, state, ForcedExits(threshold=0.5, plan=plan)) for plan, _ in plans}
    times = time_interleaved(runs, repeats=repeats)
    early = [sum(weight * times[plan][turn] for plan, weight in plans) for turn in range(repeats)]
    ideal, heads, backbone = alone["ideal"][-repeats:], alone["heads"][-repeats:], times["backbone"]

    def ratio(above, below):
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    return {
        "model": name,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "ideal_speed_up": ratio(backbone, ideal),
        "realised_speed_up": ratio(backbone, early),
        "realised_over_ideal": ratio(ideal, early),
        "asking_overhead": ratio(times["asking"], backbone) - 1,
        "all_exits_overhead": ratio(times["all exits"], backbone) - 1,
        "heads_share": ratio(heads, backbone),
        "backbone_ms": 1e3 * statistics.median(backbone),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    results = []
    print("model      batch  ideal  realised  realised/ideal  asking  all exits  heads alone  backbone, ms")
    for name in options.models:
        for batch_size in options.batch_sizes:
            row = measure(name, batch_size, options.repeats)
            results.append(row)
            print(
                f"{name:10} {batch_size:5}  {row['ideal_speed_up']:4.2f}x  {row['realised_speed_up']:7.2f}x  "
                f"{row['realised_over_ideal']:14.3f}  {row['asking_overhead']:6.1%}  "
                f"{row['all_exits_overhead']:9.1%}  {row['heads_share']:11.1%}  {row['backbone_ms']:12.1f}",
                flush=True,
            )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
