"""`recipes/benchmarks/trained_rows.py`: what rows begin with, and that each is a run that `lgvit train` takes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lgvit_hf import ViTHighway, ViTHighwayConfig


@pytest.fixture(scope="module")
def rows(benchmark):
    return benchmark("trained_rows")


@pytest.fixture
def checkpoint(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).eval().save_pretrained(tmp_path / "whole")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def runs(rows, monkeypatch):
    """What `train_recipe` is called with, in place of training."""
    found = []

    def train_recipe(**settings):
        found.append(settings)
        for name in ("checkpoint-9", "."):
            (Path(settings["output"]) / name).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(rows, "train_recipe", train_recipe)
    monkeypatch.setattr(rows, "seconds_of_step", lambda training, phase, place: 2.0)
    return found


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (0, 1), (1, 3)])
def test_blocks_that_are_kept_do_what_they_did(rows, checkpoint, tmp_path, kept):
    whole = ViTForImageClassification.from_pretrained(checkpoint).eval()
    rows.Blocks(kept).make({"model": checkpoint}, tmp_path / "fewer")
    fewer = ViTForImageClassification.from_pretrained(tmp_path / "fewer").eval()
    pixels, (layers,) = torch.randn(2, 3, 8, 8), [m for m in whole.modules() if isinstance(m, torch.nn.ModuleList)]
    for number in reversed(range(4)):
        if number not in kept:
            del layers[number]
    assert fewer.config.num_hidden_layers == len(kept)
    with torch.no_grad():
        assert torch.equal(fewer(pixels).logits, whole(pixels).logits)


def test_a_row_is_trained_one_training_after_the_other_and_not_twice(rows, runs, checkpoint, tmp_path):
    for _ in range(2):
        rows.train_row("lgvit", {"model": str(checkpoint), "data": "digits", "learning_rate": 1e-5}, tmp_path / "runs")
    home = tmp_path / "runs" / "lgvit"
    assert [(run["stage"], run["strategy"]) for run in runs] == [
        (1, "alternating_weighted"),
        (2, "distillation_lgvit"),
    ]
    assert [run["model"] for run in runs] == [str(checkpoint), str(home / "step-1")]
    # twenty minutes of steps of two seconds
    assert all(run["epochs"] * rows.SAMPLES / rows.BATCH == pytest.approx(600) for run in runs)
    assert not list(home.glob("*/checkpoint-*")) and (home / "model").exists()
    assert len([*home.glob("*-done.json")]) == 2 and rows.core_minutes(["lgvit"], tmp_path / "runs") >= 0


def test_a_row_of_fewer_blocks_is_fitted_a_classifier_and_then_trained(rows, runs, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(rows.ROWS, "first2", rows.fewer(range(2)))
    rows.train_row("first2", {"model": str(checkpoint), "data": "digits", "learning_rate": 1e-5}, tmp_path / "runs")
    home = tmp_path / "runs" / "first2"
    assert [(run["stage"], run["model"]) for run in runs] == [
        ("head", str(home / "step-1")),
        ("backbone", str(home / "step-2")),
    ]
    assert runs[1]["learning_rate"] == 2e-5 and "learning_rate" not in runs[0]


def test_exits_are_taken_off_so_that_others_can_grow(rows, tmp_path):
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    config = ViTHighwayConfig(**settings, num_hidden_layers=4, num_labels=10, exit_positions=[1, 3])
    config.exit_policy = {"name": "confidence", "threshold": 0.2}
    trained = ViTHighway(config).eval()
    trained.save_pretrained(tmp_path / "trained")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "trained")
    history = {"source": "digits", "seed": 3}
    (tmp_path / "trained" / "training.json").write_text(json.dumps({"data": [history]}))
    bare = tmp_path / "bare"
    rows.WithoutExits().make({"model": str(tmp_path / "trained")}, bare)
    without, pixels = ViTHighway.from_pretrained(bare).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(without(pixels).logits, trained(pixels, early_exit=False).logits)
    # what it was trained on is known, so that exits are chosen on other images
    assert [(each.source, each.seed) for each in rows.read_training_data(bare)] == [("digits", 3)]
    assert without.config.exit_positions == [] and len(without.exits) == 0


def test_the_core_minutes_of_a_linear_map_hold_those_of_the_plain_model(rows, tmp_path):
    for name, minutes in (("plain", 40.0), ("toast5_6", 2.0), ("sdn", 41.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-done.json").write_text(json.dumps({"core_minutes": minutes}))
    found = [rows.core_minutes(names, tmp_path) for names in (["sdn"], ["toast5_6"], ["plain", "toast5_6", "sdn"])]
    assert found == [41.0, 42.0, 83.0]


def test_a_linear_map_stands_in_for_blocks_of_the_trained_plain_model(rows, tmp_path, monkeypatch):
    settings = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**settings, image_size=8, patch_size=4, num_labels=10)
    ViTForImageClassification(config).save_pretrained(tmp_path / "plain" / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "plain" / "model")
    monkeypatch.setitem(rows.ROWS, "toast2_3", (rows.LinearMap(2, 3),))
    rows.train_row("toast2_3", {"model": "not read", "data": "digits"}, tmp_path)
    assert ViTHighwayConfig.from_pretrained(tmp_path / "toast2_3" / "model").linear_blocks == [2, 3]


def test_each_training_is_one_that_the_command_takes(rows, tmp_path):
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    ViTForImageClassification(ViTConfig(**settings, num_labels=10)).save_pretrained(tmp_path / "plain")
    ViTHighway(ViTHighwayConfig(**settings, num_labels=10)).save_pretrained(tmp_path / "exits")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "plain")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "exits")
    for name, steps in rows.ROWS.items():
        trainings = [step for step in steps if isinstance(step, rows.Training)]
        for step, before in zip(steps, (None, *steps), strict=False):
            if not isinstance(step, rows.Training):
                continue
            model = tmp_path / ("exits" if isinstance(before, rows.Growth | rows.Training) else "plain")
            phases = {"head_epochs": 0.1} if "heads" in step.minutes else {}
            recipe = step.recipe({"model": str(model), "data": "digits", "learning_rate": 1e-5})
            rows.train_recipe(**recipe, **phases, output=str(tmp_path / name), epochs=0.5, dry_run=True)
        assert sum(sum(training.minutes.values()) for training in trainings) <= 40
