"""Is a guarantee kept? Calibrate on many random samples of tables whose truth is known, and count broken promises.

    python recipes/benchmarks/guarantee.py --splits 1000
    python recipes/benchmarks/guarantee.py --table table.safetensors --rows 400 --drops 0.08 --policies gate auto

Each line is one promise: of so many draws of samples, with replacement, the share after which the true drop (or harm)
was above the one asked for, which must be at most delta, up to the noise of counting; how many draws returned early
exits; and the mean speed-up in MACs of what was returned. The truth of a table is its own mean over all samples.
The last columns compare with one uniform confidence threshold: of the same true drop, and proven on the same halves.
Each is the mean of the speed-up over that one's, with its standard error, and below 1 only by noise where a policy is
never worse.
"""

import argparse
import math
from itertools import product

import numpy as np
import torch

from lgvit_hf import ExitTable, calibrate
from lgvit_hf.evaluation.calibration import fit_temperature, split_table
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.predictions import consequences, replayed_exits
from lgvit_hf.evaluation.risk_control import drop_p_value, harm_p_value, passed_in_order
from lgvit_hf.evaluation.threshold_search import RANGES, confidence_scores, uniform_thresholds

COSTS = Costs([3.0, 3.0, 3.0, 3.0], [0.2, 0.3, 0.2, 0.1])
POPULATION = 50_000


def ordinary(generator, classes=5, exits=4):
    """Rows of some difficulty; deeper exits see more of the label, and all share some of their noise."""
    labels = torch.randint(classes, (POPULATION,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes) * (6 * torch.rand(POPULATION, 1, generator=generator))
    shared = torch.randn(POPULATION, classes, generator=generator)
    own = torch.randn(exits, POPULATION, classes, generator=generator)
    strength = torch.linspace(0.5, 1.2, exits)[:, None, None]
    return 2 * (strength * signal + 0.6 * shared + 0.6 * own), labels


def surest_where_wrong(generator):
    """The early exits are the surest where they are wrong: every threshold lets the wrong rows go first."""
    logits, labels = ordinary(generator)
    wrong = logits[:-1].argmax(-1) != labels
    return torch.cat([logits[:-1] * torch.where(wrong, 3.0, 0.7)[..., None], logits[-1:]]), labels


def hard_rows_are_larger(generator):
    """Rows that the first exit gets wrong have larger logits: what sorts by size sorts by difficulty."""
    logits, labels = ordinary(generator)
    return logits * torch.where(logits[0].argmax(-1) != labels, 3.0, 1.0)[:, None], labels


def two_scores(generator):
    """Each exit is either quite or hardly sure, so that scores are ties and say nothing within a group."""
    logits, labels = ordinary(generator)
    sure = logits.softmax(-1).amax(-1) > 0.8
    answers = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
    return answers * torch.where(sure, 4.0, 1.0)[..., None], labels


def true_means(truth, settings):
    """Mean MACs, drop and harm of a policy on all samples."""
    macs, drops = consequences(truth, *replayed_exits(truth, settings), truth.known_costs)
    return macs, drops.double().mean().item(), (drops == 1).double().mean().item()


def uniform_curve(truth):
    """True drops, ascending, and the least MACs of one confidence threshold for all exits within each."""
    scores = confidence_scores(truth, "confidence", (1.0,) * len(truth.depths)).numpy()
    found = [
        {"name": "confidence", "threshold": float(cut[0])} for cut in uniform_thresholds(scores, RANGES["confidence"])
    ]
    points = sorted(
        (drop, macs) for macs, drop, _ in (true_means(truth, each) for each in [{"name": "never"}, *found])
    )
    drops, macs = np.array(points).T
    return drops, np.minimum.accumulate(macs)


def one_threshold(sample, max_accuracy_drop, delta, bound):
    """The smallest confidence for all exits that is proven as `calibrate` proves a policy, on the same halves."""
    searched, tested = split_table(sample)
    temperatures = [fit_temperature(exit, searched.labels) for exit in searched.policy_logits()]
    scores = confidence_scores(searched, "confidence", temperatures)
    cuts = reversed(uniform_thresholds(scores.numpy(), RANGES["confidence"]))
    path = [{"name": "confidence", "threshold": float(cut[0]), "temperature": temperatures} for cut in cuts]

    def p_value(settings):
        _, drops = consequences(tested, *replayed_exits(tested, settings), tested.known_costs)
        drops = drops.numpy()
        if bound == "harm":
            return harm_p_value(drops == 1, max_accuracy_drop)
        return float(drop_p_value(drops, max_accuracy_drop, delta))

    return [{"name": "never"}, *path][passed_in_order([p_value(settings) for settings in path], delta)]


def promises(truth, curve, policy, rows, splits, **asked):
    """Draws that broke the promise, draws with early exits, speed-ups, and these over `curve` and `one_threshold`."""
    broken, early, speed_ups, gains, proven = 0, 0, [], [], []
    for seed in range(splits):
        drawn = torch.randint(len(truth), (rows,), generator=torch.Generator().manual_seed(seed))
        sample = truth.select(drawn)
        found = calibrate(sample, policy=policy, **asked)
        macs, drop, harm = true_means(truth, found.policy)
        broken += (harm if asked["bound"] == "harm" else drop) > asked["max_accuracy_drop"]
        early += found.policy["name"] != "never"
        speed_ups.append(truth.known_costs.backbone / macs)
        gains.append(np.interp(drop, *curve) / macs)
        proven.append(true_means(truth, one_threshold(sample, **asked))[0] / macs)
    return broken, early, np.array(speed_ups), np.array(gains), np.array(proven)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=1000, help="draws of samples")
    parser.add_argument("--rows", type=int, default=1000, help="samples of a draw; half of them are searched on")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.03], help="asked for")
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--policies", nargs="+", default=["confidence"], help="see `calibrate`")
    parser.add_argument("--bounds", nargs="+", default=["drop", "harm"])
    parser.add_argument("--table", help="a real table of exits, instead of the four made here")
    options = parser.parse_args()
    if options.table:
        truths = {options.table: ExitTable.load(options.table)}
    else:
        truths = {}
        for make in (ordinary, surest_where_wrong, hard_rows_are_larger, two_scores):
            logits, labels = make(torch.Generator().manual_seed(0))
            truths[make.__name__] = ExitTable(logits, labels, [1, 2, 3, 4], COSTS)
    print(
        f"{'table':20} {'policy':10} {'bound':5} {'drop':>5} {'delta':>5} {'broken':>6} {'share':>6} {'allowed':>7} "
        f"{'early':>5} {'speed-up':>8} {'over uniform':>14} {'proven alike':>14}",
        flush=True,
    )
    for (name, truth), policy in product(truths.items(), options.policies):
        curve = uniform_curve(truth)
        for bound, drop, delta in product(options.bounds, options.drops, options.deltas):
            asked = {"bound": bound, "max_accuracy_drop": drop, "delta": delta}
            given = truth, curve, policy, options.rows, options.splits
            broken, early, speed_ups, *ratios = promises(*given, **asked)
            allowed = delta + 3 * math.sqrt(delta * (1 - delta) / options.splits)
            over = [f"{each.mean():7.3f} +-{each.std() / math.sqrt(options.splits):5.3f}" for each in ratios]
            print(
                f"{name[-20:]:20} {policy:10} {bound:5} {drop:5.3f} {delta:5.2f} {broken:6} "
                f"{broken / options.splits:6.3f} {allowed:7.3f} {early:5} {speed_ups.mean():7.2f}x {' '.join(over)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
