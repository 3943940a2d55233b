"""Calibration: against brute force, against its own replay, and its promise on tables of known truth."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from scipy.special import softmax

from lgvit_hf import ExitTable, calibrate
from lgvit_hf.evaluation import calibration, threshold_search
from lgvit_hf.evaluation import cost_table as cost_tables
from lgvit_hf.evaluation import search as searching
from lgvit_hf.evaluation.calibration import fit_temperature, split_table
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.metrics import expected_calibration_error, summarise
from lgvit_hf.evaluation.predictions import Measured, consequences, replayed_exits
from lgvit_hf.evaluation.search import SEARCHES, candidates
from lgvit_hf.evaluation.threshold_search import confidence_scores, search, uniform_thresholds
from lgvit_hf.evaluation.timing import PartTimes, time_parts
from lgvit_hf.policies import POLICIES, build_policy
from tests.seeds import generator, rng
from tests.tiny import tiny_images, tiny_model

# what is left goes through the policies once on each version of transformers
version_independent = pytest.mark.version_independent

POLICY_NAMES = ("confidence", "margin", "entropy", "confidence_entropy", "patience", "patience_confidence")
# all rows are above the first of confidence_scores and none is above the second
RANGES = {"confidence": (0.0, 1.0), "margin": (-1.0, 1.0), "entropy": (-1e9, 0.0)}
COSTS = Costs([3.0, 3.0, 3.0, 3.0], [0.2, 0.3, 0.2, 0.1])


def synthetic(rows, seed=0, exits=4, classes=5):
    """Rows of some difficulty; deeper exits see more of the label, and all share some of their noise."""
    numbers = generator(seed)
    labels = torch.randint(classes, (rows,), generator=numbers)
    signal = torch.nn.functional.one_hot(labels, classes) * (6 * torch.rand(rows, 1, generator=numbers))
    shared = torch.randn(rows, classes, generator=numbers)
    own = torch.randn(exits, rows, classes, generator=numbers)
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


@version_independent
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


@version_independent
def test_temperature_is_the_best_of_a_grid_and_undoes_a_factor():
    table = synthetic(500)
    logits, labels = table.logits[0], table.labels
    best = fit_temperature(logits, labels)

    def loss(temperature):
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    assert loss(best) <= min(loss(math.exp(step / 50)) for step in range(-150, 150)) + 1e-9
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * best, rel=1e-3)
    # far too sure of everything, and mended
    undone = expected_calibration_error(3 * logits / (3 * best), labels)
    assert undone < expected_calibration_error(3 * logits, labels) - 0.05


# -- search ----------------------------------------------------------------------------------------------------


def objective(thresholds, confidence_scores, right, costs, price):
    on = [index for index, threshold in enumerate(thresholds) if threshold < 1]
    total = 0.0
    for row in range(confidence_scores.shape[1]):
        left = next(
            (index for index in on if confidence_scores[index, row] > thresholds[index]), len(confidence_scores)
        )
        total += costs.of_exit(left, on) + price * (not right[left, row])
    return total / confidence_scores.shape[1]


def cuts_of(scores):
    return [0.0, *np.unique(scores).tolist(), 1.0]


@version_independent
@pytest.mark.parametrize("price", [0.0, 2.0, 20.0, 1e4])
def test_search_against_brute_force(price):
    numbers = rng()
    for exits, _ in itertools.product((1, 2), range(10)):
        costs = Costs(numbers.uniform(1, 4, exits + 1).tolist(), numbers.uniform(0, 2.5, exits + 1).tolist())
        # with ties: eight rows at one of nine scores
        confidence_scores = (numbers.integers(1, 10, (exits, 8)) / 10).astype(np.float32)
        right = numbers.random((exits + 1, 8)) < 0.7
        thresholds = search(confidence_scores, right, costs, price, (0.0, 1.0)).tolist()
        found = objective(thresholds, confidence_scores, right, costs, price)
        best = min(
            objective(cut, confidence_scores, right, costs, price)
            for cut in itertools.product(*map(cuts_of, confidence_scores))
        )
        assert found >= best - 1e-6
        assert found <= objective([1.0] * exits, confidence_scores, right, costs, price) + 1e-6
        # exact for one exit; for several a descent, exit by exit, that ends where no exit alone makes it better
        for index in range(exits):
            for cut in cuts_of(confidence_scores[index]):
                others = [*thresholds[:index], cut, *thresholds[index + 1 :]]
                assert found <= objective(others, confidence_scores, right, costs, price) + 1e-6


@version_independent
def test_exits_are_fitted_again_to_the_rows_that_come_there():
    """Two rows are wrong at the second exit, which is off until they leave at the first."""
    confidence_scores, limits = np.array([[0.75, 0.75, 0.25]] * 2, np.float32), (0.125, 1.0)
    right = np.array([[True, True, False], [False, False, True], [True, True, True]])
    assert search(confidence_scores, right, Costs([1.0, 1.0, 8.0], [0.0] * 3), 100.0, limits).tolist() == [0.5, 0.125]


@version_independent
def test_search_with_every_exit_asked_against_brute_force():
    """Heads that cost as much as blocks are paid for wherever a row comes."""
    numbers, costs = rng(), Costs([3.0, 3.0], [2.5, 0.1])
    for price in (0.0, 4.0, 20.0):
        confidence_scores = (numbers.integers(1, 10, (1, 12)) / 10).astype(np.float32)
        right = numbers.random((2, 12)) < 0.7
        thresholds = search(confidence_scores, right, costs, price, (0.0, 1.0), choose_exits=False).tolist()
        assert thresholds[0] < 1
        # the last of the cuts sends nobody away and is below 1
        cuts = [[cut] for cut in [*cuts_of(confidence_scores)[:-1], 0.95]]
        best = min(objective(cut, confidence_scores, right, costs, price) for cut in cuts)
        assert objective(thresholds, confidence_scores, right, costs, price) == pytest.approx(best)


@version_independent
def test_exits_that_gain_nothing_are_off_and_all_leave_below_the_least_score():
    scores, limits = np.array([[0.5, 0.25], [0.75, 0.5]], np.float32), (0.125, 1.0)
    right = np.array([[True, True], [True, True], [True, True]])
    assert search(scores, right, Costs([1.0, 2.0, 2.0], [0.0] * 3), 9.0, limits).tolist() == [0.125, 0.125]
    # as much is spent on the head as is saved behind it: a draw, and the exit is off
    assert search(scores[:1], right[:2], Costs([1.0, 2.0], [3.0, 1.0]), 9.0, limits).tolist() == [1.0]
    assert search(scores[:1], right[:2], Costs([1.0, 2.0], [2.75, 1.0]), 9.0, limits).tolist() == [0.125]
    # where every exit is evaluated its head is no matter: going on costs 0.5, a wrong answer 0 or 1
    one, costs = scores[:1, :1], Costs([1.0, 0.4], [3.0, 0.1])
    assert search(one, right[:2, :1], costs, 1.0, limits, choose_exits=False).tolist() == [0.125]
    assert search(one, np.array([[False], [True]]), costs, 1.0, limits, choose_exits=False).tolist() == [1 - 2**-24]
    # a row at the upper limit does not leave there, and so comes to the second exit
    sure, right = np.array([[1.0], [0.5]], np.float32), np.array([[False], [True], [True]])
    assert search(sure, right, Costs([1.0, 1.0, 9.0], [0.0] * 3), 100.0, limits).tolist() == [1.0, 0.125]
    # half way between two scores
    wrong = np.array([[True, False], [True, True]])
    assert search(scores[:1], wrong, Costs([1.0, 2.0], [0.5, 1.0]), 9.0, limits).tolist() == [0.375]


@version_independent
def test_frontier_by_hand(monkeypatch):
    """Of the same drop the cheaper, of the same cost the one that loses less, and of twins the first."""
    measured = [(3.0, 0.1), (1.0, 0.6), (1.0, 0.5), (2.0, 0.5), (3.0, 0.2), (4.0, 0.1), (5.0, -0.1), (1.0, 0.5)]
    found = [Measured(*numbers, {"name": name}) for numbers, name in zip(measured, "abcdefgh", strict=True)]
    monkeypatch.setitem(searching.SEARCHES, "margin", lambda *arguments: iter(found))
    assert [settings["name"] for settings in candidates(synthetic(4), COSTS, "margin", (1.0,) * 4)] == ["g", "a", "c"]


@version_independent
def test_consequences_by_hand():
    # right: by the exit only, by the full model only, by both, by none
    logits = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [0, 1]], [[0, 1.0], [1, 0], [1, 0], [0, 1]]])
    table = ExitTable(logits, torch.zeros(4, dtype=torch.long), [1, 2])
    cost, drops = consequences(table, torch.zeros(4, dtype=torch.long), [0], Costs([4.0, 8.0], [1.0, 2.0]))
    assert cost == 5.0 and drops.tolist() == [-1, 1, 0, 0]
    cost, drops = consequences(table, torch.tensor([0, 1, 1, 1]), [0], Costs([4.0, 8.0], [1.0, 2.0]))
    assert cost == (5 + 3 * 15) / 4 and drops.tolist() == [-1, 0, 0, 0]


@version_independent
def test_sureness_by_hand():
    table, temperatures = synthetic(20), (0.5, 1.0, 2.0, 4.0)
    for policy in ("confidence", "margin", "entropy"):
        chances = np.sort([softmax(exit.numpy() / t, -1) for exit, t in zip(table.logits, temperatures, strict=True)])
        expected = {
            "confidence": chances[..., -1],
            "margin": chances[..., -1] - chances[..., -2],
            "entropy": -stats.entropy(chances, axis=-1),
        }[policy]
        assert confidence_scores(table, policy, temperatures).numpy() == pytest.approx(expected[:-1], abs=1e-5)


@version_independent
def test_uniform_thresholds_by_hand():
    scores = np.array([[0.125, 0.375], [0.625, 1.0]], np.float32)
    # of four scores the first, the second (half of three is one and a half) and the last, which nothing is above
    found = uniform_thresholds(scores, (0.0, 1.0), number=3)
    assert [cut.tolist() for cut in found] == [[0.0] * 2, [0.25] * 2, [0.5] * 2]
    found = uniform_thresholds(scores * np.float32(0.5), (-1.0, 1.0), number=3)
    assert [cut.tolist() for cut in found] == [[-1.0] * 2, [0.125] * 2, [0.25] * 2, [0.75] * 2]
    assert len(uniform_thresholds(synthetic(300).logits[:3, :, 0].numpy(), (-1e9, 1e9))) == 61
    for lower in (np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(1))):
        upper = np.nextafter(lower, np.float32(1))
        cuts = uniform_thresholds(np.array([[lower, upper]]), (0.0, 1.0), number=2)
        assert [cut.dtype for cut in cuts] == [np.float32] * 3
        assert [[score > cut[0] for score in (lower, upper)] for cut in cuts] == [[1, 1], [0, 1], [0, 0]]


def predicted(table, settings, num_samples=None):
    """The cost, and the mean drop and two standard errors of it; one more loss is assumed where all exit early."""
    exit_index, evaluated = replayed_exits(table, settings)
    cost, drops = consequences(table, exit_index, evaluated, COSTS)
    num_samples, drops = num_samples or len(table), drops.double()
    spread = drops.var(correction=0) + (exit_index < len(table.depths) - 1).double().mean() / num_samples
    return cost, (drops.mean() + 2 * (spread / num_samples) ** 0.5).item()


@version_independent
@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy"])
def test_thresholds_are_judged_by_rows_they_were_not_fitted_to(policy, monkeypatch):
    """Thresholds of each price by all rows and by each two thirds; static models and one threshold by all rows."""
    table, temperatures, searches, limits = synthetic(31), (1.0, 2.0, 0.5, 1.0), [], RANGES[policy]
    scores, right = confidence_scores(table, policy, temperatures).numpy(), table.right.numpy()

    def recorded(scores, right, of, price, limits, choose_exits):
        searches.append((right.shape[1], price, choose_exits))
        return search(scores, right, of, price, limits, choose_exits)

    monkeypatch.setattr(threshold_search, "search", recorded)
    every_one = list(SEARCHES[policy](table, COSTS, policy, temperatures, True))
    found = [entry for entry in every_one if not entry.proof_only]
    uniform = uniform_thresholds(scores, limits)
    # 17 prices, three exits alone, one threshold for all exits, and for fewer exits at six of the prices
    assert len(found) == 17 + 3 + len(uniform) + 6
    # and of these fewer exits every threshold, for proofs
    fewer = dict.fromkeys(entry.path for entry in found[-6:] if entry.path != ((0, 1, 2),))
    assert [entry.path for entry in every_one[len(found) :]] == [path for path in fewer for _ in uniform]
    prices = COSTS.backbone * np.geomspace(1000, 0.1, 17)
    expected = [(rows, price, True) for price in prices for rows in (20, 21, 21, 31)]
    assert searches == [(rows, pytest.approx(price), choose) for rows, price, choose in expected]

    def consequences_of(settings, rows):
        return predicted(table.select(torch.from_numpy(rows)), settings, 31)

    def settings_of(thresholds):
        numbers = [-number if policy == "entropy" else number for number in thresholds.tolist()]
        return {"name": policy, "threshold": numbers, "temperature": list(temperatures)}

    every = np.arange(31)
    for number, (cost, drop, settings, *_) in enumerate(found):
        seen = consequences_of(settings, every)
        if number < 17:
            apart = []
            for fold in range(3):
                rest = every[every % 3 != fold]
                thresholds = search(scores[:, rest], right[:, rest], COSTS, prices[number], limits)
                apart.append(consequences_of(settings_of(thresholds), every[every % 3 == fold]))
            assert seen == consequences_of(settings_of(search(scores, right, COSTS, prices[number], limits)), every)
            seen = tuple(np.maximum(seen, np.mean(apart, axis=0)))
        assert (cost, drop) == pytest.approx(seen)
        # behind an exit where all leave, all are off; no number is -0
        signed = [-number if policy == "entropy" else number for number in settings["threshold"]]
        first = next((index for index, number in enumerate(signed) if number <= limits[0]), 3)
        assert all(number == limits[1] for number in signed[first + 1 :]), settings
        assert not any(str(number) == "-0.0" for number in settings["threshold"])
    for index, (_, _, settings, path, _) in enumerate(found[17:20]):
        left, on = replayed_exits(table, settings)
        assert on == [index] and (left == index).all() and path is None
        assert settings == settings_of(np.where(np.arange(3) == index, *np.float32(limits)))
    assert found[20][2] == found[17][2], "below the least score all leave at the first exit"
    for cut, (_, _, settings, *_) in zip(uniform[1:], found[21 : 20 + len(uniform)], strict=True):
        assert settings == settings_of(cut)
    fixed = list(SEARCHES[policy](table, COSTS, policy, temperatures, False))
    assert len(fixed) == 17 + len(uniform) and not any(choose for _, _, choose in searches[68:])

    # one threshold for some of the exits, and the others off
    monkeypatch.setattr(threshold_search, "with_fewer_exits", lambda *given: iter([(9, (0, 2)), (5, (1,))]))
    first, second, *whole = list(SEARCHES[policy](table, COSTS, policy, temperatures, True))[20:]
    assert [entry.path for entry in whole] == [((0, 2),)] * len(uniform) + [((1,),)] * len(uniform)
    assert whole[9][:4] == first[:4] and whole[len(uniform) + 5][:4] == second[:4]
    off, nine, five = limits[1], uniform[9][0], uniform[5][0]
    for (cost, drop, settings, *_), cuts in ((first, [nine, off, nine]), (second, [off, five, off])):
        assert settings == settings_of(np.array(cuts, np.float32))
        assert (cost, drop) == pytest.approx(consequences_of(settings, every))


@version_independent
@pytest.mark.parametrize(("rows", "sizes"), [(2, [2, 2]), (3, [2, 2, 2, 3])])
def test_folds_of_few_rows(rows, sizes, monkeypatch):
    searched = []
    monkeypatch.setattr(
        threshold_search, "search", lambda *given: searched.append(given[0].shape[1]) or search(*given)
    )
    list(SEARCHES["margin"](synthetic(rows), COSTS, "margin", (1.0,) * 4, True))
    assert searched == 17 * sizes


@version_independent
@pytest.mark.parametrize("policy", ["confidence_entropy", "patience", "patience_confidence", "fixed"])
def test_what_has_few_parameters_is_tried_in_full(policy):
    table = synthetic(40)
    found = list(SEARCHES[policy](table, COSTS, policy, (1.0,) * 4, True))
    tried = {"confidence_entropy": 8 * 8, "patience": 3, "patience_confidence": 3 * 8, "fixed": 4}[policy]
    assert len(found) == tried + (0 if policy == "fixed" else 6)
    assert len(list(SEARCHES[policy](table, COSTS, policy, (1.0,) * 4, False))) == tried
    for cost, drop, settings, *_ in found:
        assert (cost, drop) == pytest.approx(predicted(table, settings))
    settings = [entry.settings for entry in found[:tried]]
    if policy == "fixed":
        assert [one["exit_index"] for one in settings] == [0, 1, 2, 3]
    elif policy == "patience":
        assert [(one["patience"], one["exits"]) for one in settings] == [(1, [0]), (2, [0, 1, 2]), (3, [0, 1, 2])]
    else:
        scores = {name: confidence_scores(table, name, (1.0,) * 4).numpy() for name in ("confidence", "entropy")}
        # each passes one eighth of the scores fewer; the first passes all but the least
        below = {
            name: [(ranked <= ranked.ravel()[119 * k // 8]).sum() for k in range(8)]
            for name, ranked in ((name, np.sort(scores[name], axis=None)) for name in scores)
        }
        if policy == "patience_confidence":
            assert [one["patience"] for one in settings] == [1] * 8 + [2] * 8 + [3] * 8
            assert [(scores["entropy"] <= -one["threshold"]).sum() for one in settings] == 3 * below["entropy"]
            assert all(one["exits"] == [0, 1, 2] for one in settings)
        else:
            assert [(scores["confidence"] <= one["threshold"][2]).sum() for one in settings] == np.repeat(
                below["confidence"], 8
            ).tolist()
            assert [(scores["entropy"] <= -one["entropy_threshold"]).sum() for one in settings] == 8 * below["entropy"]
            fewer = [number for _, _, one, *_ in found[tried:] for number in one["threshold"] if number == 1.0]
            assert len(fewer) == sum(3 - len(replayed_exits(table, one)[1]) for _, _, one, *_ in found[tried:])


@version_independent
def test_fewer_exits_are_the_best_where_each_counts_for_itself():
    """Gains and losses of exits that add up: taking the worst away in turn finds the best of all subsets."""
    numbers = rng()
    base, saved, lost = numbers.uniform(5, 6, 2), numbers.uniform(-1, 1.5, (2, 3)), numbers.uniform(-0.5, 1, (2, 3))
    # one parameter for all is the better, whatever the exits
    base[1], saved[1], lost[1] = base[0] - 1, saved[0], lost[0]

    def judged(number, exits):
        return base[number] - saved[number, list(exits)].sum(), lost[number, list(exits)].sum()

    found = list(threshold_search.with_fewer_exits(3, 2, judged, 10.0, True))
    assert found[:2] == [(0, (0, 1, 2)), (1, (0, 1, 2))]
    subsets = [exits for size in (1, 2, 3) for exits in itertools.combinations(range(3), size)]
    for price, (number, exits) in zip(10 * np.geomspace(1000, 0.1, 17)[::3], found[2:], strict=True):
        cost = {some: judged(1, some)[0] + price * judged(1, some)[1] for some in subsets}
        assert number == 1 and cost[exits] == pytest.approx(min(cost.values()))
    assert list(threshold_search.with_fewer_exits(3, 2, judged, 10.0, False)) == found[:2]


@version_independent
def test_an_exit_whose_head_costs_more_than_it_saves_is_switched_off():
    table = replace(synthetic(600), costs=Costs(COSTS.backbone_costs, [0.1, 50.0, 0.1, 0.1]))
    for policy in POLICY_NAMES:
        # patience has few settings: what is left without that head is the first exit alone, which loses a fifth
        wanted = {"policy": policy, "max_accuracy_drop": 0.4 if policy == "patience" else 0.1}
        found = calibrate(table, **wanted)
        assert 1 not in found.exits and found.exits, policy
        assert build_policy(found.policy, 3).skips(1)
        everything = calibrate(table, **wanted, choose_exits=False)
        assert everything.mean_macs >= found.mean_macs and everything.exits in ((), (0,), (0, 1, 2))


@version_independent
def test_temperature_undoes_the_scale_of_an_exit():
    """Logits of some exits are larger by a factor: the fitted temperatures take it back, and the same rows leave."""
    table, factors = synthetic(600), [4.0, 0.5, 2.0, 1.0]
    scaled = replace(table, logits=table.logits * torch.tensor(factors)[:, None, None])
    temperatures = [[fit_temperature(exit, rows.labels) for exit in rows.logits] for rows in (table, scaled)]
    undone = [factor * value for factor, value in zip(factors, temperatures[0], strict=True)]
    assert temperatures[1] == pytest.approx(undone, rel=1e-4)
    assert table.accuracies() == scaled.accuracies()
    for policy in ("confidence", "margin", "entropy"):
        plain = candidates(table, COSTS, policy, tuple(temperatures[0]))
        found = candidates(scaled, COSTS, policy, tuple(undone))
        # powers of two are exact
        assert [one["threshold"] for one in plain] == [one["threshold"] for one in found] and len(plain) > 8
        for one, other in zip(plain, found, strict=True):
            assert torch.equal(replayed_exits(table, one)[0], replayed_exits(scaled, other)[0])


@version_independent
@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("telling", [True, False])
def test_no_model_that_is_cut_off_is_cheaper_and_as_right(policy, telling):
    table = synthetic(600)
    if not telling:  # how sure an exit is has nothing to do with whether it is right
        right = torch.rand(4, 600, generator=generator(1)) < torch.tensor([[0.4], [0.8], [0.79], [0.8]])
        answers = torch.where(right, table.labels, (table.labels + 1) % 5)
        scale = 1 + 3 * torch.rand(4, 600, 1, generator=generator(2))
        table = replace(table, logits=torch.nn.functional.one_hot(answers, 5) * scale)
    found = [{"name": "never"}, *candidates(table, COSTS, policy, (1.0,) * 4)]
    reached = [consequences(table, *replayed_exits(table, settings), COSTS) for settings in found]
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
    _, tested = split_table(table if labels else table.without_labels())
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
    assert (found.bound, found.samples_tested, found.guaranteed_drop) == ("none", 400, None)
    assert "no guarantee: point estimate on 400 samples" in found.as_text()
    with pytest.warns(DeprecationWarning, match="samples_tested"):
        assert found.n == 400


@version_independent
def test_every_built_in_policy_can_be_calibrated():
    of_classes = {name for name, policy in POLICIES.items() if policy.problem_type != "multi_label_classification"}
    assert set(SEARCHES) == of_classes - {"never"}


@version_independent
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_candidates_are_a_frontier_nowhere_worse_than_one_threshold(policy):
    table = synthetic(500)
    found = candidates(table, COSTS, policy, (1.0,) * 4)
    costs, drops = zip(*(predicted(table, settings) for settings in found), strict=True)
    if policy not in ("confidence", "margin", "entropy"):  # these are judged by cross-fitting too
        assert [*costs] == sorted(set(costs), reverse=True) and [*drops] == sorted(set(drops)) and len(found) > 1
    if policy in ("confidence", "margin", "entropy"):
        curve = uniform_thresholds(confidence_scores(table, policy, (1.0,) * 4).numpy(), RANGES[policy])
        sign = -1 if policy == "entropy" else 1
        curve = [{"name": policy, "threshold": (sign * cut).tolist()} for cut in curve]
        assert len(curve) > 50
    elif policy == "confidence_entropy":
        cuts = np.unique([settings["threshold"] for settings in found])
        more = {"entropy_threshold": found[0]["entropy_threshold"]}
        curve = [{"name": policy, "threshold": cut, **more} for cut in cuts[cuts < 1].tolist()]
    else:
        more = {"threshold": found[0]["threshold"]} if policy == "patience_confidence" else {}
        curve = [{"name": policy, "patience": patience, **more} for patience in (1, 2, 3)]
    for settings in curve:
        cost, drop = predicted(table, settings)
        within = [one for one, other in zip(costs, drops, strict=True) if other <= drop]
        # the full model is a candidate of its own, safer than any
        assert min([COSTS.backbone, *within]) <= cost


@version_independent
@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "confidence_entropy", "patience_confidence"])
def test_no_row_lies_on_a_threshold(policy):
    """A model and its export differ by a bit: a row on a threshold would leave one of them earlier."""
    table, temperatures = synthetic(300), (1.0,) * 4
    found = [entry.settings for entry in SEARCHES[policy](table, COSTS, policy, temperatures, True)]
    assert len(found) > 8
    judged_by = {"confidence_entropy": "confidence", "patience_confidence": "entropy"}.get(policy, policy)
    cuts = [(judged_by, number) for settings in found for number in np.ravel(settings["threshold"]).tolist()]
    if policy == "confidence_entropy":
        cuts += [("entropy", settings["entropy_threshold"]) for settings in found]
    for name, number in cuts:
        scores, cut = (
            confidence_scores(table, name, temperatures).numpy(),
            np.float32(-number if name == "entropy" else number),
        )
        if cut in scores and cut not in RANGES[name]:  # between neighbours in float32 there is no number
            assert scores[scores > cut].min(initial=RANGES[name][1]) == np.nextafter(cut, np.float32(np.inf))


@version_independent
def test_nothing_provable_runs_the_full_model():
    table = synthetic(400)
    wrong = table.logits.roll(1, -1)
    table = replace(table, logits=torch.cat([wrong[:-1], 9 * table.logits[-1:]]))
    found = calibrate(table, max_accuracy_drop=0.05, delta=0.1)
    assert found.exits == () and found.mean_macs == pytest.approx(COSTS.backbone)
    assert found.accuracy == found.full_accuracy and found.policy == {"name": "never"}
    assert "none: the full model answers" in found.as_text() and "with probability 0.9" in found.as_text()


@version_independent
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(number):
    table = synthetic(50)
    table.logits[1, 3, 0] = number
    with pytest.raises(ValueError, match="1 of 50 samples have NaN or infinite logits"):
        calibrate(table, max_accuracy_drop=0.05)


@version_independent
@pytest.mark.parametrize("label", [-100, 5])
def test_labels_that_are_no_class(label):
    table = synthetic(50)
    table.labels[7] = label
    with pytest.raises(ValueError, match=f"labels: {label} is none of the 5 classes"):
        calibrate(table, max_accuracy_drop=0.05)


@version_independent
def test_order_of_rows_does_not_matter():
    table = synthetic(400)
    shuffled = table.select(torch.randperm(400, generator=generator(5)))
    first, second = (calibrate(rows, max_accuracy_drop=0.02) for rows in (table, shuffled))
    assert first == second and len(first.frontier) > 8


def test_budgets():
    table = synthetic(800)
    fast = calibrate(table, min_speedup=1.8)
    assert COSTS.backbone / fast.mean_macs >= 1.8
    assert calibrate(table, max_macs=COSTS.backbone / 1.8) == fast
    both = calibrate(table, min_speedup=1.2, max_accuracy_drop=0.05)
    assert COSTS.backbone / both.mean_macs >= 1.2 and both.full_accuracy - both.accuracy <= 0.05 + 1e-9


@version_independent
@pytest.mark.parametrize("rows", [788, 1662])
def test_halves_are_random_whatever_the_rows_are_like(rows):
    """Hard rows have the larger logits, and many rows are alike: neither half gets more of the hard ones."""
    hard_share, drawn = 0.1, []
    numbers = generator()
    for _ in range(200):
        hard = torch.rand(rows, generator=numbers) < hard_share
        size = torch.where(hard, 9.0, torch.randint(1, 4, (rows,), generator=numbers).float())
        logits = torch.stack([size, -size / 2], -1).expand(3, rows, 2)
        _, tested = split_table(ExitTable(logits, hard.long(), [1, 2, 3]))
        drawn.append(tested.labels.sum().item() - hard.sum().item() / 2)
    spread = math.sqrt(rows * hard_share * (1 - hard_share)) / 2
    assert abs(np.mean(drawn)) < 4 * spread / 10 and 0.7 < np.std(drawn) / spread < 1.4


def rows_of(table):
    return [
        [label, *row]
        for label, row in zip(table.labels.tolist(), table.logits.swapaxes(0, 1).flatten(1).tolist(), strict=True)
    ]


@version_independent
def test_the_search_never_sees_the_rows_that_are_tested_on(monkeypatch):
    table, seen = synthetic(300), []
    monkeypatch.setattr(
        "lgvit_hf.evaluation.calibration.candidates", lambda rows, *rest: seen.append(rows) or candidates(rows, *rest)
    )
    found = calibrate(table, max_accuracy_drop=0.05, delta=0.1)
    searched, tested = split_table(table)
    assert len(seen) == 1 and torch.equal(seen[0].logits, searched.logits)
    assert found.samples_tested == len(tested) == 150
    assert sorted(rows_of(searched) + rows_of(tested)) == sorted(rows_of(table))


@version_independent
def test_tested_must_be_other_rows_of_the_same_model():
    table = synthetic(300)
    with pytest.raises(ValueError, match="300 of the 300 samples to test on are in the table that is searched on"):
        calibrate(table, max_accuracy_drop=0.05, delta=0.1, tested=table)
    with pytest.raises(ValueError, match=r"tested is a table of another model: depths \[1, 2, 3, 4, 5\]"):
        five = replace(synthetic(300, exits=5), costs=Costs([1.0] * 5, [1.0] * 5))
        calibrate(table, max_accuracy_drop=0.05, tested=five)
    with pytest.raises(ValueError, match="another model: weights"):
        calibrate(table, max_accuracy_drop=0.05, tested=replace(synthetic(300, seed=1), weights="other"))
    with pytest.raises(ValueError, match="tested is a table of 7 classes, not 5"):
        calibrate(table, max_accuracy_drop=0.05, tested=synthetic(300, seed=1, classes=7))


@version_independent
@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "patience", "patience_confidence"])
def test_all_exits_stay_on_where_none_may_be_switched_off(policy):
    table = replace(synthetic(400), costs=Costs(COSTS.backbone_costs, [1.5, 1.5, 1.5, 0.1]))
    found = candidates(table, table.costs, policy, (1.0,) * 4, choose_exits=False)
    deepest = 0
    for settings in found:
        left, evaluated = replayed_exits(table, settings)
        reached = [index for index in range(3) if (left >= index).any()]
        assert set(reached) <= set(evaluated), settings
        deepest = max(deepest, len(reached))
    assert deepest == 3


@version_independent
@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "patience"])
def test_exits_behind_one_where_all_leave_are_off(policy):
    left, evaluated = replayed_exits(synthetic(400), candidates(synthetic(400), COSTS, policy, (1.0,) * 4)[-1])
    assert evaluated == [0] and not left.any()


@version_independent
def test_two_neighbouring_scores_are_told_apart():
    # half way is rounded to the upper of the one pair, to the lower of the other
    half = np.float32(0.5)
    for upper in (half, np.nextafter(half, np.float32(1)), np.nextafter(half, np.float32(0))):
        close = np.nextafter(upper, np.float32(0))
        confidence_scores, right = (
            np.array([[upper, close, 0.25]], np.float32),
            np.array([[True, False, False], [True] * 3]),
        )
        (cut,) = search(confidence_scores, right, Costs([1.0, 9.0], [0.0, 0.0]), 100.0, (0.0, 1.0))
        assert (confidence_scores[0] > cut).tolist() == [True, False, False]


@version_independent
def test_a_head_that_is_off_is_not_paid_for():
    """Leaving at the first exit loses 9.5 where going on costs 9; with the second head, never worth it, 14."""
    confidence_scores, right = np.array([[0.5], [0.5]], np.float32), np.array([[False], [False], [True]])
    found = search(confidence_scores, right, Costs([1.0, 4.0, 5.0], [0.0, 5.0, 0.0]), 9.5, (0.0, 1.0))
    assert found.tolist() == [1.0, 1.0]


@version_independent
def test_two_tables_search_on_all_of_the_first(monkeypatch):
    table, other, seen = synthetic(400), synthetic(300, seed=1), []
    monkeypatch.setattr(calibration, "candidates", lambda rows, *rest: seen.append(rows) or candidates(rows, *rest))
    found = calibrate(table, max_accuracy_drop=0.1, delta=0.1, tested=other)
    assert len(seen) == 1 and sorted(rows_of(seen[0])) == sorted(rows_of(table))
    answers = other.replay(found.policy).logits.argmax(-1)
    assert found.samples_tested == 300
    assert found.accuracy == pytest.approx((answers == other.labels).float().mean().item())
    assert found.full_accuracy == pytest.approx(other.accuracies()[-1]) and found.mean_macs < COSTS.backbone


@version_independent
@pytest.mark.parametrize("policy", [*SEARCHES, "auto"])
def test_what_is_proven_differs_in_one_number(policy):
    """Along the sequence each sample exits earlier, or where it did, so that few tests fail by chance alone."""
    table = synthetic(400, seed=3)
    found = candidates(table, COSTS, policy, (1.0,) * 4, True, 0.1)
    exits = torch.stack([replayed_exits(table, settings)[0] for settings in found])
    assert {settings["name"] for settings in found} == {found[0]["name"]} and len(found) > 1
    assert (exits.diff(dim=0) <= 0).all()


@version_independent
def test_another_path_must_be_clearly_cheaper_than_one_threshold_for_all_exits():
    def path(name, exits, *points):
        return [Measured(cost, drop, {"name": name, "cost": cost}, (exits,)) for cost, drop in points]

    usual = path("confidence", (0, 1), (9.0, 0.0), (8.0, 0.01), (4.0, 0.05))
    level = path("margin", (0, 1), (1.0, 0.02), (7.7, 0.01))
    cheaper = path("confidence", (1,), (7.1, 0.01), (7.1, 0.01), (1.0, 0.03))
    apart = [Measured(2.0, 0.0, {"name": "confidence"})]
    every = usual + level + cheaper + apart

    def chosen(measured, limit, name):
        return [(one["name"], one["cost"]) for one in searching.of_one_path(measured, limit, name, 2)]

    expected = [("confidence", 9.0), ("confidence", 8.0), ("confidence", 4.0)]
    assert chosen(usual + level + apart, 0.01, "confidence") == expected
    assert chosen(every, 0.01, "confidence") == [("confidence", 7.1), ("confidence", 1.0)]
    assert chosen(every, 0.01, "margin") == [("margin", 7.7), ("margin", 1.0)]
    # what nothing keeps to is the usual one's
    assert chosen(every, -0.1, "confidence") == expected


@version_independent
def test_promises_are_kept(monkeypatch):
    """Of the drop and of the harm; both are tested on the same candidates, searched for once."""
    truth, splits, delta = synthetic(20_000, seed=99, exits=3, classes=3), 100, 0.1
    truth = replace(truth, costs=Costs([3.0] * 3, [0.2, 0.3, 0.1]))
    broken, gained = {"drop": 0, "harm": 0}, {"drop": 0, "harm": 0}
    full = truth.logits[-1].argmax(-1) == truth.labels
    for seed in range(splits):
        sample, kept = truth.select(torch.randperm(len(truth), generator=generator(seed))[:600]), []
        monkeypatch.setattr(
            calibration, "candidates", lambda *given, kept=kept: kept or kept.extend(candidates(*given)) or kept
        )
        for bound in broken:
            found = calibrate(sample, max_accuracy_drop=0.05, delta=delta, bound=bound, temperature=False)
            early = truth.replay(found.policy).logits.argmax(-1) == truth.labels
            drop = (full & ~early).float().mean() if bound == "harm" else full.float().mean() - early.float().mean()
            broken[bound] += drop.item() > 0.05
            gained[bound] += found.mean_macs < truth.costs.backbone
    assert max(broken.values()) / splits <= delta + 3 * math.sqrt(delta * (1 - delta) / splits), broken
    assert min(gained.values()) > splits / 2, gained


# -- without labels --------------------------------------------------------------------------------------------


@version_independent
@pytest.mark.parametrize("policy", ["confidence", "patience"])
def test_expected_drop_is_the_mean_of_the_full_model_s_probabilities(policy):
    table = synthetic(400)
    found = calibrate(table, policy=policy, max_accuracy_drop=0.05, labels="expected")
    _, tested = split_table(table.without_labels())
    chances, answers = softmax(tested.logits[-1].numpy(), -1), tested.replay(found.policy).logits.argmax(-1).numpy()
    rows = range(len(tested))
    full, early = chances.max(-1).mean(), chances[rows, answers].mean()
    assert (found.full_accuracy, found.accuracy) == pytest.approx((full, early), abs=1e-6)
    assert full - early <= 0.05 and found.mean_macs < found.full_macs and found.bound == "none"
    # the labels that the table has do not matter, and the final classifier needs no temperature of its own
    other = replace(table, labels=(table.labels + 1) % 5)
    assert calibrate(other, policy=policy, max_accuracy_drop=0.05, labels="expected") == found
    assert found.temperatures[-1] == pytest.approx(1, abs=1e-3)
    # its probabilities are what is expected of it
    assert found.calibration_errors[-1]["before"] == pytest.approx(0, abs=1e-6)


# -- measured costs -------------------------------------------------------------------------------------------


def test_costs_are_the_mean_of_one_image_and_of_all(monkeypatch):
    """By a clock of our own: what is timed is each segment's blocks and its head, on one image and on all."""
    model, calls = tiny_model("vit", exit_positions=[2, 4], exit_types="linear"), []
    model.set_exit_policy("confidence", threshold=0.5)
    pixels = tiny_images(5)

    def clock(segments, state, policy):
        size = state.batch_size
        calls.append(size)
        walked = time_parts(segments, state, policy)
        assert [len(part) for part in (walked.blocks, walked.heads, walked.select)] == [3, 3, 3]
        # no sample exits: the head and a policy are evaluated all the same
        assert policy.name == "confidence" and policy.threshold == 1.0
        # the median counts; the second batch size takes twice as long
        factor = [0.0, 1.0 if size == 1 else 2.0, 9.0][calls.count(size) % 3]
        times = PartTimes([[3.0, 1.0], [2.0], [2.0]], [1.0, 3.0 if size == 1 else 1.0, 2.0], [5.0, 0.0, 0.0])
        return times.scaled(factor)

    monkeypatch.setattr(cost_tables, "time_parts", clock)
    costs = cost_tables.measured_costs(model, pixels, repeats=3)
    assert costs.backbone_costs == pytest.approx([0.4, 0.2, 0.2]) and costs.heads == pytest.approx([0.1, 0.2, 0.2])
    assert costs.backbone == pytest.approx(1)
    assert calls.count(1) == calls.count(5) == len(calls) / 2 == 5
    assert Costs([4.0, 2.0, 2.0], [1.0, 3.0, 2.0]).relative() == Costs([0.4, 0.2, 0.2], [0.1, 0.3, 0.2])


# -- what cannot be calibrated ---------------------------------------------------------------------------------


@version_independent
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "nothing is asked"),
        ({"max_macs": 0.5}, "max_macs=0.5 is out of reach: the least is 3.2 MACs, a speed-up of 3.78"),
        ({"max_accuracy_drop": 0.0, "min_speedup": 3.7}, "out of reach within max_accuracy_drop=0"),
        ({"max_latency": 1.0}, "max_latency needs measured times.*--cost-table"),
        ({"min_speedup": 1.5, "delta": 0.1}, "needs a max_accuracy_drop"),
        ({"max_accuracy_drop": 0.01, "delta": 0.05, "bound": "harm"}, r"at least 299 are needed \(a table of 598"),
        ({"max_accuracy_drop": 0.1, "delta": 0.05, "labels": "expected"}, "point estimates, which guarantee nothing"),
        ({"max_accuracy_drop": 0.1, "labels": "guessed"}, "labels='guessed' must be True, False or 'expected'"),
        ({"max_accuracy_drop": 1.5}, "from 0 to 1"),
        ({"max_accuracy_drop": 0.01, "policy": "never"}, "calibrate knows the policies auto.*confidence.*not 'never'"),
    ],
)
def test_targets_that_cannot_be(wanted, message):
    with pytest.raises(ValueError, match=message):
        calibrate(synthetic(400), **wanted)


@version_independent
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (replace(synthetic(20), costs=None), "the table has no costs"),
        (replace(synthetic(20), costs=Costs([1.0], [1.0])), "costs are of 1 segments and 1 heads, the table of 4"),
        (synthetic(1), "1 samples are too few"),
        (synthetic(20, exits=1), "final classifier only"),
    ],
)
def test_tables_that_cannot_be(table, message):
    with pytest.raises(ValueError, match=message):
        calibrate(table, max_accuracy_drop=0.1)
