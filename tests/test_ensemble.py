"""The running ensemble: against a loop over single samples, in models and tables, and its fit against scipy's own."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from lgvit_hf import ExitTable, collect, fit_ensemble
from lgvit_hf.engine import replay, run_early
from lgvit_hf.ensemble import Ensemble, EnsemblePolicy, build_ensemble, with_ensemble
from lgvit_hf.evaluation.calibration import calibrate, split_table
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.gate_fitting import fit_gate, gate_features
from lgvit_hf.evaluation.predictions import consequences, replayed_exits
from lgvit_hf.evaluation.search import SEARCHES
from lgvit_hf.evaluation.timing import time_parts
from lgvit_hf.hub.card import _check, card
from lgvit_hf.hub.to_lgvit import lgvit_settings
from lgvit_hf.policies import build_policy
from lgvit_hf.serving.open_part import open_part
from lgvit_hf.serving.split import run_chain
from tests.gates import typical_models
from tests.seeds import generator
from tests.test_engine import (
    DEPTHS,
    LOGITS,
    NUM_EXITS,
    NUM_LABELS,
    NUM_ROWS,
    Recorded,
    assert_same,
    rows_state,
    taken,
)
from tests.tiny import tiny_config, tiny_images, tiny_model
from tests.wrapped import plain, wrapped

WEIGHTS = [depth**2 for depth in DEPTHS]
BIAS = [0.3, -0.2, 0.0, 0.1]
EVERY = {"weights": WEIGHTS, "bias": BIAS}
POLICIES = [
    {"name": "confidence", "threshold": 0.6},
    {"name": "confidence", "threshold": [0.9, 1.0, 0.7, 1.0, 0.5], "temperature": 0.8},
    {"name": "entropy", "threshold": 0.7},
    {"name": "patience", "patience": 2},
    {"name": "patience", "patience": 2, "exits": [1, 3, 4]},
    {"name": "patience_confidence", "threshold": 0.9, "patience": 2},
    {"name": "fixed", "exit_index": 2},
    {"name": "never"},
    {
        "name": "gate",
        "threshold": 0.8,
        "models": typical_models(3),
        "exits": [0, 2, 3],
        "num_labels": NUM_LABELS,
    },
]


def ensembled(settings, ensemble=EVERY):
    return EnsemblePolicy(build_policy(settings, NUM_EXITS), build_ensemble(ensemble, len(DEPTHS), NUM_LABELS))


def mean_of(evaluated, row, weights=WEIGHTS, bias=BIAS):
    """By hand: the ensemble of some exits of one sample, the last one's own logits if nothing is known."""
    known = [index for index in evaluated if np.isfinite(log_softmax(LOGITS[index, row].double().numpy())).all()]
    if not sum(weights[index] for index in known):
        return LOGITS[evaluated[-1], row].double().numpy()
    log_probs = np.stack([log_softmax(LOGITS[index, row].double().numpy()) for index in known])
    return np.average(log_probs, axis=0, weights=[weights[index] for index in known]) + bias


def one_after_the_other(settings, rows, min_depth=None, max_depth=None):
    """Each sample on its own: the plain policy on logits that were averaged by hand."""
    policy = build_policy(settings, NUM_EXITS)
    last = max(index for index, depth in enumerate(DEPTHS) if max_depth is None or depth <= max_depth)
    for row in rows:
        memory, evaluated = policy.start(1, "cpu"), []
        for index in range(last + 1):
            if index < last and (DEPTHS[index] < (min_depth or 0) or policy.skips(index)):
                continue
            evaluated.append(index)
            answer = torch.tensor(mean_of(evaluated, row))[None].float()
            exits, memory = policy(answer, memory, index)
            if index == last or (exits.item() and not LOGITS[index, row].isnan().any()):
                yield answer[0], index, memory["score"].item()
                break


@pytest.mark.parametrize("settings", POLICIES, ids=lambda settings: settings["name"])
@pytest.mark.parametrize("bounds", [{}, {"min_depth": 4, "max_depth": 8}], ids=["all", "bounded"])
def test_answers_are_those_of_the_exits_evaluated_so_far(settings, bounds):
    rows = torch.arange(0, NUM_ROWS, 13)
    found = run_early(Recorded().segments(), rows_state(rows), ensembled(settings), **bounds)
    logits, exits, scores = zip(*one_after_the_other(settings, rows.tolist(), **bounds), strict=True)
    # rounding decides where a score lies on the threshold
    same = found.exit_index == torch.tensor(exits)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(found.logits[same], torch.stack(logits)[same], rtol=0, atol=1e-4, equal_nan=True)
    expected = torch.tensor(scores)[same]
    if not settings["name"].startswith("patience"):
        torch.testing.assert_close(found.exit_score[same], expected, rtol=0, atol=1e-3, equal_nan=True)
    assert bounds or len(found.exit_index.unique()) > 1 or settings["name"] in ("fixed", "never")


@pytest.mark.parametrize("settings", POLICIES, ids=lambda settings: settings["name"])
def test_the_law_of_early_exit(settings):
    policy, numbers = ensembled(settings), generator(11)
    whole = replay(LOGITS.unbind(), DEPTHS, policy)
    order = torch.randperm(NUM_ROWS, generator=numbers)
    assert_same(taken(whole, order), run_early(Recorded().segments(), rows_state(order), policy))
    for row in torch.randint(NUM_ROWS, (20,), generator=numbers).tolist():
        assert_same(taken(whole, [row]), run_early(Recorded().segments(), rows_state([row]), policy))


def test_an_exit_without_probabilities_is_left_out():
    never_sure = {"name": "confidence", "threshold": [0.0] * NUM_EXITS}
    logits = torch.zeros(len(DEPTHS), 4, NUM_LABELS)
    logits[:, :, 0] = 1.0
    logits[:, 0] = math.nan
    logits[:3, 1, 2] = math.nan
    logits[0, 2, 1] = math.inf
    logits[1, 3, 3] = math.nan
    found = replay(logits.unbind(), DEPTHS, ensembled(never_sure))
    assert found.exit_index.tolist() == [NUM_EXITS, 3, 1, 0]
    assert found.logits[0].isnan().all() and found.logits[1:].isfinite().all()
    clean = torch.log_softmax(torch.tensor([1.0, 0.0, 0.0, 0.0]), -1) + torch.tensor(BIAS)
    torch.testing.assert_close(found.logits[1:], clean.expand(3, -1))
    # the final classifier may be left out, too
    logits[-1] = math.nan
    last = replay(logits.unbind(), DEPTHS, ensembled({"name": "confidence", "threshold": 0.99}))
    assert last.exit_index.tolist() == [NUM_EXITS] * 4
    torch.testing.assert_close(last.logits[1:], clean.expand(3, -1))


def test_huge_logits_and_weights_stay_finite():
    logits = torch.tensor([[3e38, -3e38], [-3e38, 3e38], [-math.inf, 0.0], [0.0, -math.inf]])[:, None]
    ensemble = Ensemble([1e30, 1e-30, 5e29, 1e30], [0.0, 0.0])
    memory = ensemble.start(1, "cpu")
    for index, one in enumerate(logits):
        answer, known, memory = ensemble.combine(one, memory, index)
        assert known.all() and answer.isfinite().all()
    assert answer.argmax().item() == 0  # two exits of the larger weights


def test_exits_without_a_weight_answer_for_themselves():
    ensemble, settings = {"weights": [0, 0, 0, 1, 0, 1], "bias": BIAS}, {"name": "confidence", "threshold": 0.6}
    without = replay(LOGITS.unbind(), DEPTHS, build_policy(settings, NUM_EXITS))
    found = replay(LOGITS.unbind(), DEPTHS, ensembled(settings, ensemble))
    early = found.exit_index < 3
    assert early.any() and torch.equal(early, without.exit_index < 3)
    assert torch.equal(found.logits[early], without.logits[early])


@pytest.mark.parametrize(
    ("ensemble", "message"),
    [
        ({"weights": [1, 2, 3], "bias": [0] * 5}, "weights of 3 exits, the final classifier counted, but there are 5"),
        ({"weights": [1] * 5, "bias": [0] * 4}, "bias of 4 classes, but there are 5"),
        ({"weights": [1] * 5}, "must be a dict with the lists weights and bias"),
        ({"weights": [1] * 5, "bias": [0] * 5, "power": 2}, "must be a dict with the lists weights and bias"),
        ([1, 2], "must be a dict"),
        ({"weights": [1, 1, 1, 1, -1], "bias": [0] * 5}, "must be 0 or more, and not all 0"),
        ({"weights": [0] * 5, "bias": [0] * 5}, "must be 0 or more, and not all 0"),
        ({"weights": [1, 1, 1, 1, math.nan], "bias": [0] * 5}, "weights=.* must be a list of finite numbers"),
        ({"weights": [1] * 5, "bias": [math.inf] * 5}, "bias=.* must be a list of finite numbers"),
        ({"weights": [True] * 5, "bias": [0] * 5}, "weights=.* must be a list of finite numbers"),
        ({"weights": "11111", "bias": [0] * 5}, "weights='11111' must be a list of finite numbers"),
    ],
)
def test_ensembles_that_do_not_fit(ensemble, message):
    with pytest.raises(ValueError, match=f"exit_ensemble: .*{message}"):
        tiny_config("vit", exit_ensemble=ensemble)


def test_an_ensemble_is_of_answers_with_one_label():
    with pytest.raises(ValueError, match="answers of one label.*multi_label_classification"):
        config = tiny_config("vit", problem_type="multi_label_classification")
        config.exit_ensemble = {"weights": [1] * 5, "bias": [0] * 5}
        config.validate_exits()


def random_ensemble(num_exits, num_labels=5, number=0):
    numbers = generator(41 + number)
    weights = torch.rand(num_exits, generator=numbers, dtype=torch.float64) + 0.1
    return {"weights": weights.tolist(), "bias": torch.randn(num_labels, generator=numbers).tolist()}


def assert_alike(answers, other):
    """Of a model run twice, whose products round as memory lies."""
    assert torch.equal(answers.exit_index, other.exit_index)
    torch.testing.assert_close(answers.logits, other.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.exit_score, other.exit_score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "wrapped"])
@torch.no_grad()
def test_a_model_answers_alike_batched_alone_and_replayed(kind, tmp_path):
    model = wrapped("vgg") if kind == "wrapped" else tiny_model(kind, exit_types="linear")
    num_exits = len(model.config.exit_positions) + 1
    images = tiny_images(12, 32 if kind == "wrapped" else 16)
    rows = [{"pixel_values": image, "labels": 0} for image in images]
    everything = model(images, early_exit=False)
    scores = torch.stack(everything.exit_logits[:-1]).softmax(-1).amax(-1)
    # half way between two samples, so that rounding decides nothing
    middles = scores.sort(-1).values[:, 5:7].mean(-1)
    model.set_exit_policy("confidence", threshold=middles.tolist())
    before = model(images)

    model.config.exit_ensemble = random_ensemble(num_exits, model.config.num_labels)
    found, table = model(images), collect(model, rows)
    replayed = table.replay(model.exit_policy)
    assert_alike(found, replayed)
    for index, image in enumerate(images):
        alone = model(image[None])
        assert alone.exit_index.item() == found.exit_index[index].item()
        torch.testing.assert_close(alone.logits[0], found.logits[index], atol=1e-4, rtol=0)
    again = model(images, early_exit=False)
    assert torch.equal(again.logits, everything.logits) and again.exit_logits[0].equal(everything.exit_logits[0])
    assert table.accuracies() == replace(table, ensemble=None).accuracies()

    model.save_pretrained(tmp_path / "model")
    module = {"module": plain("vgg")[0]} if kind == "wrapped" else {}
    assert_alike(found, type(model).from_pretrained(tmp_path / "model", **module).eval()(images))
    table.save(tmp_path / "table.safetensors")
    assert_same(replayed, ExitTable.load(tmp_path / "table.safetensors").replay(model.exit_policy))
    model.config.exit_ensemble = None
    assert_alike(before, model(images))


def test_a_change_of_the_config_is_checked_when_it_runs():
    model = tiny_model("vit")
    model.config.exit_ensemble = {"weights": [1, 2], "bias": [0] * 5}
    with pytest.raises(ValueError, match="exit_ensemble: weights of 2 exits"):
        model(tiny_images(2))


def test_a_truncated_model_has_none():
    model = tiny_model("vit", exit_ensemble=random_ensemble(5))
    assert model.truncate(1).config.exit_ensemble is None


@pytest.mark.parametrize("place", ["evaluate", "benchmark"])
def test_a_card_is_of_the_ensemble_of_the_reports(place):
    config = tiny_config("vit", exit_ensemble=random_ensemble(5))
    made = {"policy": config.exit_policy, "ensemble": config.exit_ensemble}
    exits = [{"exit_layer": depth} for depth in (*config.exit_positions, config.num_blocks)]
    report = {"what": f"lgvit {place}", "exits": exits} | (made if place == "evaluate" else {"environment": made})
    _check(report, config, "a report")
    made["ensemble"] = None
    with pytest.raises(ValueError, match="a report was made with the ensemble None, and the config says"):
        _check({**report, **(made if place == "evaluate" else {})}, config, "a report")
    assert "weighted mean of the log-probabilities" in card(config, name="me/vit").text
    with pytest.raises(ValueError, match="exit_ensemble: LGViT's exits answer alone"):
        lgvit_settings(tiny_config("vit", exit_types="linear", exit_ensemble=random_ensemble(5)))


def test_cost_tables_time_the_ensemble_at_every_exit(monkeypatch):
    counted, combine = [], Ensemble.combine
    monkeypatch.setattr(Ensemble, "combine", lambda *given: counted.append(given[-1]) or combine(*given))
    time_parts(Recorded().segments(), rows_state(torch.arange(20, 40)), ensembled(POLICIES[0]))
    assert counted == list(range(len(DEPTHS)))


def test_what_a_policy_sees_depends_on_the_exits_evaluated():
    table = ExitTable(LOGITS[:, 21:29], torch.zeros(8, dtype=torch.long), DEPTHS, ensemble=EVERY)
    seen = table.policy_logits([1, 4])
    for index, evaluated in [(1, [1]), (4, [1, 4]), (5, [1, 4, 5])]:
        expected = np.stack([mean_of(evaluated, row) for row in range(21, 29)])
        np.testing.assert_allclose(seen[index].numpy(), expected, atol=1e-5)
    kept = table.with_exits([1, 4])
    torch.testing.assert_close(kept.policy_logits(), seen[[1, 4, 5]])
    assert replace(table, ensemble={"weights": [1, 0, 0, 0, 0, 0], "bias": BIAS}).with_exits([1]).ensemble is None


def fitting_table(number, num_exits=4, num_samples=300, num_labels=3):
    numbers = generator(51 + number)
    labels = torch.randint(num_labels, (num_samples,), generator=numbers)
    noise = torch.randn(num_exits, num_samples, num_labels, generator=numbers)
    signal = torch.nn.functional.one_hot(labels, num_labels) * torch.linspace(0.5, 2.0, num_exits)[:, None, None]
    return ExitTable(signal + noise + torch.tensor([0.3, 0.0, -0.3]), labels, [2, 3, 5, 8])


def loss_of(table, weights, bias):
    """By hand, with softmax of scipy."""
    losses = []
    log_probs = log_softmax(table.logits.double().numpy(), axis=-1)
    for last in range(len(weights)):
        mean = np.tensordot(weights[: last + 1], log_probs[: last + 1], 1) / weights[: last + 1].sum() + bias
        losses.append(-log_softmax(mean, axis=-1)[np.arange(len(table)), table.labels.numpy()].mean())
    return np.mean(losses) + 1e-4 * (bias**2).sum()


@pytest.mark.parametrize("number", range(3))
def test_the_optimum_is_that_of_a_general_purpose_optimiser(number):
    table = fitting_table(number)
    found = fit_ensemble(table)
    weights, bias = np.array(found["weights"]), np.array(found["bias"])

    def loss(numbers):  # weights by softplus, as in Zero Time Waste
        return loss_of(table, np.logaddexp(0, numbers[:4]), numbers[4:])

    starts = (np.zeros(7), np.append(np.arange(4.0), np.zeros(3)))
    options = {"ftol": 1e-13, "maxiter": 500}
    best = min((minimize(loss, start, method="SLSQP", options=options) for start in starts), key=lambda each: each.fun)
    assert loss_of(table, weights, bias) <= best.fun + 1e-6
    theirs = np.logaddexp(0, best.x[:4])
    np.testing.assert_allclose(weights, theirs / theirs.sum(), atol=1e-3)
    np.testing.assert_allclose(softmax(bias), softmax(best.x[4:]), atol=1e-3)
    assert abs(weights.sum() - 1) < 1e-6 and abs(bias.sum()) < 1e-4


def test_a_fit_is_no_worse_than_its_start_and_builds():
    table = fitting_table(7)
    found = fit_ensemble(table)
    start = np.array(table.depths, dtype=float) ** 2
    assert loss_of(table, np.array(found["weights"]), np.array(found["bias"])) <= loss_of(table, start, np.zeros(3))
    build_ensemble(found, 4, 3)
    assert found == fit_ensemble(replace(table, ensemble=found))


def test_fits_to_probabilities_and_to_extreme_tables():
    table = fitting_table(8)
    soft = fit_ensemble(table.expected())
    assert np.isfinite(soft["weights"]).all()
    # one class alone, and exits that are always right
    for labels in (torch.zeros(300, dtype=torch.long), table.logits[-1].argmax(-1)):
        found = fit_ensemble(ExitTable(table.logits, labels, table.depths))
        build_ensemble(found, 4, 3)
        assert max(map(abs, found["bias"])) < 20


def test_samples_that_nothing_is_fitted_to():
    table = fitting_table(9)
    with pytest.raises(ValueError, match="there are no samples"):
        fit_ensemble(table.select(torch.arange(0)))
    table.logits[1, 5, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 300 samples have NaN"):
        fit_ensemble(table)


def calibration_table(number=0, num_samples=600):
    table = fitting_table(number, num_samples=num_samples)
    return replace(table, costs=Costs([2.0, 1.0, 2.0, 3.0], [0.1] * 4))


@pytest.mark.parametrize("policy", ["confidence", "entropy", "gate", "patience", "calibrated_confidence", "auto"])
def test_calibration_measures_what_the_ensemble_answers(policy):
    table = replace(calibration_table(), ensemble={"weights": [4, 9, 25, 64], "bias": [0.0, 0.0, 0.0]})
    report = calibrate(table, policy=policy, max_accuracy_drop=0.03)
    assert report.ensemble == table.ensemble and report.mean_macs < report.full_macs
    tested = split_table(table)[1]
    for rung in (report.frontier[0], report.frontier[-1], {"policy": report.policy, "accuracy": report.accuracy}):
        found = tested.replay(rung["policy"]).logits.argmax(-1) == tested.labels
        assert rung["accuracy"] == pytest.approx(found.double().mean().item())
    assert report.full_accuracy == pytest.approx(tested.right[-1].double().mean().item())
    assert report.accuracy >= report.full_accuracy - 0.03


@pytest.mark.parametrize("policy", ["confidence", "margin", "gate"])
def test_every_candidate_is_searched_with_the_exits_that_it_evaluates(policy):
    table = replace(calibration_table(3), ensemble={"weights": [1, 2, 3, 4], "bias": [0.1, 0.0, -0.1]})
    temperatures = (1.5, 1.0, 0.8, 1.0)
    for cost, drop, settings, *_ in SEARCHES[policy](table, table.known_costs, policy, temperatures, True):
        exits, evaluated = replayed_exits(table, settings)
        again, drops = consequences(table, exits, evaluated, table.known_costs)
        answers = table.replay(settings)
        right = (answers.logits.argmax(-1) == table.labels).double()
        assert drops.double().mean().item() == pytest.approx(table.right[-1].double().mean() - right.mean())
        # of the folds the worse half, so never better than on the samples that it was fitted to
        if policy != "gate":
            assert cost >= again - 1e-9 and drop >= drops.double().mean().item() - 1e-9


def test_a_bias_that_changes_the_final_answers_is_tested_too():
    table = calibration_table(5)
    biased = replace(table, ensemble={"weights": [1, 1, 1, 1], "bias": [9.0, 0.0, 0.0]})
    with pytest.raises(ValueError, match="exit_ensemble: its bias changes the full model's own answers"):
        calibrate(biased, max_accuracy_drop=0.05, delta=0.1)
    with pytest.raises(ValueError, match="exit_ensemble: its bias changes the full model's own answers"):
        calibrate(biased, max_accuracy_drop=0.05)
    fitted = replace(table, ensemble=fit_ensemble(calibration_table(6)))
    assert calibrate(fitted, max_accuracy_drop=0.2, delta=0.1).guaranteed_drop == 0.2


def test_a_table_to_test_on_has_the_same_ensemble():
    with pytest.raises(ValueError, match="tested is a table of another model: ensemble None"):
        table = replace(calibration_table(1), ensemble={"weights": [1] * 4, "bias": [0] * 3})
        calibrate(table, tested=calibration_table(2), max_accuracy_drop=0.1)


def test_the_gate_reads_the_ensemble():
    table = replace(calibration_table(4), ensemble={"weights": [1, 2, 3, 4], "bias": [0.0] * 3})
    gate = fit_gate(table, exits=[0, 2])
    features = gate_features(table, [0, 2], 1.0)
    seen = table.policy_logits([0, 2])
    np.testing.assert_allclose(features[1][:, 0], seen[2].softmax(-1).amax(-1).numpy(), atol=1e-6)
    policy = with_ensemble(build_policy(gate, 3), table.ensemble, 4, 3)
    memory = policy.start(len(table), "cpu")
    for index in (0, 2):
        _, memory = policy(table.logits[index], memory, index)
    alone = build_policy(gate, 3)
    inner = alone.start(len(table), "cpu")
    for index in (0, 2):
        _, inner = alone(seen[index], inner, index)
    torch.testing.assert_close(memory["score"], inner["score"])


@pytest.fixture(scope="module")
def small():
    model = tiny_model("vit", num_hidden_layers=3, exit_positions=[1, 2], exit_types="linear")
    exit_logits = model(tiny_images(32), early_exit=False).exit_logits
    model.config.exit_ensemble = random_ensemble(3)
    ensemble = model.config.exit_ensemble
    table = ExitTable(torch.stack(exit_logits).detach(), torch.zeros(32), [1, 2, 3], ensemble=ensemble)
    medians = table.policy_logits().softmax(-1).amax(-1).median(-1).values
    model.set_exit_policy("confidence", threshold=medians[:2].tolist(), temperature=1.0)
    return model


@pytest.fixture(scope="module")
def traced(small):
    """The segments of the small model in ONNX."""
    pytest.importorskip("onnxruntime")
    from lgvit_hf.export.segment_graphs import export_parts

    return export_parts(small, [0, 1, 2])


@torch.no_grad()
def test_exports_answer_as_the_model(small, traced, tmp_path, monkeypatch):
    from lgvit_hf.export import onnx_export
    from lgvit_hf.runtimes.onnxruntime import ORTHighway
    from lgvit_hf.runtimes.openvino import OVHighway

    images = tiny_images(16, seed=3)
    expected = small(images)
    monkeypatch.setattr(onnx_export, "export_parts", lambda model, exits: traced)
    for layout in ("segments", "single"):
        manifest = onnx_export.export_onnx(small, tmp_path / layout, layout)
        assert manifest.ensemble == small.config.exit_ensemble
        found = ORTHighway.from_pretrained(tmp_path / layout)(images)
        assert torch.equal(found.exit_index, expected.exit_index)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.exit_score, expected.exit_score, atol=1e-4, rtol=0)
    if find_spec("openvino"):
        found = OVHighway.from_pretrained(tmp_path / "single")(images)
        assert torch.equal(found.exit_index, expected.exit_index)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    exported = ORTHighway.from_pretrained(tmp_path / "single")
    exported.set_exit_policy("confidence", threshold=0.5)
    with pytest.raises(
        ValueError, match="exit_policy: exits .1, 2. would be evaluated, and this file has the ensemble"
    ):
        exported.set_exit_policy("confidence", threshold=[1.0, 0.5])
    config = json.loads((tmp_path / "single" / "config.json").read_text())
    config["exit_ensemble"] = None
    (tmp_path / "single" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="exit_ensemble: this file answers with"):
        ORTHighway.from_pretrained(tmp_path / "single")


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
@torch.no_grad()
def test_parts_answer_as_the_model(small, traced, format, tmp_path, monkeypatch):
    monkeypatch.setattr("lgvit_hf.serving.split.export_parts", lambda model, exits: traced)
    images = tiny_images(16, seed=4)
    infos = small.split([1, 2], tmp_path / "parts", format)
    assert infos[0].memory == {"ensemble_sum": [0.0] * 5, "ensemble_weight": 0.0}
    parts = [open_part(tmp_path / "parts" / f"part{index}") for index in range(3)]
    expected, found = small(images), run_chain(parts, {"pixel_values": images.numpy()})
    assert torch.equal(found.exit_index, expected.exit_index)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.exit_score, expected.exit_score, atol=1e-4, rtol=0)


def test_nan_in_an_exported_decision():
    onnxruntime = pytest.importorskip("onnxruntime")
    from lgvit_hf.export.segment_graphs import export_decision

    policy = ensembled({"name": "confidence", "threshold": 0.5})
    decision = export_decision(policy, NUM_LABELS, 1, NUM_EXITS)
    session = onnxruntime.InferenceSession(decision.model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = LOGITS[1, :60].clone()
    logits[20], logits[21, 0], logits[22, 0] = math.nan, math.inf, -math.inf
    _, memory = policy(LOGITS[0, :60], policy.start(60, "cpu"), 0)
    exits, after = policy(logits, memory, 1)
    feeds = {f"{name}_in": memory[name].numpy() for name in decision.memory}
    numbers = {"temperature": np.ones(1, np.float32), "threshold": np.full(1, 0.5, np.float32)}
    names = [entry.name for entry in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"logits": logits.numpy(), **numbers, **feeds}), strict=True))
    assert found["leave"].tolist() == exits.tolist()
    for name in ("answer", "score", "ensemble_sum", "ensemble_weight"):
        given = found[name if name in found else f"{name}_out"]
        np.testing.assert_allclose(given, after[name].numpy(), rtol=1e-5, atol=1e-5)
