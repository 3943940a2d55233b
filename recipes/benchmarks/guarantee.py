"""Is a guarantee kept? Calibrate on many random samples of tables whose truth is known, and count broken promises.

    python recipes/benchmarks/guarantee.py --splits 1000
    python recipes/benchmarks/guarantee.py --splits 200 --table table.safetensors --rows 5000

Each line is one promise: of so many samples, the share after which the true drop (or harm) was above the one asked
for, which must be at most delta, up to the noise of counting; and the mean speed-up in MACs of what was returned. The
truth of a table is its own mean over all rows; a real one is split at random, and the rows that were not calibrated on
are its truth.
"""

import argparse
import math

import torch

from lgvit_hf import ExitTable, calibrate
from lgvit_hf.evaluation.costs import Costs

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


def broken_promises(truth, rows, splits, drop, delta, bound, real):
    """Share of samples after which the truth is worse than promised, and the mean speed-up in MACs."""
    broken, speed_up = 0, 0.0
    for seed in range(splits):
        order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
        found = calibrate(truth.select(order[:rows]), max_accuracy_drop=drop, delta=delta, bound=bound)
        rest = truth.select(order[rows:]) if real else truth
        early, full = rest.replay(found.policy).logits.argmax(-1) == rest.labels, rest.right[-1]
        lost = (full & ~early).float().mean() if bound == "harm" else full.float().mean() - early.float().mean()
        broken, speed_up = broken + (lost.item() > drop), speed_up + found.full_macs / found.mean_macs / splits
    return broken / splits, speed_up


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000, help="of a sample; half of them are searched on")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.03], help="asked for")
    parser.add_argument("--table", help="a real table of exits, instead of the four made here")
    options = parser.parse_args()
    if options.table:
        truths = {options.table: ExitTable.load(options.table)}
    else:
        truths = {
            make.__name__: ExitTable(*make(torch.Generator().manual_seed(0)), [1, 2, 3, 4], COSTS)
            for make in (ordinary, surest_where_wrong, hard_rows_are_larger, two_scores)
        }
    print(
        f"{'table':28} {'bound':5} {'drop':>5} {'delta':>5} {'broken':>7} {'allowed':>8} {'speed-up':>8}", flush=True
    )
    for name, truth in truths.items():
        for bound in ("drop", "harm"):
            for drop in options.drops:
                for delta in (0.05, 0.1):
                    asked = (truth, options.rows, options.splits, drop, delta, bound, bool(options.table))
                    broken, speed_up = broken_promises(*asked)
                    allowed = delta + 3 * math.sqrt(delta * (1 - delta) / options.splits)
                    numbers = f"{drop:5.3f} {delta:5.2f} {broken:7.3f} {allowed:8.3f} {speed_up:7.2f}x"
                    print(f"{name[-28:]:28} {bound:5} {numbers}", flush=True)


if __name__ == "__main__":
    main()
