"""Evaluation during training: every exit, the policy, every row once, and no logits kept."""

import json

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from lgvit_hf import DistillationTrainer, HighwayTrainer, HighwayTrainingArguments
from lgvit_hf.evaluation.exit_table import collect
from lgvit_hf.training.metrics import ExitMetrics, sample_answers
from tests.processes import in_two_processes
from tests.test_evaluation import in_a_gap
from tests.tiny import NUM_BLOCKS, NUM_LABELS, tiny_dataset, tiny_model

POSITIONS = [2, 3, 5]
DEPTHS = [*POSITIONS, NUM_BLOCKS]
FIGURES = {"accuracy", "mean_depth", "layer_speed_up", *(f"exit_{depth}_accuracy" for depth in DEPTHS)}


def trainer_of(folder, rows, trainer_class=HighwayTrainer, **changes):
    """Of a model that lets a quarter of the rows or more leave at the first exit, and a quarter or more stay."""
    model = tiny_model("vit", exit_positions=POSITIONS)
    with torch.no_grad():
        first = model(torch.stack([row["pixel_values"] for row in rows]), early_exit=False).exit_logits[0]
    model.set_exit_policy("confidence", threshold=in_a_gap(first.softmax(-1).amax(-1)))
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 8}
    args = HighwayTrainingArguments(str(folder), **{**quiet, **changes})
    return trainer_class(model, args, eval_dataset=rows)


def expected(model, rows):
    """By another road: all logits at once, replayed by the evaluation room."""
    table = collect(model, rows)
    answers = table.replay(model.exit_policy)
    figures = {f"exit_{depth}_accuracy": share for depth, share in zip(DEPTHS, table.accuracies(), strict=True)}
    figures["accuracy"] = (answers.logits.argmax(-1) == table.labels).float().mean().item()
    figures["mean_depth"] = answers.exit_layer.float().mean().item()
    figures["layer_speed_up"] = NUM_BLOCKS / figures["mean_depth"]
    return figures


def figures_of(metrics):
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if name[5:] in FIGURES}


@pytest.mark.parametrize(
    ("trainer_class", "changes"),
    [
        (HighwayTrainer, {}),
        (HighwayTrainer, {"eval_do_concat_batches": False}),
        (HighwayTrainer, {"batch_eval_metrics": True}),
        (DistillationTrainer, {}),
    ],
    ids=["whole", "list", "by-batch", "distillation"],
)
def test_every_exit_and_the_policy(trainer_class, changes, tmp_path):
    rows = tiny_dataset(37)
    trainer = trainer_of(tmp_path, rows, trainer_class, **changes)
    wanted = expected(trainer.model, rows)
    assert POSITIONS[0] < wanted["mean_depth"] < NUM_BLOCKS
    for _ in range(2):  # counting starts anew
        assert figures_of(trainer.evaluate()) == pytest.approx(wanted, rel=1e-6)


def test_no_logits_are_kept(tmp_path):
    rows = tiny_dataset(20)
    trainer = trainer_of(tmp_path, rows)
    seen, metrics = [], trainer.compute_metrics

    class Spy(ExitMetrics):
        def __call__(self, prediction, compute_result=True):
            seen.append(prediction.predictions)
            return super().__call__(prediction, compute_result)

    trainer.compute_metrics = Spy(metrics.depths, metrics.num_blocks)
    trainer.evaluate()
    assert seen[0].shape == (20, len(DEPTHS) + 1) and seen[0].dtype == np.int64


def test_predict_still_gives_logits(tmp_path):
    rows = tiny_dataset(20)
    trainer = trainer_of(tmp_path, rows)
    output = trainer.predict(rows)
    assert output.predictions.shape == (20, NUM_LABELS)
    answers = collect(trainer.model, rows).replay(trainer.model.exit_policy)
    np.testing.assert_allclose(output.predictions, answers.logits, rtol=1e-4, atol=1e-5)
    assert output.metrics["test_accuracy"] == pytest.approx(expected(trainer.model, rows)["accuracy"])


@pytest.mark.parametrize(("changes", "depth"), [({"strategy": "backbone"}, 6), ({"train_exit": 1}, 3)])
def test_what_is_trained_is_what_is_evaluated(changes, depth, tmp_path):
    strategy = {"strategy": "single_exit", **changes}
    metrics = trainer_of(tmp_path, tiny_dataset(20), **strategy).evaluate()
    assert set(figures_of(metrics)) == {"accuracy", "mean_depth", "layer_speed_up", f"exit_{depth}_accuracy"}
    assert metrics["eval_mean_depth"] == depth and metrics["eval_layer_speed_up"] == NUM_BLOCKS / depth
    assert metrics["eval_accuracy"] == metrics[f"eval_exit_{depth}_accuracy"]


def test_metrics_of_ones_own_see_the_answers(tmp_path):
    rows = tiny_dataset(20)
    model = tiny_model("vit", exit_positions=POSITIONS)
    args = HighwayTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    shapes = []

    def own(prediction):
        shapes.append(prediction.predictions.shape)
        return {"mine": 1.0}

    metrics = HighwayTrainer(model, args, eval_dataset=rows, compute_metrics=own).evaluate()
    assert metrics["eval_mine"] == 1.0 and shapes == [(20, NUM_LABELS)]


def test_labels_that_are_no_classes_are_not_counted(tmp_path):
    rows = tiny_dataset(8)
    assert figures_of(trainer_of(tmp_path, rows).evaluate()).keys() == FIGURES
    rows = [{**row, "labels": torch.rand(NUM_LABELS)} for row in rows]
    metrics = trainer_of(tmp_path, rows).evaluate()
    assert "eval_loss" in metrics and not figures_of(metrics)


@pytest.mark.version_independent
def test_hidden_labels_are_left_out():
    metrics = ExitMetrics([1, 2], num_blocks=2)
    answers = np.array([[0, 1, 0], [0, 1, 1], [1, 1, 0]])
    figures = metrics(EvalPrediction(predictions=answers, label_ids=np.array([0, -100, 0])))
    assert figures == {
        "accuracy": 0.5,
        "mean_depth": 1.0,
        "layer_speed_up": 2.0,
        "exit_1_accuracy": 0.5,
        "exit_2_accuracy": 0.0,
    }


def test_sample_answers_replay_the_policy():
    model = tiny_model("vit", exit_positions=POSITIONS)
    model.set_exit_policy("patience", patience=2)
    table = collect(model, tiny_dataset(30))
    replayed = table.replay(model.exit_policy)
    answers = sample_answers(list(table.logits), replayed)
    assert torch.equal(answers[:, -1], replayed.exit_index)
    assert torch.equal(answers[:, :-1].T, table.logits.argmax(-1))


# -- several processes -----------------------------------------------------------------------------------------

RUN = """
import json, sys
from pathlib import Path
import torch
from tests.test_exit_metrics import figures_of, trainer_of
from tests.tiny import tiny_dataset
torch.set_num_threads(1)
metrics = {}
for name, changes in {"whole": {}, "list": {"eval_do_concat_batches": False}}.items():
    trainer = trainer_of(Path(sys.argv[1]), tiny_dataset(37), per_device_eval_batch_size=4, **changes)
    metrics[name] = figures_of(trainer.evaluate())
if trainer.is_world_process_zero():
    (Path(sys.argv[1]) / "metrics.json").write_text(json.dumps(metrics))
del trainer  # its model holds the group
"""


@pytest.mark.version_independent
def test_two_processes_count_every_row_once(tmp_path):
    in_two_processes(RUN, tmp_path)
    rows = tiny_dataset(37)
    wanted = expected(trainer_of(tmp_path, rows).model, rows)
    for metrics in json.loads((tmp_path / "metrics.json").read_text()).values():
        assert metrics == pytest.approx(wanted, rel=1e-6)
