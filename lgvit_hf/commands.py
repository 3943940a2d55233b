"""What the commands `evaluate`, `calibrate`, `sweep`, `benchmark` and `export` do: a checkpoint in, files out."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.utils import logging

from .costs import Highway, decides_inside
from .data import ProcessedImages, load_images
from .engine import Answers
from .evaluation.benchmark import benchmark, wall_clock_speed_up
from .evaluation.calibration import Calibration, calibrate, check_request, check_rows, split
from .evaluation.latency import CostTable, architecture
from .evaluation.plots import (
    plot_classes,
    plot_confusion,
    plot_exits,
    plot_gallery,
    plot_latency,
    plot_pareto,
    plot_reliability,
)
from .evaluation.report import judge, look, timed_pixels
from .evaluation.search import RANGES
from .evaluation.sweep import sweep, threshold_curve
from .evaluation.table import ExitTable, collect, weights_digest
from .export.manifest import Manifest
from .export.onnx_export import export_onnx
from .export.runtime import ORTHighway, is_exported
from .files import add_files, replace_folder, write_json
from .models import check_class_names, load_highway, open_model
from .policies import build_policy, in_words

UNIT = "million MACs per image, heads counted"
# the parameter that a sweep varies, by policy
SWEPT = {
    "confidence": "threshold",
    "margin": "threshold",
    "entropy": "threshold",
    "confidence_entropy": "threshold",
    "patience": "patience",
    "patience_confidence": "threshold",
    "fixed": "exit_index",
}


def open_highway(
    checkpoint: str,
    data: str,
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Highway, BaseImageProcessor, ProcessedImages]:
    """A highway in `eval()` mode, its image processor, and one split of a dataset as the model takes it.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway, or folder of an exported one.
        data (`str`): As of `load_images`.
        which (`str`, *optional*, defaults to `"test"`): Or `"validation"`, `"train"`.
        validation_share (`float`, *optional*, defaults to 0.15), seed (`int`, *optional*, defaults to 0):
            As of `load_images`; those of the training keep its validation rows apart.
        threads (`int`, *optional*): Of an exported highway; by default as many as PyTorch uses.
    """
    splits = load_images(data, validation_share=validation_share, seed=seed)
    if is_exported(checkpoint):
        model = ORTHighway.from_pretrained(checkpoint, threads=threads)
        check_class_names(checkpoint, model.config, splits.label_names)
        processor = AutoImageProcessor.from_pretrained(checkpoint)
    else:
        model, processor = open_model(checkpoint, label_names=splits.label_names, must_be_highway=True)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if not model.config.exits:
        raise ValueError(f"{checkpoint} has no exits; `lgvit grow` or `lgvit train --stage 1` gives it some")
    return model, processor, ProcessedImages(getattr(splits, which), processor)


def table_of(model: Highway, dataset: ProcessedImages, file: str | Path | None) -> ExitTable:
    """The table of a model and a dataset: read from `file` where that is there, otherwise collected and written to it.

    Raises:
        ValueError: The file holds a table of another model or of other rows; the model is one exported file.
    """
    if file is not None and Path(file).exists():
        table = ExitTable.load(
            file,
            depths=[segment.depth for segment in model.segments()],
            num_labels=model.config.num_labels,
            weights=weights_digest(model),
        )
        labels = dataset.images["label"][:]
        if table.labels.tolist() != list(labels):
            raise ValueError(f"{file} is a table of {len(table)} other rows than these {len(labels)}: another split?")
        return table
    table = collect(model, dataset)
    if file is not None:
        table.save(file)
    return table


def run_evaluate(
    checkpoint: str,
    data: str,
    *,
    policy: dict[str, Any] | None = None,
    output: str | None = None,
    plots: str | None = None,
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    batch_size: int = 64,
    timed_batch_sizes: Sequence[int] = (1, 32),
) -> dict[str, Any]:
    """Judge a checkpoint under its own policy or another one, and draw what was found.

    Args:
        checkpoint (`str`): As of `open_highway`.
        data (`str`): As of `load_images`.
        policy (`dict`, *optional*): Instead of the saved one.
        output (`str`, *optional*): JSON file for the report.
        plots (`str`, *optional*):
            Folder for `exits.png`, `pareto.png`, `reliability.png`, `classes.png`, `confusion.png`, `gallery.png` and,
            where wall-clock is measured, `latency.png`; not of one exported file.
        which (`str`, *optional*, defaults to `"test"`), validation_share (`float`, *optional*, defaults to 0.15), seed
            (`int`, *optional*, defaults to 0): As of `open_highway`.
        batch_size (`int`, *optional*), timed_batch_sizes (`Sequence[int]`, *optional*): As of `evaluate`.

    Returns:
        As of `evaluate`.
    """
    if plots is not None:
        _check_can_draw()
    _check_counts(batch_size=[batch_size], timed_batch_sizes=timed_batch_sizes)
    model, _, dataset = open_highway(checkpoint, data, which, validation_share, seed)
    if plots is not None and decides_inside(model):
        raise ValueError(f"{checkpoint}: figures show what every exit answers; export with --layout segments for that")
    if policy is not None:
        model.set_exit_policy(policy)
    table, answers = look(model, dataset, batch_size=batch_size)
    progress = partial(logging.tqdm, desc="timing", leave=False)
    report = judge(model, dataset, table, answers, timed_batch_sizes=timed_batch_sizes, progress=progress)
    if output is not None:
        write_json(output, report)
    if plots is not None:
        with add_files(plots) as folder:
            _draw_all(folder, model, dataset, table, answers, report)
    return report


def _draw_all(
    folder: Path,
    model: Highway,
    dataset: ProcessedImages,
    table: ExitTable,
    answers: Answers,
    report: dict[str, Any],
) -> None:
    names = [entry["name"] for entry in report["classes"]]
    overall = report["overall"]
    plot_exits(folder / "exits.png", report)
    plot_pareto(
        folder / "pareto.png",
        {"one threshold for all exits": _points(threshold_curve(table))},
        {
            f"this policy ({report['policy']['name']})": {
                "cost": overall["mean_macs"] / 1e6,
                "accuracy": overall["accuracy"],
            },
            "full model": {"cost": overall["backbone_macs"] / 1e6, "accuracy": overall["accuracy_full_model"]},
        },
        unit=UNIT,
    )
    diagrams = [
        {
            "name": f"after block {exit['position']}, {exit['head']}",
            "all": bins["reliability_all"],
            "leaving": bins["reliability_leaving"] if exit["rows"] else None,
        }
        for exit, bins in zip(report["exits"], report["reliability"], strict=True)
    ]
    plot_reliability(folder / "reliability.png", diagrams)
    plot_classes(folder / "classes.png", report["classes"])
    plot_confusion(folder / "confusion.png", report["confusion"], names)
    told = [
        {"depth": depth, "score": score, "predicted": names[answer], "label": names[label]}
        for depth, score, answer, label in zip(
            answers.exit_layer.tolist(),
            answers.exit_score.tolist(),
            answers.logits.argmax(-1).tolist(),
            table.labels.tolist(),
            strict=True,
        )
    ]
    plot_gallery(folder / "gallery.png", _Images(dataset), told)
    if report["wall_clock"]:
        timed = [
            {
                "batch_size": int(size),
                "wall_clock_speed_up": times["wall_clock_speed_up"],
                "layer_speed_up": overall["layer_speed_up"],
                "ideal_speed_up": None,
            }
            for size, times in report["wall_clock"].items()
        ]
        plot_latency(folder / "latency.png", timed)


class _Images(Sequence):
    """The images of a dataset as they are stored, decoded when they are looked at."""

    def __init__(self, dataset: ProcessedImages):
        self.images = dataset.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]["image"].convert("RGB")


def run_calibrate(
    checkpoint: str,
    data: str,
    *,
    output: str | None = None,
    plot: str | None = None,
    table_file: str | None = None,
    cost_table: str | None = None,
    which: str = "validation",
    validation_share: float = 0.15,
    seed: int = 0,
    **wanted: Any,
) -> Calibration:
    """Calibrate a checkpoint and write the policy into its config, with the report beside it as `calibration.json`.

    Args:
        checkpoint (`str`): As of `open_highway`.
        data (`str`): As of `load_images`.
        output (`str`, *optional*): Folder for a calibrated copy; by default the checkpoint's own files are changed.
        plot (`str`, *optional*): PNG of accuracy against cost.
        table_file (`str`, *optional*): Where the table is, or is to be, kept.
        cost_table (`str`, *optional*): File of measured times.
        which (`str`, *optional*, defaults to `"validation"`): The split to calibrate on.
        validation_share (`float`, *optional*, defaults to 0.15), seed (`int`, *optional*, defaults to 0):
            As of `open_highway`.
        wanted: As of `calibrate`.
    """
    folder = Path(checkpoint)
    if output is None:
        _check_may_change(folder)
    elif Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; choose another output")
    if plot is not None:
        _check_can_draw(plot)
    asked = {
        name: wanted.get(name) for name in ("max_accuracy_drop", "min_speedup", "max_macs", "max_latency", "delta")
    }
    bound = wanted.get("bound", "drop")
    check_request(wanted.get("policy", "confidence"), **asked, bound=bound, has_cost_table=cost_table is not None)
    model, processor, dataset = open_highway(checkpoint, data, which, validation_share, seed)
    check_rows(len(dataset) - len(dataset) // 2, asked["max_accuracy_drop"], asked["delta"], bound)
    costs = None
    if cost_table is not None:
        costs = CostTable.load(cost_table, num_exits=len(model.segments()), model=architecture(model))
        costs.at(wanted.get("batch_size", 1))
    table = table_of(model, dataset, table_file)
    report = calibrate(table, cost_table=costs, **wanted)
    if plot is not None:
        labels = wanted.get("labels", True)
        plot_calibration(plot, table, report, labels=labels, asked_drop=asked["max_accuracy_drop"])
    content = {"what": "lgvit calibrate", "data": data, "split": which, "rows": len(table), **report.to_dict()}
    if output is not None:
        model.set_exit_policy(report.policy)
        with replace_folder(output) as new:
            model.save_pretrained(new)
            processor.save_pretrained(new)
            write_json(new / "calibration.json", content)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # the report first: whatever the config says then is explained beside it
        write_json(folder / "calibration.json", content)
        write_json(folder / "config.json", {**config, "exit_policy": report.policy})
    return report


def _check_can_draw(file: str | None = None) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('figures are drawn with matplotlib: pip install "lgvit-hf[plots]"')
    if file is not None and Path(file).is_dir():
        raise ValueError(f"{file} is a folder; give the PNG's file name")


def _check_counts(**counts: Sequence[int]) -> None:
    for name, numbers in counts.items():
        if any(number < 1 for number in numbers):
            raise ValueError(f"{name}={' '.join(map(str, numbers))} must be at least 1")


def _check_may_change(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a config.json to write the policy into; give --output FOLDER")
    if (folder / "manifest.json").exists() and not is_exported(folder):
        raise ValueError(f"{folder} is a training checkpoint, which must stay as it is; give --output FOLDER")


def plot_calibration(
    file: str | Path, table: ExitTable, report: Calibration, *, labels: bool = True, asked_drop: float | None = None
) -> None:
    """Accuracy against MACs on the half of a table that was not searched on: one threshold for all, and the choice."""
    _, tested = split(table if labels else table.without_labels())
    name = report.policy["name"]
    plot_pareto(
        file,
        {
            "one threshold for all exits": _points(threshold_curve(tested, name if name in RANGES else "confidence")),
            "thresholds and exits searched": _points(report.frontier),
        },
        {
            "chosen": {"cost": report.mean_macs / 1e6, "accuracy": report.accuracy},
            "full model": {"cost": report.full_macs / 1e6, "accuracy": report.full_accuracy},
        },
        unit=UNIT,
        measure="accuracy" if labels else "agreement with the full model",
        asked_accuracy=None if asked_drop is None else report.full_accuracy - asked_drop,
    )


def _points(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [{"cost": row["mean_macs"] / 1e6, "accuracy": row["accuracy"]} for row in rows]


def run_sweep(
    checkpoint: str,
    data: str,
    output: str,
    *,
    policy: dict[str, Any],
    values: Sequence[float],
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    timed_batch_sizes: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """A policy at many values of its first parameter: `table.safetensors`, `sweep.jsonl` and `sweep.png` in a folder.

    Args:
        checkpoint (`str`): As of `open_highway`.
        data (`str`): As of `load_images`.
        output (`str`): The folder; what an earlier run of the same sweep left there is not run again.
        policy (`dict`): Its name, and the parameters that stay as they are.
        values (`Sequence[float]`): Of the parameter in `SWEPT`.
        which (`str`, *optional*, defaults to `"test"`): The split.
        validation_share (`float`, *optional*, defaults to 0.15), seed (`int`, *optional*, defaults to 0):
            As of `open_highway`.
        timed_batch_sizes (`Sequence[int]`, *optional*): Batch sizes at which wall-clock is measured for every value.

    Raises:
        KeyboardInterrupt: Stopped; says how to go on.
    """
    parameter = SWEPT.get(policy["name"])
    if parameter is None:
        raise ValueError(f"a sweep knows the policies {', '.join(SWEPT)}, not {policy['name']!r}")
    _check_counts(timed_batch_sizes=timed_batch_sizes)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values={list(values)} must be numbers")
    whole = parameter != "threshold"
    policies = [{**policy, parameter: int(value) if whole else value} for value in values]
    for settings in policies:
        if whole and settings[parameter] not in values:
            raise ValueError(f"{parameter} is a whole number; choose values or a range with steps of 1")
    folder = Path(output)
    model, _, dataset = open_highway(checkpoint, data, which, validation_share, seed)
    for settings in policies:
        build_policy(settings, len(model.segments()) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(model, dataset, folder / "table.safetensors")
    pixels = timed_pixels(dataset)

    def time(settings: dict[str, Any]) -> dict[str, float]:
        model.set_exit_policy(settings)
        timed = {size: wall_clock_speed_up(model, pixels.split(size), repeats=3) for size in timed_batch_sizes}
        return {str(size): times["wall_clock_speed_up"] for size, times in timed.items()}

    what = {
        "what": "lgvit sweep",
        "weights": table.weights,
        "data": data,
        "split": which,
        "rows": len(table),
        "timed_batch_sizes": list(timed_batch_sizes),
    }
    progress = partial(logging.tqdm, desc="sweep", leave=False)
    file = folder / "sweep.jsonl"
    try:
        rows = sweep(table, policies, file, what=what, time=time if timed_batch_sizes else None, progress=progress)
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"stopped; what is done is kept in {file}, the same command goes on") from stopped
    if importlib.util.find_spec("matplotlib"):
        full = {"cost": table.costs.backbone / 1e6, "accuracy": table.accuracies()[-1]}
        plot_pareto(
            folder / "sweep.png",
            {f"{policy['name']}, {parameter} from {min(values):g} to {max(values):g}": _points(rows)},
            {"full model": full},
            unit=UNIT,
        )
    return rows


def sweep_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line per value: accuracy, depth, layer speed-up, MACs, and the clock where it was asked."""
    parameter = SWEPT[rows[0]["policy"]["name"]]
    sizes = list(rows[0].get("wall_clock", {}))
    clock = "".join(f"   clock, batch {size}" for size in sizes)
    lines = [f"{parameter:>11}   accuracy   mean depth   layers    MMACs     MACs{clock}"]
    for row in rows:
        times = "".join(f"{row['wall_clock'][size]:>{15 + len(size)}.2f}x" for size in sizes)
        lines.append(
            f"{row['policy'][parameter]:>11.4g}   {row['accuracy']:8.2%}   {row['mean_depth']:10.2f}   "
            f"{row['layer_speed_up']:5.2f}x   {row['mean_macs'] / 1e6:6.1f}   {row['macs_speed_up']:5.2f}x{times}"
        )
    return "\n".join(lines)


def run_benchmark(
    checkpoint: str,
    data: str,
    *,
    policy: dict[str, Any] | None = None,
    output: str | None = None,
    plot: str | None = None,
    cost_table: str | None = None,
    table_file: str | None = None,
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    threads: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Time a checkpoint on real images against the backbone, a static model of equal accuracy, and the ideal.

    Args:
        checkpoint (`str`): As of `open_highway`.
        data (`str`): As of `load_images`.
        policy (`dict`, *optional*): Instead of the saved one.
        output (`str`, *optional*): JSON file for the report.
        plot (`str`, *optional*): PNG of the speed-ups.
        cost_table (`str`, *optional*): JSON file for the measured times, which `calibrate` reads.
        table_file (`str`, *optional*): Table of exits of the whole split, on which accuracies are then compared.
        which (`str`, *optional*), validation_share (`float`, *optional*), seed (`int`, *optional*):
            As of `open_highway`.
        threads (`int`, *optional*): Of the processor, of an exported highway too; by default as PyTorch chose.
        settings: `batch_sizes`, `repeats`, `limit`, as of `benchmark`.
    """
    _check_counts(**{name: [value] for name, value in settings.items() if name in ("repeats", "limit")})
    if plot is not None:
        _check_can_draw(plot)
    if threads is not None:
        _check_counts(threads=[threads])
        torch.set_num_threads(threads)
    model, _, dataset = open_highway(checkpoint, data, which, validation_share, seed, threads)
    if policy is not None:
        model.set_exit_policy(policy)
    table = None if table_file is None else table_of(model, dataset, table_file)
    progress = partial(logging.tqdm, desc="timing", leave=False)
    report = benchmark(model, dataset, table=table, progress=progress, **settings)
    if output is not None:
        write_json(output, report)
    if cost_table is not None:
        CostTable(**report["cost_table"]).save(cost_table)
    if plot is not None:
        plot_latency(plot, report["batches"])
    return report


def run_export(
    checkpoint: str,
    output: str,
    *,
    layout: str = "single",
    precision: str = "float32",
    policy: dict[str, Any] | None = None,
    data: str | None = None,
    max_accuracy_drop: float = 0.005,
    limit: int | None = None,
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
) -> Manifest:
    """Write a checkpoint as ONNX, run against PyTorch before it is kept.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway.
        output (`str`): Folder to make.
        layout (`str`, *optional*), precision (`str`, *optional*), max_accuracy_drop (`float`, *optional*):
            As of `export_onnx`.
        policy (`dict`, *optional*): Instead of the saved one.
        data (`str`, *optional*): As of `load_images`: rows on which the export is judged as well.
        limit (`int`, *optional*): At most so many of them, drawn at random, always the same.
        which (`str`, *optional*), validation_share (`float`, *optional*), seed (`int`, *optional*):
            As of `open_highway`.
    """
    if is_exported(checkpoint):
        raise ValueError(f"{checkpoint} is exported already; give the checkpoint that it came from")
    if data is None:
        model, processor, images = load_highway(checkpoint), AutoImageProcessor.from_pretrained(checkpoint), None
    else:
        model, processor, images = open_highway(checkpoint, data, which, validation_share, seed)
        if limit is not None:
            _check_counts(limit=[limit])
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            images = Subset(images, order[:limit].tolist())
    if policy is not None:
        model.set_exit_policy(policy)
    return export_onnx(
        model,
        output,
        layout,
        precision=precision,
        processor=processor,
        images=images,
        max_accuracy_drop=max_accuracy_drop,
    )


def export_as_text(manifest: Manifest, folder: str | Path) -> str:
    """What `run_export` wrote and how it was checked, for a terminal."""
    size = sum((Path(folder) / name).stat().st_size for name in manifest.files)
    checks, sizes = manifest.checks, ", ".join(map(str, manifest.checks["batch_sizes"]))
    lines = [
        f"{', '.join(manifest.files)} in {folder}: {manifest.precision}, {size / 1e6:.1f} MB; policy "
        f"{in_words(manifest.policy)}",
        f"run in ONNX Runtime on batches of {sizes} with every exit taken: "
        + ("answers as the model does, " if manifest.precision == "float32" else "")
        + f"logits within {checks['largest_difference']:.1e}",
    ]
    if "images" in checks:
        found = checks["images"]
        lines.append(
            f"on {found['rows']} images {found['accuracy']:.2%} right, the model {found['accuracy_of_model']:.2%}; "
            f"the same answer on {found['agreement']:.2%}; mean depth {found['mean_depth']:.2f}, the model "
            f"{found['mean_depth_of_model']:.2f}"
        )
    elif manifest.precision != "float32":
        lines.append(f"what {manifest.precision} costs in accuracy was not measured; --data says on which images to")
    return "\n".join(lines)
