"""What `trained_exits.py` compares: the steps of each row, from one checkpoint on, 40 core-minutes in all.

Ours: `frozen`, the backbone for half of the time, then `lgvit grow`; `joint`, the same with linear exits beside the
backbone, which `lgvit grow` replaces; `grown`, `lgvit grow` on `plain`, which is trained already; `mixed`, `lgvit
grow`, then backbone and exits together; `lora`, as `mixed` with adapters in place of the backbone's weights. Without
exits: `plain`, the backbone alone; the first 4, 6, 8 and 10 of its blocks, and every second one. And published
methods; of these TOAST puts a linear map in place of blocks of `plain`.
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
from lgvit_hf.data.held_out import read_training_data, write_training_data
from lgvit_hf.data.settings import read_yaml
from lgvit_hf.files import write_json
from lgvit_hf.hub.loading import load_highway
from lgvit_hf.training.distill_exits import keep_exits
from lgvit_hf.training.recipe import train_recipe

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
POSITIONS, MORE_POSITIONS = [4, 5, 6, 8, 10], [2, 4, 5, 6, 7, 8, 10]
BATCH, SAMPLES = 64, 42_500
# images as they are: on random crops at 2e-5 the checkpoint of CIFAR-10 gains nothing in 40 core-minutes
COMMON = {
    "augment": "none",
    # without AVX-512 it takes many times as long as float32
    "bf16": "AVX512" in torch.backends.cpu.get_cpu_capability(),
    "use_cpu": True,
    "batch_size": BATCH,
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
# of `mixed`, with almost all of a run for one of its phases
ONLY = {"heads": 99, "joint": 0.01}


@dataclass(frozen=True)
class Training:
    """One `lgvit train`, for so many core-minutes.

    Args:
        minutes (`dict[str, float]`): Core-minutes of each phase; of all strategies `mixed` alone has several.
        settings (`dict`): Of the recipe, where they are not `COMMON`.
        steps (`float`, *optional*, defaults to 1): Learning rate, in that of the backbone alone.
    """

    minutes: dict[str, float]
    settings: dict[str, Any]
    steps: float = 1

    def recipe(self, place):
        """All settings but for how long."""
        return {**COMMON, **self.settings, **place, "learning_rate": self.steps * place["learning_rate"]}

    def make(self, place, output):
        plan = output.with_name(f"{output.name}-plan.json")
        if not plan.exists():
            write_json(plan, planned_epochs(self, place))
        epochs = json.loads(plan.read_text())["epochs"]
        steps = sum(epochs.values()) * SAMPLES / BATCH
        settings = {**self.recipe(place), "epochs": sum(epochs.values()), "resume": "auto"}
        # about every ten minutes
        settings |= {"save_strategy": "steps", "save_steps": max(1, int(steps / sum(self.minutes.values()) * 10))}
        if "heads" in epochs:
            settings["head_epochs"] = epochs["heads"]
        train_recipe(**settings, output=str(output))
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


@dataclass(frozen=True)
class Growth:
    """`lgvit grow`.

    Args:
        images (`int`): Of these a share is held out.
        positions (`Sequence[int]`): Of which it keeps those that pay.
        after_plain (`bool`, *optional*, defaults to `False`): On the trained row `plain`.
    """

    images: int
    positions: Sequence[int]
    after_plain: bool = False

    def make(self, place, output):
        model = plain_beside(output) if self.after_plain else place["model"]
        grow(model, place["data"], output, exit_positions=list(self.positions), limit=self.images, say=print)


class WithoutExits:
    """The exits of a trained model taken off, so that others grow in their place."""

    def make(self, place, output):
        model = load_highway(place["model"])
        keep_exits(model, [], {"name": "never"})
        model.save_pretrained(output)
        AutoImageProcessor.from_pretrained(place["model"]).save_pretrained(output)
        write_training_data(output, read_training_data(place["model"]))


@dataclass(frozen=True)
class Blocks:
    """Some blocks of a plain checkpoint, from 0, as a plain checkpoint."""

    kept: Sequence[int]

    def make(self, place, output):
        whole = AutoModelForImageClassification.from_pretrained(place["model"], dtype=torch.float32)
        config, weights = copy.deepcopy(whole.config), whole.state_dict()
        config.num_hidden_layers = len(self.kept)
        fewer = AutoModelForImageClassification.from_config(config)
        fewer.load_state_dict({name: weights[self._in_whole(name)] for name in fewer.state_dict()})
        fewer.save_pretrained(output)
        AutoImageProcessor.from_pretrained(place["model"]).save_pretrained(output)

    def _in_whole(self, name):
        return re.sub(r"(?<=\.layer\.)\d+|(?<=\.layers\.)\d+", lambda number: str(self.kept[int(number[0])]), name)


@dataclass(frozen=True)
class Classifier:
    """`lgvit train --stage head` on so many images."""

    images: int

    def make(self, place, output):
        samples = {"max_train_samples": self.images, "max_eval_samples": 1000}
        where = {name: place[name] for name in ("model", "data")}
        train_recipe(**where, output=str(output), stage="head", **samples)


@dataclass(frozen=True)
class LinearMap:
    """`lgvit shorten` of the trained row `plain`, from a first to a last block, from 1."""

    first: int
    last: int
    after_plain = True

    def make(self, place, output):
        shorten(plain_beside(output), place["data"], output, blocks=(self.first, self.last), say=print)


def plain_beside(output):
    """The trained row `plain`, of another row's model."""
    return str(output.parents[1] / "plain" / "model")


def backbone(minutes, steps=1):
    """The backbone alone."""
    return Training({"all": minutes}, {"stage": "backbone"}, steps)


def published(name, minutes=40, **settings):
    """A method of `recipes/configs/vit_small`; new exits learn faster than the backbone, which is trained already."""
    file = read_yaml(CONFIGS / "vit_small" / f"{name}.yaml")
    of_method = {key: value for key, value in file.items() if key in METHOD}
    return Training({"all": minutes}, {**of_method, "head_learning_rate": 3e-3, **settings})


def fewer(kept):
    """What blocks are missing from begins with a fitted classifier (8 core-minutes); larger steps lose what it has."""
    return Blocks(kept), Classifier(20_000), backbone(32, steps=2)


# A-ViT's published weights and target; a gate for a first channel around 0, where patches of this checkpoint differ by
# 0.3: at first a token halts behind about 12 blocks, and some behind 5
HALTING = {
    **{"gate_scale": 4.0, "gate_center": 2.5, "target_depth": 8},
    **{"ponder_weight": 5e-4, "distribution_weight": 1e-3},
}
JOINT = {"stage": "1", "strategy": "weighted", "exit_types": "concat", "head_learning_rate": 3e-3}
MIXED = {"stage": "1", "strategy": "mixed", "backbone_epochs": 0, "head_learning_rate": 3e-4}
ROWS = {
    "plain": (backbone(40),),
    # ten thousand images and five exits take 10 core-minutes
    "frozen": (backbone(20), Growth(20_000, POSITIONS)),
    "joint": (
        Training({"all": 20}, {**JOINT, "exit_positions": POSITIONS}),
        WithoutExits(),
        Growth(20_000, POSITIONS),
    ),
    "grown": (Growth(20_000, POSITIONS, after_plain=True),),
    "mixed": (Growth(10_000, MORE_POSITIONS), Training({"heads": 1, "joint": 27}, MIXED)),
    "lora": (
        Growth(10_000, MORE_POSITIONS),
        Training({"heads": 1, "joint": 27}, {**MIXED, "lora": 8}, steps=50),
    ),
    # without exits
    **{f"first{blocks}": fewer(range(blocks)) for blocks in (4, 6, 8, 10)},
    "second6": fewer(range(1, 12, 2)),
    # as published
    **{f"toast{first}_{last}": (LinearMap(first, last),) for first, last in ((4, 4), (5, 6), (5, 7))},
    "sdn": (published("sdn"),),
    "berxit": (published("berxit"),),
    "vit_ee": (published("vit_ee"),),
    "lgvit1": (published("stage1"),),
    "lgvit": (published("stage1", 20), published("stage2", 20, head_learning_rate=1e-3)),
    "avit": (Training({"all": 40}, {"stage": "avit", "halting": HALTING}, steps=10),),
}


def train_row(name, place, runs):
    """Take the steps of a row, from where it was stopped.

    Args:
        name (`str`): Of the row.
        place (`dict`): `model`, the checkpoint that all begin with, `data`, and `learning_rate` of its backbone.
        runs (`Path`): Folder of all rows.
    """
    steps, home, model = ROWS[name], runs / name, place["model"]
    home.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        output = home / ("model" if number == len(steps) else f"step-{number}")
        done, start = home / f"{output.name}-done.json", time.process_time()
        if not done.exists():
            step.make({**place, "model": model}, output)
            write_json(done, {"core_minutes": (time.process_time() - start) / 60})
        model = str(output)


def core_minutes(names, runs):
    """What rows took, but for what a stop cut short; those that begin with `plain` also what that took."""
    names = {*names, *("plain" for name in names if getattr(ROWS[name][0], "after_plain", False))}
    files = [file for name in names for file in (runs / name).glob("*-done.json")]
    return round(sum(json.loads(file.read_text())["core_minutes"] for file in files), 1)


def planned_epochs(training, place):
    """Epochs of each phase that fit into its minutes."""
    seconds = {phase: seconds_of_step(training, phase, place) for phase in training.minutes}
    epochs = {phase: 60 * training.minutes[phase] / seconds[phase] * BATCH / SAMPLES for phase in seconds}
    return {"seconds_of_step": seconds, "epochs": epochs}


def seconds_of_step(training, phase, place):
    """CPU seconds of one training step of a phase."""
    settings, spent = {**training.recipe(place), "save_strategy": "no", "epochs": 100}, []
    if phase in ONLY:
        settings["head_epochs"] = ONLY[phase]
    for steps in (2, 10):
        with tempfile.TemporaryDirectory() as output:
            start = time.process_time()
            train_recipe(**{**settings, "max_eval_samples": 1, "output": output, "max_steps": steps})
            spent.append(time.process_time() - start)
    return (spent[1] - spent[0]) / 8
