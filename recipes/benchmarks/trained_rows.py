"""What `trained_exits.py` compares: what each row begins with, and how its core-minutes are spent.

Ours: `frozen`, `lgvit grow` alone; `mixed`, `lgvit grow` on fewer images, then backbone and exits together; `lora`,
the same with adapters in place of the backbone's weights; `tuned`, `lgvit grow` on most of the images of `frozen`, and
backbone and exits together for what is left of the time. Without exits: `plain` and `plain_small_steps`, the backbone
alone; the first 4, 6, 8 and 10 of its blocks, and every second one. And published methods; of these TOAST puts a
linear map in place of blocks of `plain`, which is trained already.
"""

import copy
import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lgvit_hf import grow, shorten
from lgvit_hf.data.settings import read_yaml
from lgvit_hf.files import write_json
from lgvit_hf.training.recipe import train_recipe

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
POSITIONS, HEAD = [2, 4, 5, 6, 7, 8, 10], "conv1_1"
BATCH, SAMPLES = 64, 42_500
COMMON = {
    "augment": "random_resized",
    "crop_scale": [0.6, 1.0],
    "batch_size": BATCH,
    "learning_rate": 2e-5,
    "warmup_steps": 20,
    "eval_strategy": "no",
    "logging_strategy": "steps",
    "logging_steps": 50,
    "max_eval_samples": 1000,
    "disable_tqdm": True,
}
# of a file in `recipes/configs`, what says which method it is
METHOD = (
    *("stage", "strategy", "exit_positions", "exit_types", "exit_policy", "temperature"),
    *("distillation_weight", "heterogeneous_weight", "homogeneous_weight"),
)
# the classifier of what blocks are missing from is fitted first, on so many images, which take 6 to 10 core-minutes
FITTED_ON = 20_000
# of `mixed`, with almost all of a run for one of its phases
ONLY = {"heads": 99, "joint": 0.01}


@dataclass(frozen=True)
class Training:
    """One `lgvit train`.

    Args:
        minutes (`dict[str, float]`): Core-minutes of each phase; of all strategies `mixed` alone has several.
        settings (`dict`): Of the recipe, where they are not `COMMON`.
    """

    minutes: dict[str, float]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One model, from the checkpoint on.

    Args:
        trainings (`Sequence[Training]`): One after the other; `()` leaves what there is.
        grown_on (`int`, *optional*): Images for `lgvit grow` before; 10,000 take about 15 core-minutes.
        blocks (`Sequence[int]`, *optional*): That are kept, from 0; by default all.
        replaced (`Sequence[int]`, *optional*):
            First and last block, from 1, of the trained row `plain` that a linear map replaces; nothing is trained.
    """

    trainings: Sequence[Training] = ()
    grown_on: int | None = None
    blocks: Sequence[int] | None = None
    replaced: Sequence[int] | None = None


def published(name, minutes=40, **settings):
    """A method of `recipes/configs/vit_small`; new exits learn faster than the backbone, which is trained already."""
    file = read_yaml(CONFIGS / "vit_small" / f"{name}.yaml")
    of_method = {key: value for key, value in file.items() if key in METHOD}
    return Training({"all": minutes}, {**of_method, "head_learning_rate": 3e-3, **settings})


FINE_TUNED = (Training({"all": 40}, {"stage": "backbone"}),)
# A-ViT's published weights and target; a gate for a first channel around 0, where patches of this checkpoint differ by
# 0.3: at first a token halts behind about 12 blocks, and some behind 5
HALTING = {
    **{"gate_scale": 4.0, "gate_center": 2.5, "target_depth": 8},
    **{"ponder_weight": 5e-4, "distribution_weight": 1e-3},
}
MIXED = {"stage": "1", "strategy": "mixed", "backbone_epochs": 0, "head_learning_rate": 3e-4}
MOST = {"heads": 2, "joint": 23}
# for what is fitted already, on images as it was fitted on
SMALL_STEPS = {"learning_rate": 1e-5, "augment": "none", "crop_scale": None}
MENDED = (Training({"all": 32}, {"stage": "backbone", **SMALL_STEPS, "learning_rate": 2e-5}),)
ROWS = {
    "plain": Row(FINE_TUNED),
    "plain_small_steps": Row((Training({"all": 40}, {"stage": "backbone", **SMALL_STEPS}),)),
    "frozen": Row(grown_on=28_000),
    "mixed": Row((Training(MOST, MIXED),), grown_on=10_000),
    "lora": Row((Training(MOST, {**MIXED, "lora": 8, "learning_rate": 5e-4}),), grown_on=10_000),
    "tuned": Row(
        (Training({"heads": 1, "joint": 9}, {**MIXED, **SMALL_STEPS, "head_learning_rate": 3e-5}),), grown_on=20_000
    ),
    # without exits
    **{f"first{blocks}": Row(MENDED, blocks=range(blocks)) for blocks in (4, 6, 8, 10)},
    "second6": Row(MENDED, blocks=range(1, 12, 2)),
    # as published
    **{f"toast{first}_{last}": Row(replaced=(first, last)) for first, last in ((4, 4), (5, 6), (5, 7))},
    "sdn": Row((published("sdn"),)),
    "berxit": Row((published("berxit"),)),
    "vit_ee": Row((published("vit_ee"),)),
    "lgvit1": Row((published("stage1"),)),
    "lgvit": Row((published("stage1", 20), published("stage2", 20, learning_rate=1e-3))),
    "avit": Row((Training({"all": 40}, {"stage": "avit", "halting": HALTING, "learning_rate": 1e-4}),)),
}


def train_row(name, place, runs):
    """Train a row to its end, from its newest checkpoint where there is one.

    Args:
        name (`str`): Of the row.
        place (`dict`): `model`, the checkpoint that all begin with, and `data`.
        runs (`Path`): Folder of all rows.
    """
    row, home, model = ROWS[name], runs / name, place["model"]
    home.mkdir(parents=True, exist_ok=True)
    if row.grown_on:
        model = with_exits(model, place["data"], grown(runs, row), row.grown_on)
    start = time.process_time()
    if row.replaced:
        model = with_linear_map(runs / "plain" / "model", place["data"], home / "start", row.replaced)
    if row.blocks:
        model = with_blocks(model, row.blocks, home / "start")
        model = with_fitted_classifier(model, place["data"], home / "fitted")
    outputs = [*(f"trained-{number}" for number in range(1, len(row.trainings))), "model"]
    for output, training in zip(outputs, row.trainings, strict=False):
        model = trained(training, {**place, "model": model}, home / output)
    if not row.trainings:
        shutil.copytree(model, home / "model", dirs_exist_ok=True)
    write_spent(home / f"spent-{int(time.time())}.json", start)


def grown(runs, row):
    """The folder of what several rows begin with."""
    return runs / f"grown-{row.grown_on}"


def write_spent(file, start):
    """The CPU time since `start`."""
    write_json(file, {"core_minutes": (time.process_time() - start) / 60})


def core_minutes(names, runs):
    """What rows took, with what they have in common (which counts once); but for what a kill cut short."""
    files = set()
    for name in names:
        files |= {*(runs / name).glob("spent-*.json")}
        if ROWS[name].replaced:
            files |= {*(runs / "plain").glob("spent-*.json")}
        if ROWS[name].grown_on:
            files.add(grown(runs, ROWS[name]) / "spent.json")
    return round(sum(json.loads(file.read_text())["core_minutes"] for file in files), 1)


def with_linear_map(source, data, output, replaced):
    """What `lgvit shorten` makes of a checkpoint."""
    if not output.exists():
        shorten(str(source), data, output, blocks=replaced, say=print)
    return str(output)


def with_exits(source, data, output, images):
    """What `lgvit grow` makes of a checkpoint, once for all rows."""
    if not (output / "spent.json").exists():
        shutil.rmtree(output, ignore_errors=True)  # that was stopped in between
        start = time.process_time()
        grow(source, data, output, exit_positions=POSITIONS, exit_types=HEAD, limit=images, say=print)
        write_spent(output / "spent.json", start)
    return str(output)


def with_blocks(source, kept, output):
    """Some blocks of a plain checkpoint, saved as a plain checkpoint."""
    whole = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
    config, weights = copy.deepcopy(whole.config), whole.state_dict()
    config.num_hidden_layers = len(kept)
    fewer = AutoModelForImageClassification.from_config(config)
    fewer.load_state_dict({name: weights[_in_whole(name, kept)] for name in fewer.state_dict()})
    fewer.save_pretrained(output)
    AutoImageProcessor.from_pretrained(source).save_pretrained(output)
    return str(output)


def with_fitted_classifier(source, data, output):
    """What `lgvit train --stage head` makes of a plain checkpoint."""
    if not (output / "training.json").exists():
        train_recipe(
            model=source,
            data=data,
            output=str(output),
            stage="head",
            max_train_samples=FITTED_ON,
            max_eval_samples=1000,
        )
    return str(output)


def _in_whole(name, kept):
    return re.sub(r"(?<=\.layer\.)\d+|(?<=\.layers\.)\d+", lambda number: str(kept[int(number[0])]), name)


def trained(training, place, output):
    """The folder of what was trained for as long as planned."""
    plan = output.with_name(f"{output.name}-plan.json")
    if not plan.exists():
        write_json(plan, planned_epochs(training, place))
    epochs = json.loads(plan.read_text())["epochs"]
    steps = sum(epochs.values()) * SAMPLES / BATCH
    settings = {**COMMON, **training.settings, **place, "epochs": sum(epochs.values()), "resume": "auto"}
    # about every ten minutes
    settings |= {"save_strategy": "steps", "save_steps": max(1, int(steps / sum(training.minutes.values()) * 10))}
    if "heads" in epochs:
        settings["head_epochs"] = epochs["heads"]
    if not (output / "training.json").exists():
        train_recipe(**settings, output=str(output))
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return str(output)


def planned_epochs(training, place):
    """Epochs of each phase that fit into its minutes."""
    seconds = {phase: seconds_of_step(training, phase, place) for phase in training.minutes}
    epochs = {phase: 60 * training.minutes[phase] / seconds[phase] * BATCH / SAMPLES for phase in seconds}
    return {"seconds_of_step": seconds, "epochs": epochs}


def seconds_of_step(training, phase, place):
    """CPU seconds of one training step of a phase."""
    settings, spent = {**COMMON, **training.settings, **place, "save_strategy": "no", "epochs": 100}, []
    if phase in ONLY:
        settings["head_epochs"] = ONLY[phase]
    for steps in (2, 10):
        with tempfile.TemporaryDirectory() as output:
            start = time.process_time()
            train_recipe(**{**settings, "max_eval_samples": 1, "output": output, "max_steps": steps})
            spent.append(time.process_time() - start)
    return (spent[1] - spent[0]) / 8
