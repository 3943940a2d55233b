"""The ladder under load: hysteresis, refusals, what is refused at the start, and the recipe that simulates it."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgvit_hf import ExitTable, calibrate
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.serving.ladder import Ladder
from tests.seeds import examples, generator

pytestmark = pytest.mark.version_independent
ROOT = Path(__file__).resolve().parents[1]


def policy(threshold):
    return {"name": "confidence", "threshold": threshold, "temperature": [1.0, 1.1, 1.2]}


BASELINE = {"samples": 10, "exits": [5, 3, 2], "labels": [4, 6], "harm": 1}
REPORT = {
    "ladder": [{"policy": policy([high, 0.9]), "baseline": BASELINE} for high in (0.9, 0.8, 0.7, 0.6)],
    "delta": 0.05,
    "bound": "drop",
    "max_accuracy_drop": 0.01,
    "weights": "abc",
}
MODEL = {"policy": policy([0.6, 0.9]), "num_exits": 2, "weights": "abc"}


def test_faster_as_the_queue_grows_and_safer_again_only_when_it_is_short():
    ladder = Ladder(REPORT, 400, **MODEL)
    assert [ladder.rung(age) for age in (0, 99, 100, 199, 200, 399)] == [0, 0, 1, 1, 2, 3]
    assert [ladder.rung(age) for age in (160, 150, 149, 100, 99, 50, 49, 0)] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert ladder.rung(400) is None and ladder.rung(1e9) is None and ladder.rung(0) == 0
    assert [ladder.rung(399), ladder.rung(399, alarm=True), ladder.rung(160), ladder.rung(400, alarm=True)] == [
        3, 0, 3, None
    ]  # fmt: skip
    assert ladder.thresholds == [[0.9, 0.9], [0.8, 0.9], [0.7, 0.9], [0.6, 0.9]]


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.floats(0, 500), max_size=40), st.integers(1, 6))
def test_it_moves_only_past_both_lines(ages, rungs):
    """Against the rule word by word: climb at i / R of the most, return below half of that."""
    ladder, now = Ladder({**REPORT, "ladder": REPORT["ladder"][:1] * rungs}, 300, **MODEL), 0
    for age in ages:
        if age >= 300:
            assert ladder.rung(age) is None
            continue
        while now + 1 < rungs and rungs * age / 300 >= now + 1:
            now += 1
        while now > 0 and rungs * age / 300 / 0.5 < now:
            now -= 1
        assert ladder.rung(age) == now


@pytest.mark.parametrize(
    ("change", "of_model", "message"),
    [
        ({"ladder": []}, {}, "the ladder is empty"),
        ({"ladder": None}, {}, "the ladder is empty"),
        ({"delta": None}, {}, "the ladder is not certified"),
        ({"weights": "xyz"}, {}, "of a model with other weights"),
        (
            {},
            {"policy": {**policy(0.5), "name": "entropy"}},
            'another policy: name is "confidence"',
        ),
        ({}, {"policy": {**policy(0.5), "temperature": 1.0}}, "another policy: temperature is [1.0, 1.1, 1.2]"),
        ({}, {"num_exits": 3}, "the ladder has 2 thresholds, but the model has 3 exits"),
        ({"ladder": [{"policy": {"name": "never"}}]}, {"policy": {"name": "never"}}, "'never' has no thresholds"),
        ({"ladder": [{"accuracy": 1.0}]}, {}, "no ladder to answer by: 'policy'"),
    ],
)
def test_ladders_that_are_refused(change, of_model, message, tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(REPORT | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        Ladder.load(file, 100, **MODEL | of_model)


def test_files_and_times_that_are_refused(tmp_path):
    for content in ("{", "3", "[]"):
        (tmp_path / "calibration.json").write_text(content)
        with pytest.raises(ValueError, match="no ladder to answer by"):
            Ladder.load(tmp_path / "calibration.json", 100, **MODEL)
    for wait in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_queue_ms"):
            Ladder(REPORT, wait, **MODEL)


def test_each_rung_has_a_monitor_and_a_share_of_alpha():
    monitors = Ladder(REPORT, 100, **MODEL).monitors(0.01)
    assert [monitor.alpha for monitor in monitors] == [0.0025] * 4
    for baseline in (None, {**BASELINE, "labels": None}):
        ladder = Ladder({**REPORT, "ladder": [{"policy": policy(0.5), "baseline": baseline}]}, 100, **MODEL)
        with pytest.raises(ValueError, match="the baseline has no"):
            ladder.monitors()


def table_of(samples=4000, classes=4):
    random = generator()
    labels = torch.randint(classes, (samples,), generator=random)
    signal = torch.nn.functional.one_hot(labels, classes) * 7 * torch.rand(samples, 1, generator=random)
    logits = torch.stack(
        [strength * signal + torch.randn(samples, classes, generator=random) for strength in (1, 1.5, 2)]
    )
    return ExitTable(logits, labels, [1, 2, 3], Costs([1.0] * 3, [0.05] * 3))


def test_a_calibration_is_taken_and_says_what_it_promises():
    report = calibrate(table_of(), max_accuracy_drop=0.05, delta=0.1)
    ladder = Ladder(report.to_dict(), 50, policy=report.policy, num_exits=2)
    assert len(ladder.thresholds) == len(report.ladder) == len(ladder.monitors())
    assert "at most 0.05 with probability 0.9, if samples arrive independently" in ladder.promise()


# -- the recipe ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(ROOT / "recipes" / "benchmarks" / "ladder.py"))


def test_the_mixture_keeps_the_bound_while_load_climbs_the_ladder(recipe):
    truth = table_of(20_000)
    found = recipe["load"](truth, streams=8, rows=1500, length=1500, bound="harm", drop=0.03, delta=0.1)
    calm = found["independent"]
    # at delta 0.1, four or more of eight broken promises have a probability of 0.005 if all were as bad as allowed
    assert calm["streams"] > 0 and calm["broken"] <= 3
    assert calm["faster"] > 0 and calm["refused"] < calm["refused_safest"]
    assert calm["p99_wait"] <= recipe["MAX_QUEUE_MS"]


def test_what_an_audit_sees_grows_with_its_share(recipe):
    needed = recipe["audits"](0.005, [0.02, 0.05], known=5000, streams=50, most=20_000)
    assert 0 < needed[0.05] < needed[0.02] < 20_000
