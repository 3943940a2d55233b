"""Calibration error, figures of each class, predicted against counted MACs, and the `evaluate.Metric`, by hand."""

import importlib
import json
import sys

import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lgvit_hf import build_policy
from lgvit_hf.engine import Answers
from lgvit_hf.evaluation.costs import Costs, model_macs
from lgvit_hf.evaluation.evaluate_metric import HighwayMetric
from lgvit_hf.evaluation.exit_table import ExitTable, collect
from lgvit_hf.evaluation.metrics import (
    confusion_matrix,
    expected_calibration_error,
    per_class,
    reliability,
    reliability_by_exit,
    summarise,
)
from lgvit_hf.evaluation.report import head_names
from tests.seeds import rng
from tests.test_evaluation import in_a_gap
from tests.tiny import KINDS, NUM_LABELS, tiny_dataset, tiny_images, tiny_model

version_independent = pytest.mark.version_independent

# -- calibration error -----------------------------------------------------------------------------------------


def logits_of(probabilities):
    return torch.tensor(probabilities).log()


@version_independent
def test_reliability_by_hand():
    confidence = torch.tensor([0.25, 0.5, 0.5, 0.625, 1.0])
    right = torch.tensor([True, True, False, False, True])
    empty = {"samples": 0, "confidence": None, "accuracy": None}
    # bins are open below and closed above: (0, 1/4], (1/4, 1/2], (1/2, 3/4], (3/4, 1]
    assert reliability(confidence, right, bins=4) == [
        {"samples": 1, "confidence": 0.25, "accuracy": 1.0},
        {"samples": 2, "confidence": 0.5, "accuracy": 0.5},
        {"samples": 1, "confidence": 0.625, "accuracy": 0.0},
        {"samples": 1, "confidence": 1.0, "accuracy": 1.0},
    ]
    assert reliability(torch.tensor([0.9]), torch.tensor([True]), bins=3)[:2] == [empty] * 2
    assert reliability(torch.tensor([]), torch.tensor([], dtype=torch.bool), bins=2) == [empty] * 2


@version_independent
def test_reliability_counts_what_is_no_probability():
    first, *others = reliability(torch.tensor([0.0, float("nan")]), torch.tensor([True, False]))
    assert first == {"samples": 2, "confidence": 0.0, "accuracy": 0.5} and all(bin["samples"] == 0 for bin in others)


@version_independent
def test_calibration_error_by_hand():
    logits = logits_of([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8]])
    labels = torch.tensor([0, 0, 0, 1])
    # 0.6 is right once in two, 0.9 and 0.8 are right
    assert expected_calibration_error(logits, labels) == pytest.approx((1.2 - 1 + 0.1 + 0.2) / 4, abs=1e-6)
    # 0.9 and 0.8 share the upper of two bins with 0.6
    assert expected_calibration_error(logits, labels, bins=2) == pytest.approx(abs(2.9 - 3) / 4, abs=1e-6)


@version_independent
def test_calibration_error_of_rows_that_are_as_often_right_as_they_say():
    confidence = torch.rand(40_000) / 2 + 0.5
    labels = (torch.rand(40_000) > confidence).long()
    logits = torch.stack([confidence, 1 - confidence], dim=1).log()
    assert expected_calibration_error(logits, labels) < 0.02
    assert expected_calibration_error(3 * logits, labels) > 0.1


@version_independent
def test_calibration_error_needs_rows():
    with pytest.raises(ValueError, match="without samples"):
        expected_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def one_exit_and_the_final():
    """Three rows, two classes: the first two leave at the exit."""
    logits = torch.stack([logits_of([[0.85, 0.15], [0.25, 0.75], [0.55, 0.45]]), logits_of([[0.7, 0.3]] * 3)])
    return ExitTable(logits, labels=torch.tensor([0, 0, 1]), depths=[1, 2])


def tempered(probability, temperature):
    return probability ** (1 / temperature) / (
        probability ** (1 / temperature) + (1 - probability) ** (1 / temperature)
    )


@version_independent
@pytest.mark.parametrize(
    ("temperature", "at_exit", "at_final"),
    [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), ([0.5], 0.5, 1.0), ([0.5, 2.0], 0.5, 2.0)],
)
def test_calibration_error_of_each_exit_has_the_policy_s_temperature(temperature, at_exit, at_final):
    table = one_exit_and_the_final()
    threshold = tempered(0.7, at_exit)
    policy = build_policy({"name": "confidence", "threshold": threshold, "temperature": temperature}, num_exits=1)
    answers = table.replay(policy)
    assert answers.exit_index.tolist() == [0, 0, 1]
    first, final = summarise(table, answers, Costs([1.0] * 2, [1.0] * 2), ["linear", "final"], policy)["exits"]
    right, wrong, unsure = (tempered(probability, at_exit) for probability in (0.85, 0.75, 0.55))
    sure = tempered(0.7, at_final)
    # all confidences of the exit lie in bins of their own; the final classifier's are one
    assert first["calibration_error_all"] == pytest.approx((1 - right + wrong + unsure) / 3, abs=1e-6)
    assert first["calibration_error_exited"] == pytest.approx((1 - right + wrong) / 2, abs=1e-6)
    assert final["calibration_error_all"] == pytest.approx(abs(sure - 2 / 3), abs=1e-6)
    assert final["calibration_error_exited"] == pytest.approx(sure, abs=1e-6)


@version_independent
def test_reliability_by_exit_by_hand():
    table = one_exit_and_the_final()
    answers = table.replay({"name": "confidence", "threshold": 0.7})
    first, final = reliability_by_exit(table, answers, bins=5)
    assert (first["exit_layer"], final["exit_layer"]) == (1, 2)
    assert [bin["samples"] for bin in first["reliability_all"]] == [0, 0, 1, 1, 1]
    assert [bin["samples"] for bin in first["reliability_exited"]] == [0, 0, 0, 1, 1]
    assert [bin["samples"] for bin in final["reliability_all"]] == [0, 0, 0, 3, 0]
    assert [bin["samples"] for bin in final["reliability_exited"]] == [0, 0, 0, 1, 0]
    assert final["reliability_all"][3]["accuracy"] == pytest.approx(2 / 3)
    assert final["reliability_exited"][3]["accuracy"] == 0.0
    assert final["reliability_exited"][3]["confidence"] == pytest.approx(0.7, abs=1e-6)


@version_independent
def test_figures_are_json_whatever_the_logits():
    table = one_exit_and_the_final()
    table.logits[:, 1] = float("nan")
    table.logits[0, 2] = float("inf")
    for policy in ("never", {"name": "confidence", "threshold": 0.7}, {"name": "patience", "patience": 1}):
        policy = build_policy(policy, num_exits=1)
        answers = table.replay(policy)
        summary = summarise(table, answers, Costs([1.0] * 2, [1.0] * 2), ["linear", "final"], policy)
        assert len(summary["exits"]) == len(reliability_by_exit(table, answers, policy)) == 2
        json.dumps([summary, reliability_by_exit(table, answers, policy)], allow_nan=False)
    never = build_policy("never", num_exits=1)
    summary = summarise(table, table.replay(never), Costs([1.0] * 2, [1.0] * 2), ["linear", "final"], never)
    assert summary["exits"][0]["calibration_error_exited"] is None


# -- classes ---------------------------------------------------------------------------------------------------


def answers_of(classes, depths, num_classes):
    logits = torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()
    return Answers(logits, torch.zeros(len(classes)), torch.tensor(depths), torch.zeros(len(classes)))


@version_independent
def test_confusion_matrix_by_hand():
    answers = answers_of([0, 1, 1, 2, 1], [1] * 5, num_classes=4)
    assert confusion_matrix(answers, torch.tensor([0, 0, 1, 1, 1]), num_classes=4) == [
        [1, 1, 0, 0],
        [0, 2, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


@version_independent
def test_per_class_by_hand():
    answers = answers_of([0, 1, 1, 2, 1], depths=[4, 12, 8, 12, 4], num_classes=4)
    figures = per_class(
        answers, torch.tensor([0, 0, 1, 1, 1]), num_blocks=12, class_names=["ant", "bee", "cat", "dog"]
    )
    nothing = {"samples": 0, "accuracy": None, "mean_depth": None, "early_share": None}
    assert figures == [
        {"name": "ant", "samples": 2, "accuracy": 1 / 2, "precision": 1.0, "mean_depth": 8.0, "early_share": 1 / 2},
        {"name": "bee", "samples": 3, "accuracy": 2 / 3, "precision": 2 / 3, "mean_depth": 8.0, "early_share": 2 / 3},
        # never right, and never named
        {"name": "cat", "precision": 0.0, **nothing},
        {"name": "dog", "precision": None, **nothing},
    ]
    json.dumps(figures, allow_nan=False)


@version_independent
@pytest.mark.parametrize(("labels", "strange"), [([0, -1], -1), ([0, 3], 3)])
def test_labels_without_a_class(labels, strange):
    answers = answers_of([0, 1], [1, 1], num_classes=3)
    with pytest.raises(ValueError, match=f"labels: class {strange} is not one of the 3 classes"):
        per_class(answers, torch.tensor(labels), num_blocks=2, class_names=["ant", "bee", "cat"])


@version_independent
def test_answers_without_a_name():
    with pytest.raises(ValueError, match="answers: class 2 is not one of the 2 classes"):
        per_class(answers_of([0, 2], [1, 1], 3), torch.tensor([0, 1]), num_blocks=2, class_names=["ant", "bee"])


# -- predicted and counted MACs --------------------------------------------------------------------------------


@torch.no_grad()
def counted(model, images):
    """MACs that the model really runs; the counter knows the plain formula of attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_macs_are_those_that_are_run(kind):
    rows = tiny_dataset(16)
    images = torch.stack([row["pixel_values"] for row in rows])
    model = tiny_model(kind)
    table = collect(model, rows)
    scores = table.logits.softmax(-1).amax(-1)
    first = in_a_gap(scores[0])
    third = in_a_gap(scores[2][scores[0] < first])
    # nobody can leave at the second and the fourth exit, whose heads are then not run
    model.set_exit_policy("confidence", threshold=[first, 1.0, third, 1.0])
    answers = table.replay(model.exit_policy)
    counts = answers.exit_index.bincount().tolist()
    assert counts[0] >= 4 and counts[2] >= 1 and counts[4] >= 1 and counts[1] == counts[3] == 0

    costs, names = model_macs(model), head_names(model)
    predicted = summarise(table, answers, costs, names, model.exit_policy)["overall"]["mean_macs"]
    assert counted(model, images) / len(rows) == pytest.approx(predicted, rel=1e-9)
    assert sum(counted(model, image[None]) for image in images) / len(rows) == pytest.approx(predicted, rel=1e-9)
    # a row pays for the heads it is asked at, and for no others
    others = (counts[2] + counts[4]) * costs.heads[1] + counts[4] * costs.heads[3]
    every_head = summarise(table, answers, costs, names)["overall"]["mean_macs"]
    assert every_head == pytest.approx(predicted + others / len(rows))


def test_macs_of_a_block_and_a_linear_head_by_hand():
    model = tiny_model("vit", exit_positions=[1], exit_types="linear", num_hidden_layers=2)
    patches, width, hidden = 16, 32, 64
    tokens = patches + 1
    stem = patches * (3 * 4 * 4) * width
    projections = 4 * tokens * width * width
    attention = 2 * tokens * tokens * width
    block = projections + attention + 2 * tokens * width * hidden
    head = width * width + width * NUM_LABELS  # BERT's pooler and the classifier
    final = width * NUM_LABELS

    table = collect(model, tiny_dataset(6))
    model.set_exit_policy("confidence", threshold=in_a_gap(table.logits[0].softmax(-1).amax(-1)))
    answers = table.replay(model.exit_policy)
    early, late = answers.exit_index.bincount().tolist()
    assert min(early, late) >= 2
    summary = summarise(table, answers, model_macs(model), head_names(model), model.exit_policy)
    by_hand = stem + block + head + late / 6 * (block + final)
    assert summary["overall"]["mean_macs"] == pytest.approx(by_hand)
    assert counted(model, tiny_images(6)) / 6 == pytest.approx(by_hand)


# -- evaluate.Metric -------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["on-disk", "in-memory"])
def settings(request, tmp_path):
    return {"cache_dir": str(tmp_path), "keep_in_memory": request.param}


@version_independent
def test_metric_is_that_of_scikit_learn(settings):
    numbers = rng()
    # class 7 is never right, class 8 never named
    predictions, references = numbers.integers(0, 8, 200), numbers.choice([*range(7), 8], 200)
    figures = HighwayMetric(**settings).compute(predictions=predictions, references=references)
    assert figures == {
        "accuracy": pytest.approx((predictions == references).mean()),
        "macro_f1": pytest.approx(f1_score(references, predictions, average="macro")),
    }
    json.dumps(figures, allow_nan=False)


@version_independent
def test_metric_batch_by_batch_and_row_by_row(settings):
    metric = HighwayMetric(num_blocks=12, **settings)
    answers, truths, depths = torch.tensor([0, 1, 1, 2]), [0, 1, 0, 2], torch.tensor([4, 12, 8, 8])
    expected = {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}
    expected |= {"mean_depth": 8.0, "layer_speed_up": 1.5}
    assert metric.compute(predictions=answers, references=truths, exit_layer=depths) == expected
    for part in (slice(0, 3), slice(3, 4)):
        metric.add_batch(predictions=answers[part], references=truths[part], exit_layer=depths[part])
    assert metric.compute() == expected
    for answer, truth, depth in zip(answers.tolist(), truths, depths.tolist(), strict=True):
        metric.add(prediction=answer, reference=truth, exit_layer=depth)
    assert metric.compute() == expected


def test_metric_says_what_the_summary_says(tmp_path):
    rows, model = tiny_dataset(30), tiny_model("vit")
    table, metric = collect(model, rows), HighwayMetric(num_blocks=6, cache_dir=str(tmp_path))
    model.set_exit_policy("confidence", threshold=in_a_gap(table.logits[0].softmax(-1).amax(-1)))
    images = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        for pixels, labels in zip(images.split(8), table.labels.split(8), strict=True):
            out = model(pixels)
            metric.add_batch(predictions=out.logits.argmax(-1), references=labels, exit_layer=out.exit_layer)
    figures = metric.compute()
    overall = summarise(table, table.replay(model.exit_policy), model_macs(model), head_names(model))["overall"]
    assert 2 < figures["mean_depth"] < 6
    for name in ("accuracy", "mean_depth", "layer_speed_up"):
        assert figures[name] == pytest.approx(overall[name])


@version_independent
def test_metric_of_no_rows(settings):
    figures = HighwayMetric(num_blocks=2, **settings).compute(predictions=[], references=[], exit_layer=[])
    assert figures == dict.fromkeys(["accuracy", "macro_f1", "mean_depth", "layer_speed_up"])


@version_independent
@pytest.mark.parametrize("num_blocks", [0, -1, 2.0, True, "12"])
def test_metric_checks_num_blocks(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks!r} must be an integer of at least 1"):
        HighwayMetric(num_blocks=num_blocks)


@version_independent
@pytest.mark.parametrize("strange", [0, 13])
def test_metric_checks_depths(strange, tmp_path):
    with pytest.raises(ValueError, match=f"exit_layer: {strange} .* num_blocks=12; .* exit_index"):
        HighwayMetric(num_blocks=12, cache_dir=str(tmp_path)).compute(
            predictions=[0, 0], references=[0, 0], exit_layer=[12, strange]
        )


@version_independent
def test_metric_of_depths_needs_num_blocks(tmp_path):
    metric = HighwayMetric(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"exit_layer: .*HighwayMetric\(num_blocks="):
        metric.compute(predictions=[0], references=[0], exit_layer=[4])


@version_independent
def test_metric_without_evaluate(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "lgvit_hf.evaluation.evaluate_metric")
    with pytest.raises(ImportError, match=r'pip install "lgvit-hf\[train\]"'):
        importlib.import_module("lgvit_hf.evaluation.evaluate_metric")
