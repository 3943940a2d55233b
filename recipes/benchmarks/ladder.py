"""A certified ladder under load, and how soon drift is seen: simulated on a saved table of exits.

    python recipes/benchmarks/ladder.py table.safetensors
    python recipes/benchmarks/ladder.py table.safetensors --parts drift audit

The table, which `lgvit calibrate --table FILE` writes, is the truth: its own means are the true ones.

load: for each of so many streams a policy is calibrated on a draw of samples, with replacement. Then samples arrive at
    random, one after the other, twice as many in the middle third of the stream; each is answered by the rung that
    `Ladder` gives it when it arrives, in the time of the blocks and heads that it takes, or refused. A promise is
    broken where the true harm (or drop) of the mixture of rungs is above the one asked for: at most delta of them may
    be. "bursts": the images of the middle third are hard ones, which the promise does not hold for.
drift: `DriftMonitor` on streams of answers, those of five exits made here and those of the calibrated policy, its
    baseline drawn anew for each: false alarms, and when a shift of the first exit's share by 10 points is found.
audit: how many requests it takes until harm that has grown is found, by the share of them that is audited.
"""

import argparse
from collections import Counter, deque

import numpy as np
import torch

from lgvit_hf import DriftMonitor, ExitTable, calibrate
from lgvit_hf.evaluation.drift import log_evidence
from lgvit_hf.evaluation.predictions import consequences, replayed_exits
from lgvit_hf.serving.ladder import Ladder

# the full model's time, what a sample may wait, and the load at ordinary times, of the safest rung's capacity
FULL_MS, MAX_QUEUE_MS, LOAD = 10.0, 200.0, 0.7
ALPHA, SHIFT, AUDIT = 0.001, 0.1, 0.01


# -- load ------------------------------------------------------------------------------------------------------


def outcomes(truth, policy, bound):
    """Of each sample of a table under a policy: milliseconds, and the drop (or harm)."""
    exits, evaluated = replayed_exits(truth, policy)
    costs = truth.known_costs
    of_exit = np.array([costs.of_exit(index, evaluated) for index in range(len(truth.depths))])
    drops = consequences(truth, exits, evaluated, costs)[1].numpy()
    return of_exit[exits.numpy()] / costs.backbone * FULL_MS, drops == 1 if bound == "harm" else drops


def serve(ladder, arrivals, times):
    """The rung of each sample (-1: refused) and the wait of those answered, one after the other; `times` `[R, N]`.

    A sample is refused when it arrives, or when its turn comes too late.
    """
    rungs, waits, free, waiting = [], [], 0.0, deque()
    for number, now in enumerate(arrivals):
        while waiting and waiting[0][1] <= now:  # begun by then
            waiting.popleft()
        rung = ladder.rung(now - waiting[0][0] if waiting else 0.0)
        start = max(now, free)
        if rung is not None:
            waiting.append((now, start))
        if rung is None or start - now > ladder.max_queue_ms:
            rungs.append(-1)
            continue
        free = start + times[rung][number]
        rungs.append(rung)
        waits.append(start - now)
    return np.array(rungs), np.array(waits)


def load(truth, *, streams, rows, length, bound, drop, delta, policy="confidence"):
    """What comes of so many streams, for arrivals that are independent, and for bursts of hard images."""
    found = {kind: Counter(waits=[]) for kind in ("independent", "bursts")}
    busy = (np.arange(length) >= length // 3) & (np.arange(length) < 2 * length // 3)
    for seed in range(streams):
        random = np.random.default_rng(seed)
        drawn = torch.from_numpy(random.integers(len(truth), size=rows))
        report = calibrate(truth.select(drawn), policy=policy, bound=bound, max_accuracy_drop=drop, delta=delta)
        if report.policy["name"] == "never":
            continue  # the full model answers: there is no ladder
        times, losses = zip(*(outcomes(truth, rung["policy"], bound) for rung in report.ladder), strict=True)
        slow = np.argsort(times[0], kind="stable")[-len(truth) // 3 :]
        gaps = random.exponential(times[0].mean() / LOAD, length) / np.where(busy, 2, 1)
        for kind, count in found.items():
            picked = random.integers(len(truth), size=length)
            if kind == "bursts":
                picked[busy] = random.choice(slow, busy.sum())
            mine = [each[picked] for each in times]
            asked = {"policy": report.policy, "num_exits": len(truth.depths) - 1}
            rungs, waits = serve(Ladder(report.to_dict(), MAX_QUEUE_MS, **asked), np.cumsum(gaps), mine)
            safest = {**report.to_dict(), "ladder": report.ladder[:1]}
            alone, _ = serve(Ladder(safest, MAX_QUEUE_MS, **asked), np.cumsum(gaps), mine)
            # the true loss of what was answered: of each rung, on the samples that are drawn then
            means = [(loss.mean(), loss[slow].mean() if kind == "bursts" else loss.mean()) for loss in losses]
            true = [means[rung][int(hard)] for rung, hard in zip(rungs, busy, strict=True) if rung >= 0]
            count["streams"] += 1
            count["broken"] += np.mean(true) > drop
            count["loss"] += np.mean(true)
            count["faster"] += (rungs > 0).mean()
            count["refused"] += (rungs < 0).mean()
            count["refused_safest"] += (alone < 0).mean()
            count["rungs"] += len(report.ladder)
            count["waits"].append(np.quantile(waits, 0.99))
    means = ("loss", "faster", "refused", "refused_safest", "rungs")
    return {
        kind: {
            "streams": count["streams"],
            "broken": int(count["broken"]),
            **{name: count[name] / max(1, count["streams"]) for name in means},
            "p99_wait": max(count["waits"], default=0.0),
        }
        for kind, count in found.items()
    }


# -- drift -----------------------------------------------------------------------------------------------------


def first_alarm(answers, chances, *, known, clean, length, step, seed):
    """The sample after a change at which an alarm is raised, `None` if none is; `answers` are exits, labels, harm.

    Samples are drawn from all answers, after `clean` of them with `chances` `[N]`.
    """
    random = np.random.default_rng(seed)
    exits, labels, harm = answers
    drawn = random.integers(len(exits), size=known)
    counts = {"exits": exits, "labels": labels}
    baseline = {name: np.bincount(each[drawn], minlength=each.max() + 1).tolist() for name, each in counts.items()}
    monitor = DriftMonitor({"samples": known, **baseline, "harm": int(harm[drawn].sum())}, alpha=ALPHA)
    while monitor.samples < clean + length and not monitor.alarm:
        before = monitor.samples < clean
        picked = random.choice(len(exits), 500 if before else step, p=None if before else chances)
        monitor.update(exits[picked], labels[picked], harm[picked][random.random(len(picked)) < AUDIT])
    return monitor.samples - clean if monitor.alarm else None


def shifted(exits):
    """Chances of a table's samples with which the first exit's share is 10 points more, or less where it is large."""
    at_first = exits == 0
    share = at_first.mean()
    wanted = share + SHIFT if share + SHIFT < 1 else share - SHIFT
    chances = np.where(at_first, wanted / share, (1 - wanted) / (1 - share))
    return chances / chances.sum()


def answers_of(truth, policy):
    """Exits, labels and harm against the full model of each sample of a table under a policy."""
    answers = truth.replay(policy)
    labels = answers.logits.argmax(-1)
    return answers.exit_index.numpy(), labels.numpy(), (labels != truth.logits[-1].argmax(-1)).numpy()


def five_exits(samples=100_000):
    """Answers of a model that there is not: five exits, ten labels, a harm of 1 %, all independent."""
    random = np.random.default_rng(0)
    exits = random.choice(5, samples, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    return exits, random.integers(10, size=samples), random.random(samples) < 0.01


def drift(answers, *, streams, known):
    """Of each case its name, streams, alarms, those before the change, and when the median one is raised after it."""
    cases = [("unchanged", None, 0, 10_000, streams, 100)]
    for clean in (0, 22_500, 102_500):  # in the middle of a window of the monitor
        cases.append((f"shift after {clean:,}", shifted(answers[0]), clean, 10_000, streams // 5, 20))
    for name, chances, clean, length, number, step in cases:
        given = {"known": known, "clean": clean, "length": length, "step": step}
        found = [first_alarm(answers, chances, **given, seed=seed) for seed in range(number)]
        raised = [at for at in found if at is not None]
        median = np.median([np.inf if at is None else at for at in found])
        yield name, number, len(raised), sum(at <= 0 for at in raised), median


def audits(before, after, *, known, streams, most):
    """Audited samples after which the median stream raises an alarm, by the share of harm from then on."""
    random, needed = np.random.default_rng(0), {}
    samples = np.unique(np.geomspace(20, most, 400).astype(int))
    baselines = random.binomial(known, before, streams)
    for share in after:
        counts = random.binomial(np.diff(samples, prepend=0), share, (streams, len(samples))).cumsum(1)
        evidence = log_evidence(counts, samples, baselines[:, None], known)
        evidence[counts / samples < baselines[:, None] / known] = -np.inf
        # a third of alpha is for harm, and half of that for the counts of all samples
        found = evidence >= np.log(6 / ALPHA)
        needed[share] = float(np.median(np.where(found.any(1), samples[found.argmax(1)], np.inf)))
    return needed


# -- the command -----------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="saved table of exits")
    parser.add_argument("--parts", nargs="+", choices=("load", "drift", "audit"), default=["load", "drift", "audit"])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=2000, help="samples that each stream's policy is calibrated on")
    parser.add_argument("--length", type=int, default=3000, help="samples of a stream under load")
    parser.add_argument("--drop", type=float, default=0.02, help="asked for, of each bound")
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--known", type=int, default=5000, help="samples of a baseline")
    options = parser.parse_args()
    truth = ExitTable.load(options.table)
    if "load" in options.parts:
        print("bound  arrivals     streams  broken  mean loss  rungs  faster  refused  safest alone  p99 wait, worst")
        for bound in ("drop", "harm"):
            given = {"rows": options.rows, "length": options.length, "drop": options.drop, "delta": options.delta}
            for kind, row in load(truth, streams=options.streams, bound=bound, **given).items():
                print(
                    f"{bound:5}  {kind:11}  {row['streams']:7}  {row['broken']:6}  {row['loss']:9.4f}  "
                    f"{row['rungs']:5.1f}  {row['faster']:6.1%}  {row['refused']:7.2%}  "
                    f"{row['refused_safest']:12.2%}  {row['p99_wait']:12.0f} ms",
                    flush=True,
                )
    if "drift" in options.parts:
        policy = calibrate(truth, policy="confidence", max_accuracy_drop=options.drop).policy
        for answers in (five_exits(), answers_of(truth, policy)):
            exits = (np.bincount(answers[0]) / len(answers[0])).round(3).tolist()
            print(f"\nexits {exits}, baseline of {options.known} samples, {AUDIT:.0%} audited")
            print("what                  streams  alarms  before  median samples")
            for name, number, alarms, early, median in drift(answers, streams=options.streams, known=options.known):
                when = "-" if median == np.inf else f"{median:.0f}"
                print(f"{name:20}  {number:7}  {alarms:6}  {early:6}  {when:>14}", flush=True)
    if "audit" in options.parts:
        print(f"\nrequests until the median alarm, baseline of {options.known} samples, by the share audited")
        print("harm before    now    audited      0.1 %        1 %        5 %      100 %")
        for before in (0.002, 0.005, 0.01, 0.02):
            after = [before + more for more in (0.005, 0.01, 0.02, 0.05)]
            for now, needed in audits(before, after, known=options.known, streams=500, most=200_000).items():
                told = [needed, *(needed / share for share in (0.001, 0.01, 0.05, 1))]
                cells = "".join(f"{'never' if each == np.inf else f'{each:,.0f}':>11}" for each in told)
                print(f"{before:11.1%}  {now:5.1%}{cells}")


if __name__ == "__main__":
    main()
