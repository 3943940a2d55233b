"""The study: every method on real images, each against the plain backbone, one line of figures per method.

    python recipes/benchmarks/study.py --data cifar10=photos/cifar10 tiny_imagenet=photos/tiny --output runs/study
    python recipes/benchmarks/study.py --data cifar10=photos/cifar10 --backbones vit --methods sdn --output runs/study
    python recipes/benchmarks/study_page.py docs/results-from-scratch.jsonl docs/results-from-scratch.md

One training is one `lgvit train` of a file in `recipes/configs/BACKBONE_small`. What was trained or measured is not
done again, and a killed run goes on. `results.jsonl` in the output folder gets a line per method.

Thresholds are chosen on validation rows for an accuracy drop against the plain backbone, trained without exits, and
judged on test rows; each method takes the cheapest setting that is right often enough on all validation rows.
Baselines have one threshold, or patience, for all exits, as published; `ours` have temperatures, thresholds per exit,
and the exits that pay by the clock at that batch size. Times are of test images, in turn with the head-free backbone
of the same weights, one thread; for models without exits, with the plain backbone.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from delivered import accuracies, export, plain_model, seconds, variants
from study_settings import against, calibrated, cheapest, published, replayed, share
from transformers import AutoImageProcessor

from lgvit_hf import AViT, ExitTable, collect, train_recipe
from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, stack
from lgvit_hf.data.settings import read_yaml
from lgvit_hf.evaluation.benchmark import wall_clock_speed_up
from lgvit_hf.evaluation.cost_table import machine, measure_cost_table
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.hub.loading import load_highway
from lgvit_hf.token_halting import token_macs

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DROPS = (0.0, 0.005, 0.01, 0.02)
BATCH_SIZES = (1, 8, 32)
EXPORTED_DROP = 0.01
EXPORTED = ("lgvit", "ours")
NEW = ("backbone", "image_size", "model_settings")


@dataclass(frozen=True)
class Training:
    """One `lgvit train`: a recipe, the training it starts from, how long, and what is set otherwise."""

    recipe: str
    start: str | None
    epochs: str
    settings: dict[str, Any] = field(default_factory=dict)


HALTING = {"gate_scale": 5, "gate_center": 10, "target_depth": 8, "ponder_weight": 2e-3, "distribution_weight": 2e-2}
TRAININGS = {
    "backbone": Training("backbone", None, "backbone"),
    "sdn": Training("sdn", "backbone", "joint"),
    "berxit": Training("berxit", "backbone", "joint"),
    "vit_ee": Training("vit_ee", "backbone", "joint"),
    "stage1": Training("stage1", "backbone", "joint"),
    "stage2": Training("stage2", "stage1", "exits"),
    "linear1": Training("stage1", "backbone", "joint", {"exit_types": "linear"}),
    "linear2": Training("stage2", "linear1", "exits", {"strategy": "distillation"}),
    "joint2": Training("stage2", "sdn", "exits", {"strategy": "distillation"}),
    "frozen": Training("sdn", "backbone", "exits", {"stage": "2", "strategy": "distillation"}),
    "avit": Training("backbone", "backbone", "joint", {"stage": "avit", "halting": HALTING}),
    # what a user may do instead: fewer blocks, as many epochs as backbone and exits have together
    "blocks6": Training("backbone", None, "all"),
}
SIX_BLOCKS = {
    "vit": {"num_hidden_layers": 6},
    "deit": {"num_hidden_layers": 6},
    "swin": {"depths": [2, 2, 2]},
}


@dataclass(frozen=True)
class Method:
    """A training, and how it answers early: `single`, `calibrated`, `truncated`, `halting` or `static`."""

    title: str
    training: str
    answers: str = "single"
    policy: str = "confidence"


METHODS = {
    "sdn": Method("SDN", "sdn"),
    "pabee": Method("PABEE", "sdn", policy="patience"),
    "pcee": Method("PCEE", "sdn", policy="patience_confidence"),
    "berxit": Method("BERxiT", "berxit"),
    "vit_ee": Method("ViT-EE", "vit_ee"),
    "lgvit1": Method("LGViT, stage one", "stage1"),
    "lgvit": Method("LGViT, two stages", "stage2"),
    "linear": Method("LGViT's recipe with linear heads", "linear2"),
    "avit": Method("A-ViT", "avit", "halting"),
    "truncated_sdn": Method("SDN, cut off at one exit", "sdn", "truncated"),
    "truncated": Method("LGViT, cut off at one exit", "stage2", "truncated"),
    "blocks6": Method("6 blocks", "blocks6", "static"),
    "ours": Method("ours: LGViT's exits, calibrated", "stage2", "calibrated"),
    "ours_joint": Method("ours: linear exits behind every block, two stages", "joint2", "calibrated"),
    "ours_frozen": Method("ours: linear exits behind every block of the frozen backbone", "frozen", "calibrated"),
}


class Cell:
    """One data set, backbone and seed: where its trainings lie, its images, and what the plain backbone gets right."""

    def __init__(self, options: argparse.Namespace, data: str, backbone: str, seed: int):
        self.options, self.data, self.backbone, self.seed = options, data, backbone, seed
        self.home = Path(options.output) / data / backbone / f"seed{seed}"

    def train(self, name: str) -> Path:
        """The folder of a training, done first where it is not there."""
        training, folder = TRAININGS[name], self.home / name
        if (folder / "training.json").exists():
            return folder
        settings = read_yaml(CONFIGS / f"{self.backbone}_small" / f"{training.recipe}.yaml") | training.settings
        if name == "blocks6":
            settings["model_settings"] |= SIX_BLOCKS[self.backbone]
        if training.start is not None:
            for key in NEW:
                settings.pop(key, None)
            settings["model"] = str(self.train(training.start))
        settings |= {
            "data": self.options.sources[self.data],
            "output": str(folder),
            "epochs": self.epochs(training.epochs),
            "seed": self.seed,
            "validation_share": self.options.validation_share,
            "resume": "auto",
        }
        print(f"\n{self.data}, {self.backbone}, seed {self.seed}: training {name}", flush=True)
        train_recipe(**settings)
        return folder

    def epochs(self, which: str) -> float:
        """How long a training is."""
        options = self.options
        budget = {"backbone": options.epochs, "joint": options.joint_epochs, "exits": options.exit_epochs}
        return sum(budget.values()) if which == "all" else budget[which]

    @cached_property
    def images(self) -> dict[str, ProcessedImages]:
        """Rows to choose on and rows to report on, as the models take them."""
        processor = AutoImageProcessor.from_pretrained(self.train("backbone"))
        splits = load_images(
            self.options.sources[self.data], validation_share=self.options.validation_share, seed=self.seed
        )
        return {name: ProcessedImages(getattr(splits, name), processor, keep=True) for name in ("validation", "test")}

    @cached_property
    def pixels(self) -> torch.Tensor:
        """Test images for the clock."""
        rows = torch.randperm(len(self.images["test"]), generator=torch.Generator().manual_seed(0))
        return stack([self.images["test"][row] for row in rows[: self.options.images].tolist()])["pixel_values"]

    def tables(self, name: str) -> dict[str, ExitTable]:
        """What every exit of a training says of both kinds of rows."""
        folder, model = self.train(name), None
        for which, images in self.images.items():
            if not (folder / f"{which}.safetensors").exists():
                model = model or load_highway(str(folder))
                collect(model, images).save(folder / f"{which}.safetensors")
        return {which: ExitTable.load(folder / f"{which}.safetensors") for which in self.images}

    @cached_property
    def plain(self) -> dict[str, ExitTable]:
        """What the backbone says, which was trained without exits."""
        return self.tables("backbone")


# -- methods ---------------------------------------------------------------------------------------------------


def measure(cell: Cell, name: str) -> dict[str, Any]:
    """The line of a method."""
    method = METHODS[name]
    by_answers = {"halting": halting, "static": static, "truncated": truncated}
    figures = by_answers.get(method.answers, early)(cell, name)
    plain = {which: table.accuracies()[-1] for which, table in cell.plain.items()}
    return {
        "data": cell.data,
        "backbone": cell.backbone,
        "seed": cell.seed,
        "method": name,
        "title": method.title,
        "plain_accuracy": plain["test"],
        "plain_validation_accuracy": plain["validation"],
        **figures,
        "budget": {which: cell.epochs(which) for which in ("backbone", "joint", "exits")},
        "timing": {"images": len(cell.pixels), "repeats": cell.options.repeats},
        "training_seconds": seconds_of(cell, method.training),
        "rows": {which: len(images) for which, images in cell.images.items()},
    }


def possible(name: str, backbone: str) -> bool:
    """Tokens leave from ViT and DeiT; Swin's stand in windows."""
    return METHODS[name].answers != "halting" or backbone != "swin"


def seconds_of(cell: Cell, name: str) -> float:
    """Of a training and those before it."""
    log = json.loads((cell.home / name / "training.json").read_text())
    start = TRAININGS[name].start
    return log["seconds"] + (0.0 if start is None else seconds_of(cell, start))


def early(cell: Cell, name: str) -> dict[str, Any]:
    """A highway, by thresholds chosen on validation rows."""
    method = METHODS[name]
    tables, model = cell.tables(method.training), load_highway(str(cell.home / method.training))
    plain = {which: table.right[-1] for which, table in cell.plain.items()}
    if method.answers == "calibrated":
        costs = measure_cost_table(model, cell.pixels, BATCH_SIZES)
        offers = {size: calibrated(tables["validation"], costs, size) for size in BATCH_SIZES}
    else:
        offers = dict.fromkeys(BATCH_SIZES, published(tables["validation"], method.policy))
    points = []
    for drop in DROPS:
        for size in BATCH_SIZES:
            settings = cheapest(offers[size], share(plain["validation"]) - drop)
            if settings is None:
                continue
            facts = replayed(tables["test"], settings)
            model.set_exit_policy(settings)
            clock = wall_clock_speed_up(model, timed(cell, size), repeats=cell.options.repeats)
            points.append(
                {
                    "asked_drop": drop,
                    "batch_size": size,
                    "policy": settings,
                    **against(facts["right"], plain["test"]),
                    "depth": facts["depth"],
                    "layer_speed_up": model.config.num_blocks / facts["depth"],
                    "macs_speed_up": facts["macs_speed_up"],
                    "exit_shares": facts["exit_shares"],
                    "speed_up": clock["wall_clock_speed_up"],
                    "milliseconds": 1e3 * clock["early_exit_seconds"] / sum(map(len, timed(cell, size))),
                }
            )
    return {
        "depths": tables["test"].depths,
        "exit_accuracies": tables["test"].accuracies(),
        "head_share": sum(tables["test"].costs.heads[:-1]) / tables["test"].costs.backbone,
        "points": points,
        "exported": exported(cell, model, points) if name in EXPORTED else [],
        "machine": machine(model),
    }


def timed(cell: Cell, size: int) -> list[torch.Tensor]:
    """The test images that are timed, in batches; fewer of them one by one."""
    return list(cell.pixels[: 128 if size == 1 else None].split(size))


def exported(cell: Cell, model: Any, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ONNX Runtime, also with int8 weights, against the plain backbone in PyTorch, at one accuracy drop."""
    found = []
    point = next((p for p in points if p["asked_drop"] == EXPORTED_DROP and p["batch_size"] == 1), None)
    if point is None or not cell.options.export:
        return found
    model.set_exit_policy(point["policy"])
    plain = plain_model(str(cell.home / "backbone"))
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder))
        models = variants(model, plain, Path(folder), threads=1)
        right = accuracies(models, cell.images["test"])
        for size in BATCH_SIZES:
            total = seconds(models, torch.cat(timed(cell, size)), size, cell.options.repeats)
            found += [
                {
                    "runtime": runtime,
                    "early_exit": leaves,
                    "batch_size": size,
                    "accuracy": right[runtime, leaves],
                    "speed_up": total["PyTorch", False] / total[runtime, leaves],
                }
                for runtime, leaves in models
            ]
    return found


@torch.no_grad()
def clock(cell: Cell, fast: Any, plain: Any) -> list[dict[str, Any]]:
    """Of two models, in turn."""
    found = []
    for size in BATCH_SIZES:
        total = {"plain": 0.0, "fast": 0.0}
        for batch in timed(cell, size):
            runs = {"plain": partial(plain, pixel_values=batch), "fast": partial(fast, pixel_values=batch)}
            for name, times in time_interleaved(runs, repeats=cell.options.repeats, warm_up=1).items():
                total[name] += statistics.median(times)
        milliseconds = 1e3 * total["fast"] / sum(map(len, timed(cell, size)))
        found.append({"batch_size": size, "speed_up": total["plain"] / total["fast"], "milliseconds": milliseconds})
    return found


def static(cell: Cell, name: str) -> dict[str, Any]:
    """A smaller model."""
    method = METHODS[name]
    table = cell.tables(method.training)["test"]
    fast, plain = (load_highway(str(cell.train(name))) for name in (method.training, "backbone"))
    facts = {
        **against(table.right[-1], cell.plain["test"].right[-1]),
        "macs_speed_up": cell.plain["test"].costs.backbone / table.costs.backbone,
        "layer_speed_up": plain.config.num_blocks / fast.config.num_blocks,
        "depth": fast.config.num_blocks,
    }
    return {"points": [facts | times for times in clock(cell, fast, plain)], "machine": machine(fast)}


def truncated(cell: Cell, name: str) -> dict[str, Any]:
    """A highway cut off at its shallowest exit that is good enough."""
    method = METHODS[name]
    tables, whole = cell.tables(method.training), load_highway(str(cell.home / method.training))
    plain, points = load_highway(str(cell.train("backbone"))), []
    accuracies_there = tables["validation"].accuracies()
    for drop in DROPS:
        least = cell.plain["validation"].accuracies()[-1] - drop
        exit_index = next((k for k, accuracy in enumerate(accuracies_there) if accuracy >= least), None)
        if exit_index is None:
            continue
        fast = whole if exit_index == len(whole.exits) else whole.truncate(exit_index)
        if exit_index == len(whole.exits):
            fast.set_exit_policy("never")
        costs, depth = tables["test"].costs, tables["test"].depths[exit_index]
        facts = {
            "asked_drop": drop,
            **against(tables["test"].right[exit_index], cell.plain["test"].right[-1]),
            "macs_speed_up": costs.backbone / costs.of_exit(exit_index, []),
            "layer_speed_up": whole.config.num_blocks / depth,
            "depth": depth,
        }
        points += [facts | times for times in clock(cell, fast.eval(), plain)]
    return {"points": points, "exit_accuracies": tables["test"].accuracies(), "machine": machine(whole)}


@torch.no_grad()
def halting(cell: Cell, name: str) -> dict[str, Any]:
    """An A-ViT at the operating point that it was trained for."""
    fast = AViT.from_pretrained(cell.train(METHODS[name].training)).eval()
    plain, right, depths = load_highway(str(cell.train("backbone"))), [], []
    loader = torch.utils.data.DataLoader(cell.images["test"], batch_size=64, collate_fn=stack)
    for batch in loader:
        out = fast(batch["pixel_values"])
        right.append(out.logits.argmax(-1) == batch["labels"])
        depths.append(out.token_depth)
    depth = torch.cat(depths)
    blocks = fast.config.num_hidden_layers
    full = token_macs(fast.config, torch.full_like(depth[:1], blocks)).item()
    facts = {
        **against(torch.cat(right), cell.plain["test"].right[-1]),
        "macs_speed_up": full / token_macs(fast.config, depth).mean().item(),
        "layer_speed_up": blocks / depth.double().mean().item(),
        "depth": depth.double().mean().item(),
    }
    return {"points": [facts | times for times in clock(cell, fast, plain)], "machine": machine(plain)}


# -- one line per method ---------------------------------------------------------------------------------------


def measured(file: Path) -> Iterator[dict[str, Any]]:
    """What was measured already; a line that was cut short is none."""
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


def append(file: Path, row: dict[str, Any]) -> None:
    """One line, on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+") as stream:
        stream.seek(max(0, stream.tell() - 1))
        cut_short = stream.read() not in ("", "\n")
        stream.write("\n" * cut_short + json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=SOURCE", help="sources as of `lgvit train`")
    parser.add_argument("--output", required=True, help="folder for trainings, tables and results.jsonl")
    parser.add_argument("--backbones", nargs="+", choices=("vit", "deit", "swin"), default=["vit", "deit", "swin"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=12, help="of a plain backbone (default: 12)")
    parser.add_argument("--joint-epochs", type=float, default=4, help="of backbone and exits together (default: 4)")
    parser.add_argument("--exit-epochs", type=float, default=3, help="of exits on a frozen backbone (default: 3)")
    parser.add_argument("--validation-share", type=float, default=0.1, help="of the training rows (default: 0.1)")
    parser.add_argument("--images", type=int, default=256, help="that are timed (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds per batch (default: 5)")
    parser.add_argument("--train-only", action="store_true", help="leave what needs an idle machine for later")
    parser.add_argument(
        "--export", action=argparse.BooleanOptionalAction, default=True, help="some also in ONNX Runtime"
    )
    options = parser.parse_args()
    if options.images < max(BATCH_SIZES):
        parser.error(f"--images: {options.images} is fewer than the largest timed batch, {max(BATCH_SIZES)}")
    options.sources = dict(pair.split("=", 1) if "=" in pair else (Path(pair).name, pair) for pair in options.data)
    return options


def main() -> None:
    options = read_options()
    torch.set_num_threads(torch.get_num_threads() if options.train_only else 1)
    results = Path(options.output) / "results.jsonl"
    for data, backbone, seed in product(options.sources, options.backbones, options.seeds):
        cell = Cell(options, data, backbone, seed)
        for name in options.methods:
            key = {"data": data, "backbone": backbone, "seed": seed, "method": name}
            if not possible(name, backbone):
                continue
            if any(key.items() <= row.items() for row in measured(results)):
                continue
            cell.train(METHODS[name].training)
            if options.train_only:
                if METHODS[name].answers != "halting":
                    cell.tables(METHODS[name].training)
            else:
                row = measure(cell, name)
                append(results, row)
                at_one = [p for p in row["points"] if p.get("asked_drop", 0.01) == 0.01 and p["batch_size"] == 8]
                said = ", ".join(f"{p['accuracy']:.1%} at {p['speed_up']:.2f}x" for p in at_one) or "cannot"
                print(f"{data}, {backbone}, seed {seed}: {METHODS[name].title}: {said} (batch 8)", flush=True)


if __name__ == "__main__":
    main()
