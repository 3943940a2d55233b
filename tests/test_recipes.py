"""Every YAML of `recipes/configs` is read strictly and trains two steps; what `lgvit train` understands and says."""

import ast
import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import Trainer

from lgvit_hf import HighwayTrainingArguments, train_recipe
from lgvit_hf.cli import main
from lgvit_hf.cli.main import build_parser
from lgvit_hf.data import datasets
from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import make_processor
from lgvit_hf.hub.eevit_config import translate_eevit
from lgvit_hf.training.recipe import read_training
from tests.tiny import tiny_model, tiny_native

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted((RECIPES / "configs").glob("*/*.yaml"))
SIZES = ("vit_base", "deit_base", "swin_base", "vit_small", "deit_small", "swin_small")
METHODS = ("backbone", "stage1", "stage2", "sdn", "pabee", "pcee", "berxit", "vit_ee", "mixed")
# tests put the same tiny model in the place of a base and of a small ViT or DeiT, and the steps of these are the same
READ = [file for file in FILES if file.parent.name in ("vit_base", "deit_base") and file.stem not in METHODS[:2]]
TRAINED = [file for file in FILES if file not in READ]
EXITS = ("exit_positions", "exit_types", "exit_policy", "exit_loss_weights")
FAST = ["--max-steps", 2, "--batch-size", 4, "--warmup-steps", 0, "--save-strategy", "no", "--disable-tqdm", "true"]
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 4, "num_hidden_layers": 12}
TINY_SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [2, 4, 6], "num_heads": [1, 2, 2], "window_size": 2}


def lgvit(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, label in enumerate(("blue", "green", "red")):
        (folder / label).mkdir()
        for shade in range(12):
            colour = [20 + 5 * shade] * 3
            colour[2 - number] = 200
            Image.new("RGB", (24 + shade, 20), tuple(colour)).save(folder / label / f"{shade}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def images_are_read_once():
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets, "load_images", cache(load_images))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Folders that stand for the checkpoints a recipe starts from: `plain` and `stage1` of each kind and size."""
    home = tmp_path_factory.mktemp("starts")
    labels = {"num_labels": 3, "id2label": dict(enumerate(("blue", "green", "red")))}
    labels["label2id"] = {name: index for index, name in labels["id2label"].items()}
    for kind in ("vit", "deit", "swin"):
        for size in ("base", "small"):
            depth = {"num_hidden_layers": 12}
            if kind == "swin":
                depth = {"depths": [2, 2, 18, 2] if size == "base" else [2, 4, 6]}
                depth |= {"num_heads": [1] * len(depth["depths"]), "embed_dim": 8, "image_size": 32}
            plain = tiny_native(kind, **depth, num_labels=3)
            highway = tiny_model(kind, exit_positions="lgvit", exit_types="lgvit", **depth, **labels)
            for name, model in (("plain", plain), ("stage1", highway)):
                model.save_pretrained(home / f"{kind}_{size}" / name)
                make_processor(model.config.image_size).save_pretrained(home / f"{kind}_{size}" / name)
    return home


def start_of(file, starts):
    """Options that put a tiny model, or a tiny new backbone, in the place of the recipe's."""
    settings, size = yaml.safe_load(file.read_text()), file.parent.name
    if settings.get("stage") == "avit":
        return ["--model", starts / "deit_small" / "plain"]
    if settings.get("backbone") or file.stem.startswith("eevit"):
        tiny = TINY_SWIN if settings.get("backbone") == "swin" else TINY
        return ["--image-size", 16, "--model-settings", json.dumps(tiny)]
    return ["--model", starts / size / ("stage1" if settings["stage"] == 2 else "plain")]


@pytest.mark.version_independent
def test_every_method_has_a_recipe_for_every_backbone():
    assert {f"{file.parent.name}/{file.stem}" for file in FILES} >= {f"{s}/{m}" for s in SIZES for m in METHODS}


def each(file):
    """A case; on transformers 5 those of one backbone are enough."""
    marks = () if file.parent.name in ("vit_small", "avit") else pytest.mark.version_independent
    return pytest.param(file, marks=marks, id=f"{file.parent.name}-{file.stem}")


@pytest.mark.parametrize("file", [each(file) for file in TRAINED])
def test_every_recipe_trains(file, starts, photos, tmp_path, capsys):
    out = tmp_path / "out"
    place = ["--data", photos, "--output", out]
    assert lgvit("train", "--config", file, *start_of(file, starts), *place, *FAST) == 0, capsys.readouterr().err
    result, config = json.loads((out / "training.json").read_text()), json.loads((out / "config.json").read_text())
    assert result["steps"] == 2 and len(config["id2label"]) == 3
    settings = yaml.safe_load(file.read_text())
    if settings.get("stage") == "avit":
        assert config["model_type"] == "avit" and result["test"]["mean_token_depth"] <= 12
        assert config["target_depth"] == settings["halting"]["target_depth"]
        return
    if file.stem == "backbone":
        assert config["exit_positions"] == []
        return
    told = {key: settings[key] for key in EXITS if settings.get(key) not in (None, "lgvit", "linear", "vit")}
    assert {key: config[key] for key in told} == told
    depths = [*config["exit_positions"], 24 if file.parent.name == "swin_base" else 12]
    assert [f"exit_{depth}_accuracy" in result["test"] for depth in depths] == [True] * len(depths)


@pytest.mark.parametrize("size", ["vit_base", "deit_base"])
def test_every_other_recipe_is_read(size, starts, photos, capsys):
    files = [file for file in READ if file.parent.name == size]
    assert [file.stem for file in files] == sorted(METHODS[2:])
    for file in files:
        settings = yaml.safe_load(file.read_text())
        assert lgvit("train", "--config", file, *start_of(file, starts), "--data", photos, "--dry-run") == 0, file
        said = capsys.readouterr().out
        arguments = yaml.safe_load(said.split("\n\n")[0])
        for key in ("strategy", "learning_rate", "seed", "warmup_steps", "exit_policy"):
            assert settings.get(key) is None or arguments[key] == settings[key], (file, key)
        lines = said.splitlines()
        positions = settings.get("exit_positions") or ()
        for index, position in enumerate(() if positions == "lgvit" else positions):
            assert any(line.split()[:2] == [str(index), str(position)] for line in lines), (file, position)


def test_stages_follow_one_another(photos, tmp_path, capsys):
    """The three commands of the README, from nothing, on a tiny Swin: the base has no exits, stage one adds them."""
    home = RECIPES / "configs" / "swin_small"
    common = ["--data", photos, *FAST]
    new = ["--image-size", 16, "--model-settings", json.dumps(TINY_SWIN)]
    base, one, two = tmp_path / "base", tmp_path / "one", tmp_path / "two"
    assert lgvit("train", "--config", home / "backbone.yaml", *new, *common, "--output", base) == 0
    assert lgvit("train", "--config", home / "stage1.yaml", "--model", base, *common, "--output", one) == 0
    assert lgvit("train", "--config", home / "stage2.yaml", "--model", one, *common, "--output", two) == 0
    assert json.loads((one / "config.json").read_text())["exit_positions"] == [4, 5, 6, 7, 8, 9, 10, 11]
    assert "early exit by the policy" in capsys.readouterr().out
    refused = ["--model", one, "--exit-positions", 3, "--output", tmp_path / "three"]
    assert lgvit("train", "--config", home / "stage2.yaml", *refused, *common) == 2
    assert "has exits after [4, 5, 6, 7, 8, 9, 10, 11] already" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(photos, starts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = RECIPES / "configs" / "vit_base" / "stage1.yaml"
    start = start_of(file, starts)
    assert lgvit("train", "--config", file, *start, "--data", photos, "--dry-run", "--epochs", 3) == 0
    said = capsys.readouterr().out
    assert "num_train_epochs: 3.0" in said and "strategy: alternating_weighted" in said
    assert "ViTHighway: 12 blocks" in said and "attention_r3" in said and "nothing was written" in said
    assert "one batch: pixel_values [25, 3, 16, 16]" in said or "one batch: pixel_values [26, 3, 16, 16]" in said
    assert list(tmp_path.iterdir()) == []


def test_the_costs_of_a_dry_run_are_counted(starts, photos, capsys):
    file = RECIPES / "configs" / "vit_base" / "vit_ee.yaml"
    assert lgvit("train", "--config", file, *start_of(file, starts), "--data", photos, "--dry-run") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " vit " in line and line.startswith("   0"))
    position, _, parameters = line.split()[1:4]
    head = tiny_model("vit", exit_positions=[6], exit_types="vit", num_hidden_layers=12, num_labels=3).exits[0]
    assert (int(position), int(parameters)) == (6, sum(p.numel() for p in head.parameters()))


@pytest.mark.version_independent
def test_the_table_of_recipes_is_made_from_the_files():
    assert subprocess.run([sys.executable, str(RECIPES / "table.py"), "--check"]).returncode == 0, (
        "python recipes/table.py"
    )


# -- keys ------------------------------------------------------------------------------------------------------


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit_postions: [3]", "unknown key 'exit_postions'; did you mean 'exit_positions'?"),
        ("gradient_checkpoint: true", "did you mean 'gradient_checkpointing'?"),
        ("output_dir: there", "did you mean 'output'?"),
        ("bf16: perhaps", "bf16"),
        ("exit_policy: 3", "unknown policy name '3'"),
        ("exit_policy: {name: patience, patiance: 3}", "patiance"),
        ("augment: mixup", "augment: 'mixup' must be one of random_resized, pad, none"),
        ("exit_positions: [one]", "exit_positions: ['one']"),
        ("model_settings: wide", "model_settings: 'wide'"),
        (
            "model_settings: {hiden_size: 3}",
            "no field of ViTHighwayConfig; did you mean 'hidden_size'?",
        ),
        ("strategy: gumbel", "strategy: unknown 'gumbel'"),
        ("exit_loss_weights: [1, 2]", "exit_loss_weights"),
        ("learning_rate: fast", "learning_rate: 'fast'"),
        ("crop_scale: [0.5, 2.0]\naugment: random_resized", "scale"),
    ],
)
def test_bad_keys_are_one_line(text, message, photos, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {photos}\nbackbone: vit\noutput: {tmp_path / 'out'}\nimage_size: 16\n{text}\n")
    assert lgvit("train", "--config", file, *FAST) == 2
    # what is left of progress bars ends before it
    *_, error = capsys.readouterr().err.rstrip("\n").splitlines()
    assert error.startswith("lgvit: ") and message in error
    assert not (tmp_path / "out" / "config.json").exists()


def test_words_of_the_command_line_win_over_the_file(photos, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {photos}\nbackbone: vit\nimage_size: 16\nadam_beta2: 0.9\nseed: 3\nflip: false\n")
    words = [
        "--dry-run",
        "--output",
        tmp_path / "out",
        "--adam_beta2",
        "0.95",
        "--seed",
        "4",
        "--gradient-accumulation-steps=2",
    ]
    assert lgvit("train", "--config", file, *words) == 0
    said = yaml.safe_load(capsys.readouterr().out.split("\n\n")[0])
    assert (said["adam_beta2"], said["seed"], said["gradient_accumulation_steps"], said["flip"]) == (0.95, 4, 2, False)


@pytest.mark.version_independent
def test_words_are_read_as_the_arguments_would_be():
    settings = {"lr_scheduler_kwargs": {"num_cycles": 2}, "bf16": True, "label_names": ["labels"], "seed": None}
    given = read_training(settings, ["--max-steps=3"])
    args = HighwayTrainingArguments("out", report_to=[], use_cpu=True, **given)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2} and args.bf16 is True and args.label_names == ["labels"]
    assert given["max_steps"] == 3 and "seed" not in given
    for refused in (
        {"max_steps": True},
        {"max_grad_norm": "nan"},
        {"save_strategy": "never"},
        {"run_name": ["a", "b"]},
    ):
        with pytest.raises(ValueError, match=f"here: {next(iter(refused))}: .* must be"):
            read_training(refused, where="here")
    with pytest.raises(ValueError, match="--name value"):
        read_training({}, ["stray"])


@pytest.mark.version_independent
def test_every_option_has_help():
    command = build_parser().parse_args(["train"]).parser
    assert all(action.help for action in command._actions)


# -- EEVIT -----------------------------------------------------------------------------------------------------


@pytest.mark.version_independent
def test_eevit_positions_count_from_0_and_heads_change_their_names():
    exits = [[3, "conv1_1", {}], [6, "dummy_mlp"], [10, "attention", {"sr_ratio": 3, "qkv_bias": True}]]
    settings = {
        "dataset": {"image_size": 64, "num_classes": 10},
        "model": {"embed_depth": 96, "mlp_dim": 192, "pool": "mean", "early_exit_config": {"exits": exits}},
        "data": "digits",
    }
    options, notes = translate_eevit(settings)
    assert options == {
        "backbone": "vit",
        "data": "digits",
        "image_size": 64,
        "pool": "mean",
        "model_settings": {"hidden_size": 96, "intermediate_size": 192},
        "exit_positions": [4, 7, 11],
        "exit_types": ["conv1_1", "mlp", "attention_r3"],
        "exit_policy": {"name": "confidence", "threshold": 0.9},
    }
    assert len(notes) == 9 and "dataset.num_classes 10 -> left out: the data say" in notes
    listed = {"early_exits": {"positions": [3, 6], "types": ["conv1_1", "attention"], "confidence_threshold": 0.5}}
    options, _ = translate_eevit(listed)
    assert (options["exit_positions"], options["exit_types"]) == ([4, 7], ["conv1_1", "attention_r1"])
    assert translate_eevit({"model": {"early_exits": {"enabled": False}}})[0]["exit_positions"] == []


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"depth": 3}}, "model.depth: no key of EEVIT's; known: image_size"),
        ({"early_exits": {"exits": [[3, "conv9"]]}}, "unknown head 'conv9'; EEVIT has dummy_mlp"),
        ({"early_exits": {"exits": [[3, "attention", {"sr": 2}]]}}, "'sr' is no setting"),
        ({"early_exits": {"exits": [], "exit_strategy": "entropy"}}, "'entropy' must be 'confidence'"),
        ({"early_exits": {"exits": [], "threshold": 1}}, "early_exits.threshold: no key"),
    ],
)
def test_eevit_keys_are_read_strictly(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        translate_eevit(settings)


def test_what_became_of_eevits_keys_is_printed(photos, tmp_path, capsys):
    file = RECIPES / "configs" / "others" / "eevit.yaml"
    tiny = ["--image-size", 16, "--model-settings", json.dumps(TINY)]
    assert lgvit("train", "--config", file, *tiny, "--data", photos, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "early_exits.exits [3, conv1_1] -> exit_positions 4, exit_types conv1_1" in said
    assert "exit_positions: [4, 5, 6, 7, 8, 9, 10, 11]" in said


# -- what a run can do -----------------------------------------------------------------------------------------


@pytest.fixture
def precision_ends_here():
    """accelerate keeps the precision of a process's first run for all that follow."""
    from accelerate.state import AcceleratorState

    def forget():
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield
    forget()


@pytest.mark.parametrize(
    ("kind", "stage", "word"),
    [
        ("vit", "1", "--bf16"),
        ("swin", "2", "--bf16"),
        ("swin", "1", "--gradient-checkpointing"),
        ("deit", "2", "--gradient-checkpointing"),
    ],
)
def test_bf16_and_gradient_checkpointing(
    kind, stage, word, starts, photos, tmp_path, precision_ends_here, monkeypatch
):
    found, step = set(), Trainer.training_step

    def watched(trainer, *arguments, **options):
        checkpointing = trainer.model.is_gradient_checkpointing
        found.add({"--bf16": trainer.accelerator.mixed_precision == "bf16"}.get(word, checkpointing))
        return step(trainer, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", watched)
    start = ["--model", starts / f"{kind}_small" / "stage1", "--data", photos, "--stage", stage]
    assert lgvit("train", *start, *FAST, word, "true", "--use-cpu", "true", "--output", tmp_path / "out") == 0
    loss = json.loads((tmp_path / "out" / "training.json").read_text())["loss"]
    assert found == {True} and torch.isfinite(torch.tensor(loss))


def test_gradient_checkpointing_changes_no_number(starts, photos, tmp_path):
    losses = []
    for words in ([], ["--gradient-checkpointing", "true"]):
        out = tmp_path / f"out{len(losses)}"
        start = ["--model", starts / "vit_small" / "stage1", "--data", photos, "--strategy", "weighted"]
        assert lgvit("train", *start, *FAST, *words, "--output", out) == 0
        losses.append(json.loads((out / "training.json").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_early_stopping_on_the_accuracy_under_the_policy(photos, tmp_path):
    out = tmp_path / "out"
    # a learning rate of 0, and no batch statistics that move without one: the accuracy never gets better
    new = ["--backbone", "vit", "--image-size", 16, "--model-settings", json.dumps(TINY)]
    exits = ["--exit-positions", 4, "--exit-types", "linear"]
    start = [*new, *exits, "--data", photos, "--batch-size", 8, "--warmup-steps", 0]
    patience = ["--early-stopping-patience", 2, "--epochs", 9, "--learning-rate", 0, "--disable-tqdm", "true"]
    assert lgvit("train", *start, *patience, "--output", out) == 0
    result = json.loads((out / "training.json").read_text())
    assert len(result["evaluations"]) == 3 and result["evaluations"][-1]["epoch"] == 3
    assert {"eval_accuracy", "eval_mean_depth", "eval_exit_4_accuracy"} <= set(result["evaluations"][0])


def test_three_classes_in_four_lines(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = f"""
from transformers import AutoModelForImageClassification
from lgvit_hf import train_recipe
train_recipe(data={str(photos)!r}, backbone="vit", image_size=16, epochs=1, output="highway")
model = AutoModelForImageClassification.from_pretrained("highway")
""".strip()
    place = {}
    exec(lines, place)
    assert len(lines.splitlines()) == 4 and place["model"](torch.zeros(2, 3, 16, 16)).exit_layer.shape == (2,)
    with pytest.raises(ValueError, match="train_recipe: unknown key 'epoch'; did you mean 'epochs'"):
        train_recipe(data="digits", epoch=3)
    with pytest.raises(ValueError, match="train_recipe needs output"):
        train_recipe(data="digits")


def test_three_classes_in_one_command(photos, tmp_path, capsys):
    """As a new user would: a folder of photos and nothing else."""
    new = ["--backbone", "vit", "--image-size", 16, "--epochs", 1, "--output", tmp_path / "highway"]
    assert lgvit("train", "--data", photos, *new) == 0
    assert lgvit("evaluate", tmp_path / "highway", "--data", photos, "--timed-batch-sizes", 4) == 0
    labels = json.loads((tmp_path / "highway" / "config.json").read_text())["id2label"]
    assert list(labels.values()) == ["blue", "green", "red"]


# -- A-ViT -----------------------------------------------------------------------------------------------------


def test_a_backbone_of_ours_becomes_an_avit_whose_run_goes_on(photos, tmp_path, capsys):
    new = ["--data", photos, "--backbone", "vit", "--image-size", 16, "--model-settings", json.dumps(TINY)]
    base, whole, cut = tmp_path / "base", tmp_path / "whole", tmp_path / "cut"
    assert lgvit("train", "--stage", "backbone", *new, *FAST, "--output", base) == 0
    halting = ["--halting", "{gate_scale: 1, gate_center: 1, target_depth: 4}", "--augment", "pad"]
    place = ["--stage", "avit", "--model", base, "--data", photos]
    saves = ["--save-strategy", "steps", "--save-steps", 3, "--disable-tqdm", "true"]
    train = ["train", *place, *halting, "--batch-size", 4, "--warmup-steps", 0, "--epochs", 1, *saves]
    assert lgvit(*train, "--output", whole) == 0
    said = capsys.readouterr().out
    assert "macro F1" in said and "of 12 blocks on average" in said
    assert lgvit(*train, "--output", cut) == 0
    (cut / "model.safetensors").unlink()
    for folder in sorted(cut.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert lgvit(*train, "--output", cut, "--resume", "auto") == 0
    first, second = (json.loads((out / "training.json").read_text()) for out in (whole, cut))
    assert first["test"]["loss"] == second["test"]["loss"] and first["steps"] == second["steps"] > 3
    assert lgvit(*train, "--output", cut, "--resume", "auto", "--halting", "{gate: tiny}") == 2
    assert "gate_scale: 1 then, 10.0 now" in capsys.readouterr().err


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "avit", "--exit-positions", 3], "exit_positions: [3] is for exits"),
        (["--stage", "avit", "--strategy", "weighted"], "strategy: 'weighted' is for exits"),
        (["--stage", "1", "--halting", "{gate: tiny}"], "is for --stage avit, this is stage 1"),
        (["--stage", "avit", "--halting", "{gait: tiny}"], "halting: 'gait' must be one of gate, gate_scale"),
        (["--stage", "avit", "--halting", "{gate: huge}"], "gate: 'huge' must be one of"),
        (["--stage", "avit", "--model-settings", "{hiden_size: 3}"], "did you mean 'hidden_size'?"),
    ],
)
def test_settings_of_exits_and_of_halting_do_not_mix(words, message, photos, tmp_path, capsys):
    assert lgvit("train", "--data", photos, "--backbone", "vit", *words, *FAST, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_of_an_avit_says_how_tokens_halt(starts, photos, capsys):
    file = RECIPES / "configs" / "avit" / "tiny.yaml"
    assert lgvit("train", "--config", file, *start_of(file, starts), "--data", photos, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "gate_center: 30" in said and "none of them for halting" in said and "nothing was written" in said


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.py")), ids=lambda file: file.stem)
def test_what_a_script_takes_from_the_package_is_there(file):
    """Scripts that nothing runs here name parts of the package, which may have moved."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lgvit_hf":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
