"""What leaving at each exit of a wrapped network saves, by MACs and by the clock, against the network as it was.

    OMP_NUM_THREADS=1 python recipes/benchmarks/any_model.py --networks resnet vgg --batch-sizes 1 32

The networks of `recipes/any_model.py` with random weights; all rows of a batch leave at one exit, whose head alone is
run. The plain module and all exits take turns; ratios are taken within a round, and their medians are printed.
"""

import argparse
import runpy
import statistics
from functools import partial
from pathlib import Path

import torch

from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.costs import model_macs
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.policies import FixedPolicy
from lgvit_hf.segments import State

RECIPE = runpy.run_path(str(Path(__file__).resolve().parents[1] / "any_model.py"))


@torch.no_grad()
def measure(network, batch_size, repeats):
    torch.manual_seed(0)
    model = RECIPE["wrapped"](network, [str(label) for label in range(10)]).eval()
    pixels, segments = torch.randn(batch_size, 3, RECIPE["SIZE"], RECIPE["SIZE"]), model.segments()
    costs = model_macs(model)
    runs = {"module": partial(model.wrapped, pixels)}
    for index in range(len(segments)):
        runs[str(index)] = partial(run_early, segments, State({"pixel_values": pixels}), FixedPolicy(index))
    times = time_interleaved(runs, repeats=repeats, warm_up=2)
    print(f"\n{network}, batch {batch_size}: the module alone {1e3 * statistics.median(times['module']):.2f} ms")
    for index in range(len(segments)):
        clock = statistics.median(a / b for a, b in zip(times["module"], times[str(index)], strict=True))
        macs = costs.backbone / costs.of_exit(index, evaluated=[index])
        name = model.config.after[index] if index < len(model.exits) else "no early exit"
        print(f"exit {index}  {name:<14}{macs:8.2f}x by MACs {clock:8.2f}x by the clock")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet", "vgg"], choices=sorted(RECIPE["NETWORKS"]))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for network in options.networks:
        for batch_size in options.batch_sizes:
            measure(network, batch_size, options.repeats)


if __name__ == "__main__":
    main()
