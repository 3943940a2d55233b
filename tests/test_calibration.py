"""Calibration: against brute force, against its own replay, and its promise on tables of known truth."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lgvit_hf import ExitTable, calibrate
from lgvit_hf.costs import Costs
from lgvit_hf.evaluation.calibration import fit_temperature, split
from lgvit_hf.evaluation.metrics import expected_calibration_error, summarise
from lgvit_hf.evaluation.search import (
    SEARCHES,
    candidates,
    consequences,
    leaving,
    search,
    sureness,
    uniform_thresholds,
)
from lgvit_hf.policies import POLICIES, build_policy

POLICY_NAMES = ("confidence", "margin", "entropy", "confidence_entropy", "patience", "patience_confidence")
COSTS = Costs([3.0, 3.0, 3.0, 3.0], [0.2, 0.3, 0.2, 0.1])


def synthetic(rows, seed=0, exits=4, classes=5):
    """Rows of some difficulty; deeper exits see more of the label, and all share some of their noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes) * (6 * torch.rand(rows, 1, generator=generator))
    shared = torch.randn(rows, classes, generator=generator)
    own = torch.randn(exits, rows, classes, generator=generator)
    strength = torch.linspace(0.5, 1.2, exits)[:, None, None]
    logits = 2 * (strength * signal + 0.6 * shared + 0.6 * own)
    return ExitTable(logits, labels, list(range(1, exits + 1)), COSTS if exits == 4 else None)


# -- tables ----------------------------------------------------------------------------------------------------


def test_table_comes_back_from_its_file(tmp_path):
    table = synthetic(7)
    table.save(tmp_path / "table.safetensors")
    back = ExitTable.load(tmp_path / "table.safetensors", depths=[1, 2, 3, 4], num_labels=5)
    assert torch.equal(back.logits, table.logits) and torch.equal(back.labels, table.labels)
    assert back.depths == table.depths and back.costs == table.costs == COSTS


def test_table_of_another_model(tmp_path):
    file = tmp_path / "table.safetensors"
    synthetic(7).save(file)
    with pytest.raises(ValueError, match=r"exits at \[1, 2, 3, 4\], but the model's are at \[2, 4\]"):
        ExitTable.load(file, depths=[2, 4])
    with pytest.raises(ValueError, match="5 labels, but the model has 10"):
        ExitTable.load(file, num_labels=10)
    ExitTable(torch.zeros(2, 3, 4), torch.zeros(5, dtype=torch.long), [1, 2]).save(file)
    with pytest.raises(ValueError, match="do not fit 2 exits, 5 labels"):
        ExitTable.load(file)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is not a table of exits"):
        ExitTable.load(file)
    file.write_text("nothing")
    with pytest.raises(ValueError, match="is not a table of exits"):
        ExitTable.load(file)


# -- temperature -----------------------------------------------------------------------------------------------


def test_temperature_is_the_best_of_a_grid_and_undoes_a_factor():
    table = synthetic(500)
    logits, labels = table.logits[0], table.labels
    best = fit_temperature(logits, labels)

    def loss(temperature):
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    assert loss(best) <= min(loss(math.exp(step / 50)) for step in range(-150, 150)) + 1e-9
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * best, rel=1e-3)
    assert expected_calibration_error(logits / best, labels) < expected_calibration_error(logits, labels)


def test_calibration_error_by_hand():
    # confidences 0.6 (right, wrong) and 0.9 (right): |1.2 - 1| / 3 + |0.9 - 1| / 3
    logits = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1]]).log()
    assert expected_calibration_error(logits, torch.tensor([0, 1, 0])) == pytest.approx(0.1, abs=1e-6)


# -- search ----------------------------------------------------------------------------------------------------


def objective(thresholds, sureness, right, costs, price):
    on = [index for index, threshold in enumerate(thresholds) if threshold < 1]
    total = 0.0
    for row in range(sureness.shape[1]):
        left = next((index for index in on if sureness[index, row] > thresholds[index]), len(sureness))
        total += costs.of_exit(left, on) + price * (not right[left, row])
    return total / sureness.shape[1]


@pytest.mark.parametrize("price", [0.0, 2.0, 20.0, 1e4])
@pytest.mark.parametrize("exits", [1, 2])
def test_search_against_brute_force(exits, price):
    costs = Costs(COSTS.trunks[: exits + 1], COSTS.heads[: exits + 1])
    reached = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        # with ties: eight rows at one of ten scores
        sureness = (torch.randint(1, 10, (exits, 8), generator=generator) / 10).numpy()
        right = (torch.rand(exits + 1, 8, generator=generator) < 0.7).numpy()
        cuts = [[0.0, *np.unique(row).tolist(), 1.0] for row in sureness]
        best = min(objective(cut, sureness, right, costs, price) for cut in itertools.product(*cuts))
        found = objective(search(sureness, right, costs, price, (0.0, 1.0)).tolist(), sureness, right, costs, price)
        assert found >= best - 1e-6
        reached.append(found <= best + 1e-6)
        none = objective([1.0] * exits, sureness, right, costs, price)
        assert found <= none + 1e-6
    # exact for one exit; for several a descent, exit by exit, that may stop at a local best
    assert all(reached) if exits == 1 else sum(reached) >= 5


def test_an_exit_whose_head_costs_more_than_it_saves_is_switched_off():
    table = replace(synthetic(600), costs=Costs(COSTS.trunks, [0.1, 50.0, 0.1, 0.1]))
    for policy in POLICY_NAMES:
        found = calibrate(table, policy=policy, max_accuracy_drop=0.05)
        assert 1 not in found.exits and found.exits, policy
        assert build_policy(found.policy, 3).skips(1)
        everything = calibrate(table, policy=policy, max_accuracy_drop=0.05, choose_exits=False)
        assert everything.mean_macs >= found.mean_macs


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy"])
def test_temperature_undoes_the_scale_of_an_exit(policy):
    """Logits of some exits are larger by a factor: the fitted temperatures take it back, and the same rows leave."""
    table, factors = synthetic(600), [3.0, 0.5, 2.0, 1.0]
    scaled = replace(table, logits=table.logits * torch.tensor(factors)[:, None, None])
    temperatures = [[fit_temperature(exit, rows.labels) for exit in rows.logits] for rows in (table, scaled)]
    undone = [factor * value for factor, value in zip(factors, temperatures[0], strict=True)]
    assert temperatures[1] == pytest.approx(undone, rel=1e-4)
    assert table.accuracies() == scaled.accuracies()
    plain = candidates(table, COSTS, policy, tuple(temperatures[0]))
    found = candidates(scaled, COSTS, policy, tuple(undone))
    for one, other in zip(plain, found, strict=True):
        assert (leaving(table, one)[0] == leaving(scaled, other)[0]).float().mean() > 0.99


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("telling", [True, False])
def test_no_model_that_is_cut_off_is_cheaper_and_as_right(policy, telling):
    table = synthetic(600)
    if not telling:  # how sure an exit is has nothing to do with whether it is right
        right = torch.rand(4, 600, generator=torch.Generator().manual_seed(1)) < torch.tensor(
            [[0.4], [0.8], [0.79], [0.8]]
        )
        answers = torch.where(right, table.labels, (table.labels + 1) % 5)
        scale = 1 + 3 * torch.rand(4, 600, 1, generator=torch.Generator().manual_seed(2))
        table = replace(table, logits=torch.nn.functional.one_hot(answers, 5) * scale)
    found = [{"name": "never"}, *candidates(table, COSTS, policy, (1.0,) * 4)]
    reached = [consequences(table, *leaving(table, settings), COSTS) for settings in found]
    for exit_index in range(4):
        static = torch.full((600,), exit_index)
        cost, drops = consequences(table, static, [exit_index] if exit_index < 3 else [], COSTS)
        assert any(c <= cost + 1e-9 and d.sum() <= drops.sum() for c, d in reached)


# -- the whole -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("policy", [*POLICY_NAMES, "fixed"])
def test_report_is_what_its_policy_replays_to(policy, labels):
    table = synthetic(800)
    found = calibrate(table, policy=policy, max_accuracy_drop=0.06, labels=labels)
    _, tested = split(table if labels else table.without_labels())
    answers, rule = tested.replay(found.policy), build_policy(found.policy, 3)
    overall = summarise(tested, answers, COSTS, ["head"] * 4, rule)["overall"]
    assert (found.accuracy, found.full_accuracy) == pytest.approx(
        (overall["accuracy"], overall["accuracy_full_model"])
    )
    assert (found.mean_depth, found.mean_macs) == pytest.approx((overall["mean_depth"], overall["mean_macs"]))
    assert found.exits == tuple(index for index in range(3) if not rule.skips(index))
    assert found.mean_macs <= COSTS.backbone and found.full_accuracy - found.accuracy <= 0.06 + 1e-9
    if policy != "fixed":
        assert found.mean_macs < 0.95 * COSTS.backbone
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    assert (found.bound, found.n, found.guaranteed_drop) == ("none", 400, None)
    assert "no guarantee: point estimate on 400 rows" in found.as_text()


def test_every_built_in_policy_can_be_calibrated():
    assert set(SEARCHES) == set(POLICIES) - {"never"}


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_candidates_are_a_frontier_nowhere_worse_than_one_threshold(policy):
    table = synthetic(500)
    found = candidates(table, COSTS, policy, (1.0,) * 4)
    results = [consequences(table, *leaving(table, settings), COSTS) for settings in found]
    costs = [cost for cost, _ in results]
    drops = [drop.double().mean().item() for _, drop in results]
    if policy not in ("confidence", "margin", "entropy"):  # these are judged by cross-fitting too
        assert costs == sorted(costs, reverse=True) and drops == sorted(drops)
    if policy in ("confidence", "margin", "entropy"):
        limits = {"confidence": (0.0, 1.0), "margin": (-1.0, 1.0), "entropy": (-1e9, 0.0)}[policy]
        curve = uniform_thresholds(sureness(table, policy, (1.0,) * 4).numpy(), limits)
        sign = -1 if policy == "entropy" else 1
        curve = [{"name": policy, "threshold": (sign * cut).tolist()} for cut in curve]
        assert len(curve) > 50
    elif policy == "confidence_entropy":
        more = {name: found[1][name] for name in ("entropy_threshold", "temperature")}
        curve = [{"name": policy, "threshold": max(found[1]["threshold"][:-1]), **more}]
    else:
        more = {"threshold": found[0]["threshold"]} if policy == "patience_confidence" else {}
        curve = [{"name": policy, "patience": patience, **more} for patience in (1, 2, 3)]
    for settings in curve:
        cost, drop = consequences(table, *leaving(table, settings), COSTS)
        within = [one for one, other in zip(costs, drops, strict=True) if other <= drop.double().mean()]
        assert min(within) <= cost


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "confidence_entropy", "patience_confidence"])
def test_no_row_lies_on_a_threshold(policy):
    """A model and its export differ by a bit: a row on a threshold would leave one of them earlier."""
    table, temperatures = synthetic(300), (1.0,) * 4
    found = [settings for _, _, settings in SEARCHES[policy](table, COSTS, policy, temperatures, True)]
    assert len(found) > 8
    judged_by = {"confidence_entropy": "confidence", "patience_confidence": "entropy"}.get(policy, policy)
    scores = sureness(table, judged_by, temperatures).abs()
    for settings in found:
        for threshold in torch.tensor(settings["threshold"]).flatten():
            assert (scores - threshold).abs().min() > 0 or threshold in (0.0, 1.0)
        if policy == "confidence_entropy":
            entropies = sureness(table, "entropy", temperatures).abs()
            assert (entropies - settings["entropy_threshold"]).abs().min() > 0


def test_nothing_provable_runs_the_full_model():
    table = synthetic(400)
    wrong = table.logits.roll(1, -1)
    table = replace(table, logits=torch.cat([wrong[:-1], 9 * table.logits[-1:]]))
    found = calibrate(table, max_accuracy_drop=0.05, delta=0.1)
    assert found.exits == () and found.mean_macs == pytest.approx(COSTS.backbone)
    assert found.accuracy == found.full_accuracy and found.policy == {"name": "never"}
    assert "none: the full model answers" in found.as_text() and "with probability 0.9" in found.as_text()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(number):
    table = synthetic(50)
    table.logits[1, 3, 0] = number
    with pytest.raises(ValueError, match="1 of 50 rows have NaN or infinite logits"):
        calibrate(table, max_accuracy_drop=0.05)


@pytest.mark.parametrize("label", [-100, 5])
def test_labels_that_are_no_class(label):
    table = synthetic(50)
    table.labels[7] = label
    with pytest.raises(ValueError, match=f"labels: {label} is none of the 5 classes"):
        calibrate(table, max_accuracy_drop=0.05)


def test_order_of_rows_does_not_matter():
    table = synthetic(400)
    shuffled = table.select(torch.randperm(400, generator=torch.Generator().manual_seed(5)))
    first, second = (calibrate(rows, max_accuracy_drop=0.02) for rows in (table, shuffled))
    assert first.policy["threshold"] == pytest.approx(second.policy["threshold"], abs=1e-5)
    assert first.mean_macs == second.mean_macs


def test_budgets():
    table = synthetic(800)
    fast = calibrate(table, min_speedup=1.8)
    assert COSTS.backbone / fast.mean_macs >= 1.8
    assert calibrate(table, max_macs=COSTS.backbone / 1.8) == fast
    both = calibrate(table, min_speedup=1.2, max_accuracy_drop=0.05)
    assert COSTS.backbone / both.mean_macs >= 1.2 and both.full_accuracy - both.accuracy <= 0.05


@pytest.mark.parametrize("rows", [788, 1000, 1662])
def test_halves_are_random_whatever_the_rows_are_like(rows):
    """Hard rows have the larger logits, and many rows are alike: neither half gets more of the hard ones."""
    hard_share, drawn = 0.1, []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        hard = torch.rand(rows, generator=generator) < hard_share
        size = torch.where(hard, 9.0, torch.randint(1, 4, (rows,), generator=generator).float())
        logits = torch.stack([size, -size / 2], -1).expand(3, rows, 2)
        _, tested = split(ExitTable(logits, hard.long(), [1, 2, 3]))
        drawn.append(tested.labels.sum().item() - hard.sum().item() / 2)
    spread = math.sqrt(rows * hard_share * (1 - hard_share)) / 2
    assert abs(np.mean(drawn)) < 4 * spread / 10 and 0.7 < np.std(drawn) / spread < 1.4


def test_the_search_never_sees_the_rows_that_are_tested_on(monkeypatch):
    table, seen = synthetic(300), []
    monkeypatch.setattr(
        "lgvit_hf.evaluation.calibration.candidates", lambda rows, *rest: seen.append(rows) or candidates(rows, *rest)
    )
    found = calibrate(table, max_accuracy_drop=0.05, delta=0.1)
    searched, tested = split(table)
    assert len(seen) == 1 and torch.equal(seen[0].logits, searched.logits) and found.n == len(tested) == 150
    every = torch.cat([searched.logits, tested.logits], 1).sum((0, 2)).sort().values
    assert torch.equal(every, table.logits.sum((0, 2)).sort().values)


def test_tested_must_be_other_rows_of_the_same_model():
    table = synthetic(300)
    with pytest.raises(ValueError, match="300 of the 300 rows to test on are in the table that is searched on"):
        calibrate(table, max_accuracy_drop=0.05, delta=0.1, tested=table)
    with pytest.raises(ValueError, match=r"tested is a table of another model: depths \[1, 2, 3, 4, 5\]"):
        five = replace(synthetic(300, exits=5), costs=Costs([1.0] * 5, [1.0] * 5))
        calibrate(table, max_accuracy_drop=0.05, tested=five)
    with pytest.raises(ValueError, match="another model: weights"):
        calibrate(table, max_accuracy_drop=0.05, tested=replace(synthetic(300, seed=1), weights="other"))
    with pytest.raises(ValueError, match="tested is a table of 7 classes, not 5"):
        calibrate(table, max_accuracy_drop=0.05, tested=synthetic(300, seed=1, classes=7))


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "patience", "patience_confidence"])
def test_all_exits_stay_on_where_none_may_be_switched_off(policy):
    table = replace(synthetic(400), costs=Costs(COSTS.trunks, [1.5, 1.5, 1.5, 0.1]))
    found = candidates(table, table.costs, policy, (1.0,) * 4, choose_exits=False)
    for settings in found:
        left, asked = leaving(table, settings)
        reached = [index for index in range(3) if (left >= index).any()]
        assert set(reached) <= set(asked), settings


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "patience"])
def test_exits_behind_one_where_all_leave_are_off(policy):
    left, asked = leaving(synthetic(400), candidates(synthetic(400), COSTS, policy, (1.0,) * 4)[-1])
    assert asked == [0] and not left.any()


def test_two_neighbouring_scores_are_told_apart():
    close = np.nextafter(np.float32(0.5), np.float32(0))
    sureness, right = np.array([[0.5, close]], np.float32), np.array([[True, False], [True, True]])
    (cut,) = search(sureness, right, Costs([1.0, 9.0], [0.0, 0.0]), 100.0, (0.0, 1.0))
    assert (sureness[0] > cut).tolist() == [True, False]


def test_a_head_that_is_off_is_not_paid_for():
    """Leaving at the first exit loses 10 where going on costs 9; with the second head, never worth it, 14."""
    sureness, right = np.array([[0.5], [0.5]], np.float32), np.array([[False], [False], [True]])
    found = search(sureness, right, Costs([1.0, 4.0, 5.0], [0.0, 5.0, 0.0]), 10.0, (0.0, 1.0))
    assert found.tolist() == [1.0, 1.0]


def test_two_tables_search_on_all_of_the_first():
    table, other = synthetic(400), synthetic(300, seed=1)
    found = calibrate(table, max_accuracy_drop=0.05, delta=0.1, tested=other)
    assert found.n == 300 and found.mean_macs < COSTS.backbone
    halves = split(table)
    apart, together = (
        calibrate(halves[0], max_accuracy_drop=0.05, tested=halves[1]),
        calibrate(table, max_accuracy_drop=0.05),
    )
    assert (apart.policy, apart.accuracy, apart.n) == (together.policy, together.accuracy, together.n)


@pytest.mark.parametrize("bound", ["drop", "harm"])
def test_promise_is_kept(bound):
    truth, broken, gained, splits, delta = synthetic(20_000, seed=99), 0, 0, 100, 0.1
    full = truth.logits[-1].argmax(-1) == truth.labels
    for seed in range(splits):
        rows = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))[:600]
        sample = truth.select(rows)
        found = calibrate(sample, max_accuracy_drop=0.05, delta=delta, bound=bound, temperature=False)
        early = truth.replay(found.policy).logits.argmax(-1) == truth.labels
        drop = (full & ~early).float().mean() if bound == "harm" else full.float().mean() - early.float().mean()
        broken, gained = broken + (drop.item() > 0.05), gained + (found.mean_macs < COSTS.backbone)
    assert broken / splits <= delta + 3 * math.sqrt(delta * (1 - delta) / splits)
    assert gained > splits / 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "nothing is asked"),
        ({"max_macs": 0.5}, "max_macs=0.5 is out of reach: the least is 3.2 MACs, a speed-up of 3.78"),
        ({"max_accuracy_drop": 0.0, "min_speedup": 3.7}, "out of reach within max_accuracy_drop=0"),
        ({"max_latency": 1.0}, "max_latency needs measured times.*--cost-table"),
        ({"min_speedup": 1.5, "delta": 0.1}, "needs a max_accuracy_drop"),
        ({"max_accuracy_drop": 0.01, "delta": 0.05, "bound": "harm"}, r"at least 299 are needed \(a table of 598"),
        ({"max_accuracy_drop": 1.5}, "from 0 to 1"),
        ({"max_accuracy_drop": 0.01, "policy": "never"}, "calibrate knows the policies confidence.*not 'never'"),
    ],
)
def test_targets_that_cannot_be(wanted, message):
    with pytest.raises(ValueError, match=message):
        calibrate(synthetic(200), **wanted)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (replace(synthetic(20), costs=None), "the table has no costs"),
        (replace(synthetic(20), costs=Costs([1.0], [1.0])), "costs are of 1 segments and 1 heads, the table of 4"),
        (synthetic(1), "1 rows are too few"),
        (synthetic(20, exits=1), "final classifier only"),
    ],
)
def test_tables_that_cannot_be(table, message):
    with pytest.raises(ValueError, match=message):
        calibrate(table, max_accuracy_drop=0.1)
