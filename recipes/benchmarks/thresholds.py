"""What calibration gains over one threshold for all exits, at equal accuracy on rows that neither has seen.

    lgvit sweep runs/stage2 --data photos/ --output sweep --values 0.5            # keeps sweep/table.safetensors
    lgvit benchmark runs/stage2 --data photos/ --cost-table costs.json --batch-sizes 1 8 32
    python recipes/benchmarks/thresholds.py sweep/table.safetensors --cost-table costs.json

The table is split at random again and again: one half to calibrate on, the other to report on. There the calibrated
policy is compared with the best single threshold that is at least as accurate, all exits on, temperature 1; it is
picked on the report rows themselves, which favours it. Costs are MACs with heads counted, or the milliseconds that a
measured cost table predicts; the full model's is 1, and a single threshold that lets nobody go costs more.
"""

import argparse

import numpy as np
import torch

from lgvit_hf import ExitTable, calibrate
from lgvit_hf.evaluation.latency import CostTable
from lgvit_hf.evaluation.search import RANGES, leaving, shares, sureness, uniform_thresholds

DROPS = (0.0, 0.005, 0.01, 0.02)


def cost_and_drop(table, settings, mean_cost):
    """Of a policy on a table."""
    left, asked = leaving(table, settings)
    right = table.right.gather(0, left[None])[0].double().mean()
    return mean_cost(shares(left, len(table.depths)), asked), (table.right[-1].double().mean() - right).item()


def best_single(curve, drop):
    """The least cost of a single threshold with at most that drop; of letting nobody go where none is as accurate."""
    return min((cost for cost, other in curve if other <= drop + 1e-12), default=curve[-1][0])


def gains(table, splits, policy, cost_table, batch_size):
    """Per drop asked for and split: the calibrated cost and drop, and the single threshold's cost."""

    def mean_cost(leaving_at, asked):
        if cost_table is None:
            return table.costs.mean(leaving_at, asked)
        return cost_table.mean_latency(leaving_at, asked, batch_size)

    full = mean_cost([0.0] * (len(table.depths) - 1) + [1.0], [])
    found = np.zeros((len(DROPS), splits, 3))
    for seed in range(splits):
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        calibrated_on, reported = table.select(order[: len(order) // 2]), table.select(order[len(order) // 2 :])
        scores = sureness(reported, policy, (1.0,) * len(table.depths)).numpy()
        sign = -1 if policy == "entropy" else 1
        cuts = [sign * cut[0].item() for cut in uniform_thresholds(scores, RANGES[policy], 400)]
        curve = [cost_and_drop(reported, {"name": policy, "threshold": cut}, mean_cost) for cut in cuts]
        for number, drop in enumerate(DROPS):
            report = calibrate(
                calibrated_on, policy=policy, max_accuracy_drop=drop, cost_table=cost_table, batch_size=batch_size
            )
            cost, true_drop = cost_and_drop(reported, report.policy, mean_cost)
            found[number, seed] = cost / full, true_drop, best_single(curve, true_drop) / full
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="table of exits of rows that were not trained on")
    parser.add_argument("--cost-table", help="measured times; MACs alone without it")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="at which times are read")
    parser.add_argument("--policy", default="confidence", choices=sorted(RANGES))
    parser.add_argument("--splits", type=int, default=10)
    options = parser.parse_args()
    table = ExitTable.load(options.table)
    measures = [("MACs", None, 1)]
    if options.cost_table:
        times = CostTable.load(options.cost_table, num_exits=len(table.depths))
        measures += [(f"ms, batch {size}", times, size) for size in options.batch_sizes]
    print(
        f"{len(table)} rows, half to calibrate on; exits: " + " ".join(f"{share:.1%}" for share in table.accuracies())
    )
    print("cost            asked   true drop   calibrated   single threshold   gain")
    for name, times, size in measures:
        found = gains(table, options.splits, options.policy, times, size)
        for drop, rows in zip(DROPS, found, strict=True):
            cost, true_drop, single = rows.mean(0)
            gain = (rows[:, 2] / rows[:, 0]).mean()
            print(
                f"{name:14} {drop:6.1%}   {true_drop:9.2%}   {cost:10.3f}   {single:16.3f}   {gain:4.2f}", flush=True
            )


if __name__ == "__main__":
    main()
