"""Each setting of a new model comes from one place; what is told twice is an error before anything is loaded."""

import json

import pytest

from lgvit_hf.cli import main
from lgvit_hf.training.recipe import train_recipe

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 1, "patch_size": 8}
NEW = ["train", "--data", "nowhere/at/all", "--output", "out", "--backbone", "vit"]


def error_of(words, capsys):
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"image_size": 64}, ["--image-size", 32], "image_size: 64 is given by --image-size too"),
        ({"exit_positions": [1]}, ["--exit-positions", 2], "exit_positions: [1] is given by --exit-positions too"),
        ({"exit_types": "mlp"}, ["--exit-types", "linear"], "exit_types: 'mlp' is given by --exit-types too"),
        ({"exit_policy": "never"}, ["--exit-policy", "patience"], "is given by --exit-policy too"),
        ({"pool": "mean"}, ["--pool", "cls"], "pool: 'mean' is given by --pool too"),
        ({"backbone": "vit"}, [], "backbone: 'vit' is given by --backbone too"),
        ({"num_labels": 3}, [], "num_labels: 3 is given by the data too"),
        ({"id2label": {"0": "a"}}, [], "is given by the data too"),
        (
            {"gate_scale": 1.0},
            ["--stage", "avit", "--halting", "{gate_scale: 2.0}"],
            "gate_scale: 1.0 is given by --halting too",
        ),
        ({"exit_positions": [1]}, ["--stage", "avit"], "'exit_positions' is for exits, which an A-ViT has not"),
        ({"image_size": "big"}, [], "image_size: 'big' must be a whole number"),
    ],
)
def test_what_is_told_twice_is_refused_before_anything_is_loaded(settings, options, message, capsys):
    """The data are not there, which would be the next error."""
    words = [*NEW, "--model-settings", json.dumps(settings), *options]
    assert message in error_of(words, capsys)


@pytest.mark.version_independent
def test_a_file_and_the_command_line_may_not_tell_a_model_setting_twice(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("image_size: 16\nmodel_settings: {1: 2}\n")
    words = [*NEW, "--config", tmp_path / "run.yaml"]
    assert "model_settings: 1 is no name of a field" in error_of(words, capsys)
    words += ["--model-settings", "{image_size: 32}"]
    assert "image_size: 32 is given by --image-size too" in error_of(words, capsys)
    (tmp_path / "run.yaml").write_text("batch_size: 16\nbatch-size: 8\n")
    assert "'batch_size' and 'batch-size' are one key" in error_of([*NEW, "--config", tmp_path / "run.yaml"], capsys)
    with pytest.raises(ValueError, match="image_size: 64 is given by --image-size too"):
        train_recipe(data="digits", backbone="vit", image_size=32, model_settings={"image_size": 64}, output="out")


@pytest.mark.parametrize("size", [["--image-size", 24], []])
def test_what_is_told_once_is_obeyed(size, capsys):
    settings = TINY if size else {**TINY, "image_size": 24}
    settings = {**settings, "exit_positions": [1, 3]}
    words = ["train", "--data", "digits", "--backbone", "vit", "--dry-run", "--exit-types", "linear"]
    words += ["--max-train-samples", 8, *size, "--model-settings", json.dumps(settings)]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert "image_size: 24" in out and "exit_positions: [1, 3]" in out and "pixel_values [8, 3, 24, 24]" in out


def test_without_a_size_images_have_32_pixels(capsys):
    words = ["train", "--data", "digits", "--backbone", "vit", "--dry-run", "--max-train-samples", "8"]
    assert main([*words, "--model-settings", json.dumps(TINY), "--stage", "backbone"]) == 0
    assert "pixel_values [8, 3, 32, 32]" in capsys.readouterr().out
