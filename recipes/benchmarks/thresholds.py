"""What calibration gains over one threshold for all exits, at equal accuracy on rows that neither has seen.

    lgvit sweep runs/stage2 --data photos/ --output sweep --values 0.5            # keeps sweep/table.safetensors
    lgvit benchmark runs/stage2 --data photos/ --cost-table costs.json --batch-sizes 1 8 32
    python recipes/benchmarks/thresholds.py sweep/table.safetensors --cost-table costs.json \\
        --checkpoint runs/stage2 --data photos/

The table is split at random again and again: one half to calibrate on, the other to report on. There the calibrated
policy is compared with the best single threshold that is at least as accurate, all exits on, temperature 1; it is
picked on the report rows themselves, which favours it. Costs are MACs with heads counted, or the milliseconds that a
measured cost table predicts; the full model's is 1, and a single threshold that lets nobody go costs more. With a
checkpoint and its data (the table's), the policies of the first split are also run on images of its second half, in
turn with one another: `by the clock` is the median of the ratios of their times.
"""

import argparse
import statistics
from functools import partial

import numpy as np
import torch

from lgvit_hf import ExitTable, calibrate
from lgvit_hf.cli.inputs import open_highway
from lgvit_hf.data.processing import stack
from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.cost_table import CostTable
from lgvit_hf.evaluation.predictions import replayed_exits, shares
from lgvit_hf.evaluation.threshold_search import RANGES, confidence_scores, uniform_thresholds
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.policies import build_policy
from lgvit_hf.segments import State

DROPS = (0.0, 0.005, 0.01, 0.02)


def cost_and_drop(table, settings, mean_cost):
    """Of a policy on a table."""
    left, evaluated = replayed_exits(table, settings)
    right = table.right.gather(0, left[None])[0].double().mean()
    return mean_cost(shares(left, len(table.depths)), evaluated), (table.right[-1].double().mean() - right).item()


def best_single(curve, drop):
    """Cost and settings of the cheapest single threshold within a drop; of letting nobody go where none is."""
    within = [(cost, settings) for cost, other, settings in curve if other <= drop + 1e-12]
    return min(within, key=lambda entry: entry[0], default=(curve[-1][0], curve[-1][2]))


@torch.no_grad()
def by_the_clock(model, dataset, rows, single, calibrated, size, num_images=256):
    """How many times as long the single threshold takes as the calibrated policy, on some rows of a dataset."""
    segments, ratios = model.segments(), []
    policies = {
        "single": build_policy(single, len(segments) - 1),
        "calibrated": build_policy(calibrated, len(segments) - 1),
    }
    pixels = stack([dataset[row] for row in rows[:num_images].tolist()])["pixel_values"]
    for batch in pixels.split(size):
        state = State({"pixel_values": batch})
        runs = {name: partial(run_early, segments, state, policy) for name, policy in policies.items()}
        times = time_interleaved(runs, repeats=5, warm_up=1)
        ratios.append([statistics.median(times[name]) for name in policies])
    single_seconds, calibrated_seconds = np.sum(ratios, axis=0)
    return single_seconds / calibrated_seconds


def gains(table, splits, policy, cost_table, batch_size):
    """Per drop and split: calibrated cost and drop, and the single threshold's cost; the first split's policies."""

    def mean_cost(exiting_at, evaluated):
        if cost_table is None:
            return table.costs.mean(exiting_at, evaluated)
        return cost_table.mean_latency(exiting_at, evaluated, batch_size)

    full = mean_cost([0.0] * (len(table.depths) - 1) + [1.0], [])
    found, policies = np.zeros((len(DROPS), splits, 3)), []
    for seed in range(splits):
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        calibrated_on, reported = table.select(order[: len(order) // 2]), table.select(order[len(order) // 2 :])
        scores = confidence_scores(reported, policy, (1.0,) * len(table.depths)).numpy()
        sign = -1 if policy == "entropy" else 1
        cuts = [sign * cut[0].item() for cut in uniform_thresholds(scores, RANGES[policy], 400)]
        singles = [{"name": policy, "threshold": cut} for cut in cuts]
        curve = [(*cost_and_drop(reported, settings, mean_cost), settings) for settings in singles]
        for number, drop in enumerate(DROPS):
            report = calibrate(
                calibrated_on, policy=policy, max_accuracy_drop=drop, cost_table=cost_table, batch_size=batch_size
            )
            cost, true_drop = cost_and_drop(reported, report.policy, mean_cost)
            single_cost, single = best_single(curve, true_drop)
            found[number, seed] = cost / full, true_drop, single_cost / full
            if seed == 0:
                policies.append((order[len(order) // 2 :], single, report.policy))
    return found, policies


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="table of exits of rows that were not trained on")
    parser.add_argument("--cost-table", help="measured times; MACs alone without it")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="at which times are read")
    parser.add_argument("--policy", default="confidence", choices=sorted(RANGES))
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--checkpoint", help="the table's model, to run what was found")
    parser.add_argument("--data", help="the table's data, whose test split it is")
    options = parser.parse_args()
    table = ExitTable.load(options.table)
    measures: list[tuple[str, CostTable | None, int]] = [("MACs", None, 1)]
    if options.cost_table:
        times = CostTable.load(options.cost_table, num_exits=len(table.depths))
        measures += [(f"ms, batch {size}", times, size) for size in options.batch_sizes]
    accuracies = " ".join(f"{share:.1%}" for share in table.accuracies())
    print(f"{len(table)} rows, half to calibrate on; right at the exits: {accuracies}")
    opened = open_highway(options.checkpoint, options.data) if options.checkpoint else None
    print("cost            asked   true drop   calibrated   single threshold   gain   by the clock")
    for name, times, size in measures:
        found, policies = gains(table, options.splits, options.policy, times, size)
        for drop, rows, (timed, single_policy, policy) in zip(DROPS, found, policies, strict=True):
            cost, true_drop, single = rows.mean(0)
            gain = (rows[:, 2] / rows[:, 0]).mean()
            clock = "-"
            if opened is not None:
                clock = f"{by_the_clock(opened.model, opened.dataset, timed, single_policy, policy, size):.2f}"
            numbers = f"{drop:6.1%}   {true_drop:9.2%}   {cost:10.3f}   {single:16.3f}   {gain:4.2f}   {clock:>12}"
            print(f"{name:14} {numbers}", flush=True)


if __name__ == "__main__":
    main()
