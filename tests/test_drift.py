"""Drift: the e-process against sums over all outcomes and a naive product, and its promises on random streams."""

import json
import re

import numpy as np
import pytest
import torch
from scipy.stats import binom

from lgvit_hf import DriftMonitor, ExitTable, calibrate, load_baseline
from lgvit_hf.evaluation import drift
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.drift import WINDOW, log_evidence
from tests.seeds import generator, rng

pytestmark = pytest.mark.version_independent
BASELINE = {"samples": 1000, "exits": [500, 300, 200], "labels": [400, 600], "harm": 20}
EXITS, LABELS, HARM = np.array([0.5, 0.2, 0.15, 0.1, 0.05]), np.full(10, 0.1), 0.01


# -- the e-process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 7, 60])
def test_the_error_of_the_baseline_is_bounded(samples):
    """The factor of the baseline has an expectation of at most 1, whatever the rate."""
    counts, most = np.arange(samples + 1), 1 - drift._POWER
    for rate in np.concatenate([np.logspace(-5, -1, 20), np.linspace(0.1, 0.9, 20)]):
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = counts * np.log(counts / samples / rate)
            logs = np.nan_to_num(logs) + np.nan_to_num(
                (samples - counts) * np.log((1 - counts / samples) / (1 - rate)), nan=0.0
            )
        assert (binom.pmf(counts, samples, rate) * most * np.exp(drift._POWER * logs)).sum() <= 1


@pytest.mark.parametrize(("count", "samples", "before", "known"), [(30, 100, 20, 400), (0, 40, 3, 9), (9, 9, 0, 5)])
def test_it_is_the_least_of_bets_at_all_rates(count, samples, before, known):
    centre = (before + 0.5) / (known + 1)
    ones, others, wealth = drift._SPREAD * centre, drift._SPREAD * (1 - centre), 1.0
    for number in range(samples):  # each sample is bet on with what came before
        share = (ones if number < count else others) / (ones + others)
        wealth *= share
        ones, others = ones + (number < count), others + (number >= count)
    rates = np.linspace(0, 1, 20_001)[1:-1]
    at_odds = wealth / (rates**count * (1 - rates) ** (samples - count))
    ratio = binom.logpmf(before, known, before / known) - binom.logpmf(before, known, rates)
    least = (np.log(at_odds * (1 - drift._POWER)) + drift._POWER * ratio).min()
    assert log_evidence(np.array(count), samples, np.array(before), known) == pytest.approx(least, abs=1e-3)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5])
def test_its_expectation_is_at_most_one_when_bets_may_stop(rate):
    """Over all baselines of 6 samples and all streams of 10, stopped as soon as the evidence is above a bound."""
    known, length = 6, 10
    for bound in (0.3, 1.0, 3.0):
        total = 0.0
        for before in range(known + 1):
            going = {0: binom.pmf(before, known, rate)}  # count -> probability, of streams that go on
            for samples in range(1, length + 1):
                after = {}
                for count, chance in going.items():
                    after[count] = after.get(count, 0.0) + chance * (1 - rate)
                    after[count + 1] = after.get(count + 1, 0.0) + chance * rate
                going = {}
                for count, chance in after.items():
                    value = np.exp(log_evidence(np.array(count), samples, np.array(before), known))
                    if value >= bound or samples == length:
                        total += chance * value
                    else:
                        going[count] = chance
        assert total <= 1 + 1e-9


# -- many streams ----------------------------------------------------------------------------------------------


def evidence_of(streams, baselines, known):
    """Log of the evidence at each check, `[R, T]`; counts are `[R, T, K]`, samples `[T]`, baselines `[R, K]`."""
    channels = []
    for (counts, samples), before in zip(streams, baselines, strict=True):
        found = log_evidence(counts, samples[None, :, None], before[:, None], known)
        channels.append(np.exp(found).mean(-1))
    return np.log(sum(channels) / len(channels))


def windowed(random, rates, num_streams, step, length, known):
    """Evidence of `DriftMonitor` on streams of rates by channel, a baseline of `known` samples drawn for each."""
    drawn = {name: random.multinomial(step, rate[1], (num_streams, length // step)) for name, rate in rates.items()}
    before = [random.multinomial(known, rate[0], num_streams) for rate in rates.values()]
    total = []
    for start in range(0, length // step, WINDOW // step):
        window = [(each[:, start : start + WINDOW // step].cumsum(1)) for each in drawn.values()]
        samples = step * np.arange(1, window[0].shape[1] + 1)
        number = start * step // WINDOW + 1
        total.append(evidence_of([(each, samples) for each in window], before, known) - np.log(number * (number + 1)))
    samples = step * np.arange(1, length // step + 1)
    whole = evidence_of([(each.cumsum(1), samples) for each in drawn.values()], before, known)
    return np.logaddexp(whole, np.concatenate(total, 1)) - np.log(2), drawn, before


def rates_of(exits, harm=HARM):
    harmed = [np.array([rate, 1 - rate]) for rate in (HARM, harm)]
    return {"exits": (EXITS, exits), "labels": (LABELS, LABELS), "harm": harmed}


def test_false_alarms_are_rare_whatever_the_baseline():
    evidence, _, _ = windowed(rng(), rates_of(EXITS), num_streams=1000, step=100, length=10_000, known=5000)
    assert (evidence.max(1) >= np.log(1000)).sum() <= 3


def test_a_shift_of_the_first_exit_is_found_within_a_thousand_samples():
    shifted = np.array([0.6, 0.16, 0.12, 0.08, 0.04])
    evidence, _, _ = windowed(rng(), rates_of(shifted), num_streams=300, step=20, length=1000, known=5000)
    assert (evidence.max(1) >= np.log(1000)).mean() >= 0.5


def test_the_monitor_adds_up_what_the_streams_say():
    """The vectorised streams above and `DriftMonitor` agree, windows that begin anew included."""
    rates = rates_of(np.array([0.55, 0.2, 0.15, 0.05, 0.05]))
    # harm is counted in both ways above, and here where it is more than before
    del rates["harm"]
    evidence, drawn, before = windowed(rng(), rates, num_streams=1, step=500, length=12_000, known=2000)
    baseline = {"samples": 2000, "exits": before[0][0].tolist(), "labels": before[1][0].tolist(), "harm": 7}
    monitor, most = DriftMonitor(baseline), -np.inf
    for check in range(24):
        monitor.update(*(np.repeat(np.arange(len(each[0, check])), each[0, check]) for each in drawn.values()))
        # of three channels one, harm, has no evidence yet: 1 - power, since the start and of late
        number = check // 10 + 1
        nothing = np.log((1 - drift._POWER) * (1 / 2 + 1 / (2 * number * (number + 1))))
        most = max(most, np.logaddexp(np.log(2) + evidence[0, check], nothing) - np.log(3))
        assert np.log(monitor.p_value) == pytest.approx(-max(most, 0.0), abs=1e-6)
    assert monitor.samples == 12_000


# -- the monitor -----------------------------------------------------------------------------------------------


def streams(random, samples, exits):
    return random.choice(3, samples, p=exits), random.choice(2, samples, p=[0.4, 0.6])


def test_a_monitor_goes_on_from_its_state():
    random = rng()
    whole, parts = DriftMonitor(BASELINE), DriftMonitor(BASELINE)
    for _ in range(12):
        exits, labels = streams(random, 1000, [0.53, 0.3, 0.17])
        harm = random.random(10) < 0.02
        whole.update(exits, labels, harm)
        parts.update(exits, labels, harm)
        parts = DriftMonitor(BASELINE, state=json.loads(json.dumps(parts.state())))
        assert parts.report() == whole.report() and parts.alarm_at == whole.alarm_at
    assert whole.samples == 12_000 and whole.report()["since"] in (0, 10_000)


def test_an_alarm_stays_and_says_what_changed():
    monitor = DriftMonitor(BASELINE, alpha=0.01)
    monitor.update([0, 1, 2, 0, 1] * 400, [1, 0, 1, 1, 0] * 400)
    assert monitor.alarm and monitor.alarm_at == 2000
    report = monitor.report()
    worst = min(report["exits"], key=lambda row: row["p_value"])
    assert (worst["exit_index"], worst["baseline_share"], worst["share"]) == (1, 0.3, 0.4)
    assert worst["p_value"] <= 0.01 < report["labels"][0]["p_value"] and report["harm"]["share"] is None
    monitor.update([0, 1, 0, 2] * 500, [1, 0] * 1000)
    assert monitor.alarm and monitor.alarm_at == 2000


def test_more_harm_is_an_alarm_and_less_is_none():
    for share, expected in ((0.1, True), (0.0, False)):
        monitor = DriftMonitor(BASELINE)
        exits, labels = [0] * 500 + [1] * 300 + [2] * 200, [0] * 400 + [1] * 600
        for _ in range(5):
            monitor.update(exits, labels, [True] * round(1000 * share) + [False] * round(1000 * (1 - share)))
        assert monitor.alarm is expected and monitor.report()["harm"]["audited"] == 5000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((3, 0), "exit_index=3 is none of the 3 that the baseline has"),
        ((-1, 0), "exit_index=-1 is none"),
        ((0, 2), "label=2 is none of the 2"),
        (([0, 1], [0]), "2 exit_index but 1 label"),
        ((0.5, 0), "exit_index=0.5 must be a whole number"),
        ((0, 0, 2), "harm=2 is none"),
    ],
)
def test_what_is_no_sample_is_refused_and_not_counted(given, message):
    monitor = DriftMonitor(BASELINE)
    with pytest.raises(ValueError, match=re.escape(message)):
        monitor.update(*given)
    assert monitor.samples == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "the baseline has no 'labels'; `lgvit calibrate"),
        ({"samples": 0}, "samples=0"),
        ({"exits": [500, 300]}, "exits are of 800 samples, not of 1000"),
        ({"labels": "abc"}, "labels must be a list of counts"),
        ({"harm": 1001}, "harm=1001"),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused(change, message, tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"what": "lgvit calibrate", "baseline": BASELINE | change}))
    for call in (lambda: DriftMonitor(BASELINE | change), lambda: load_baseline(file)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_files_and_states_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="alpha=0"):
        DriftMonitor(BASELINE, alpha=0)
    state = DriftMonitor(BASELINE).state()
    with pytest.raises(ValueError, match="another baseline"):
        DriftMonitor({**BASELINE, "harm": 0}, state=state)
    with pytest.raises(ValueError, match="damaged"):
        DriftMonitor(BASELINE, state={**state, "recent": {}})
    old, none = "tests/assets/fashion_vit_highway/calibration.json", tmp_path / "none.json"
    none.write_text("{")
    with pytest.raises(ValueError, match="no baseline to compare with; `lgvit calibrate CHECKPOINT --data DATA"):
        load_baseline(old)
    with pytest.raises(ValueError, match="is not what `lgvit calibrate` writes"):
        load_baseline(none)


# -- what calibrate writes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", [None, {"weights": [1.0, 0.5, 1.0], "bias": [0.0, 0.1, 0.0]}])
def test_calibrate_counts_the_samples_it_tested_on(ensemble):
    labels = torch.randint(3, (600,), generator=generator())
    logits = torch.randn(3, 600, 3, generator=generator(1)) + 3 * torch.nn.functional.one_hot(labels, 3)
    tested = torch.randn(3, 400, 3, generator=generator(2)) + 3 * torch.nn.functional.one_hot(labels[:400], 3)
    table, other = (
        ExitTable(each, labels[: each.shape[1]], [1, 2, 3], Costs([1.0] * 3, [0.01] * 3), "abc", ensemble)
        for each in (logits, tested)
    )
    report = calibrate(table, max_accuracy_drop=0.1, tested=other)
    assert report.weights == "abc" and report.baseline in [rung["baseline"] for rung in report.ladder]
    for rung in report.ladder:
        answers = other.replay(rung["policy"])
        given = answers.logits.argmax(-1)
        assert rung["baseline"] == {
            "samples": 400,
            "exits": [int((answers.exit_index == index).sum()) for index in range(3)],
            "labels": [int((given == label).sum()) for label in range(3)],
            "harm": int((given != tested[-1].argmax(-1)).sum()),
        }
        DriftMonitor(rung["baseline"])
