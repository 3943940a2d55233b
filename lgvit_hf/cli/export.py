"""`lgvit export`: a checkpoint as ONNX, run against PyTorch before it is kept."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import real, whole
from .options import add_data, add_policy, add_processor

if TYPE_CHECKING:
    from ..data.held_out import KnownSplits
    from ..runtimes.manifest import Manifest

logger = logging.getLogger(__name__)

HELP = "write ONNX that really skips, and run it against the model"
EXAMPLE = (
    "lgvit export runs/stage2 onnx/\n"
    "  lgvit export runs/stage2 small/ --quantize int8 --data photos/ --max-accuracy-drop 0.005"
)
# images of the training split on which ranges of activations are measured
RANGE_SAMPLES = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit export`."""
    add = parser.add_argument
    add_data(parser, "test", "samples on which the files are judged, where --data is given")
    add("output", help="folder to write")
    layouts = "one file with real branches, one per segment, or all exits' logits (default: single)"
    add("--layout", choices=("single", "segments", "all_exits"), default="single", help=layouts)
    kinds = "smaller and less exact, --data says how much; int8-static may be faster than int8, and needs --data"
    add("--quantize", choices=("int8", "int8-static", "float16"), help=kinds)
    kinds = "of one file: inputs with a default, required inputs, or fixed numbers (default: optional; of --web input)"
    add("--thresholds", choices=("optional", "input", "fixed"), help=kinds)
    kinds = "also a page for browsers; folder where npm installed onnxruntime-web (default: here)"
    add("--web", nargs="?", const="", metavar="FOLDER", help=kinds)
    add("--limit", type=whole(), help="judge on that many of them, drawn at random; the same for thresholds")
    add("--max-accuracy-drop", type=real(), default=0.005, help="on these; more fails the export (default: 0.005)")
    add_processor(parser)
    add_policy(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..data.held_out import load_known, read_training_data, write_training_data
    from ..data.processing import ProcessedImages
    from ..export.onnx_export import export_onnx
    from ..export.recalibration import QuantizationImages
    from ..export.web import check_web, find_runtime, spread_samples, write_web
    from ..hub.loading import check_class_names
    from ..runtimes.manifest import is_exported
    from .inputs import open_checkpoint

    if is_exported(options.checkpoint):
        raise ValueError(f"{options.checkpoint} is exported already; give the checkpoint that it came from")
    if options.quantize == "int8-static" and options.data is None:
        raise ValueError(
            "--quantize int8-static measures the ranges of activations on images: give --data DATA, or take "
            "--quantize int8, which needs none"
        )
    thresholds_kind = options.thresholds or ("optional" if options.web is None else "input")
    runtime = None if options.web is None else find_runtime(options.web or None)
    model, processor = open_checkpoint(options)
    if runtime is not None:
        check_web(
            model.config,
            processor,
            layout=options.layout,
            precision=options.quantize or "float32",
            thresholds=thresholds_kind,
        )
    found: dict[str, Any] = {}
    drop: dict[str, Any] = {}
    pictures: list[Any] = []
    if options.data is not None:
        splitting = {"validation_share": options.validation_share, "seed": options.seed}
        known = load_known(options.data, options.checkpoint, **splitting)
        check_class_names(options.checkpoint, model.config, known.splits.label_names)
        found = {use: drawn(known, processor, *which) for use, which in _splits_used(options, model).items()}
        if runtime is not None:
            stored = ProcessedImages(getattr(known.splits, options.split), processor)
            pictures = [stored.picture(index) for index in spread_samples(len(stored))]
        if "thresholds" in found:
            if known.warning("validation") is not None:
                logger.warning(
                    f"{options.checkpoint}: thresholds are calibrated on the validation split of {options.data}, "
                    "which may have been used in its training; --policy keeps those of the model"
                )
            drop = _drop_asked_for(options.checkpoint, model)
    images, ranges, thresholds = (found.get(use, (None,))[0] for use in ("judged", "ranges", "thresholds"))
    manifest = export_onnx(
        model,
        options.output,
        options.layout,
        precision=options.quantize or "float32",
        thresholds=thresholds_kind,
        processor=processor,
        images=images,
        max_accuracy_drop=options.max_accuracy_drop,
        quantization=QuantizationImages(ranges, thresholds, **drop),
    )
    if found:
        splits = {use: samples for use, (_, samples) in found.items()}
        manifest = replace(manifest, checks={**manifest.checks, "splits": splits})
        manifest.save(Path(options.output))
    write_training_data(options.output, read_training_data(options.checkpoint))
    if runtime is not None:
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        title = Path(options.checkpoint).resolve().name
        several = model.config.problem_type == "multi_label_classification"
        write_web(options.output, manifest, names, runtime, name=title, has_several=several, pictures=pictures)
    print(export_as_text(manifest, options.output))
    if runtime is not None:
        print(f"a page for browsers: python -m http.server --directory {options.output}, then http://localhost:8000")


def _splits_used(options: argparse.Namespace, model: Any) -> dict[str, tuple[str, int | None]]:
    """What images are used for, of which split, and how many at most; no split for two things.

    Raises:
        ValueError: The files would be judged on images that were chosen by.
    """
    from ..export.recalibration import can_recalibrate
    from ..runtimes.manifest import QUANTIZED

    used: dict[str, tuple[str, int | None]] = {"judged": (options.split, options.limit)}
    if options.quantize == "int8-static":
        used["ranges"] = "train", RANGE_SAMPLES
    # a policy that was typed stays as it is
    if options.quantize in QUANTIZED and options.policy is None and can_recalibrate(model):
        used["thresholds"] = "validation", options.limit
    if options.split in [split for use, (split, _) in used.items() if use != "judged"]:
        why = "thresholds are calibrated" if options.split == "validation" else "ranges are measured"
        raise ValueError(f"--split {options.split}: {why} on these samples; judge on --split test")
    return used


def drawn(known: KnownSplits, processor: Any, split: str, limit: int | None) -> tuple[Any, dict[str, Any]]:
    """Some images of a split, drawn at random and always the same, and which they are, for a report."""
    import torch
    from torch.utils.data import Subset

    from ..data.processing import ProcessedImages

    images: Any = ProcessedImages(getattr(known.splits, split), processor)
    if limit is not None and limit < len(images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images = Subset(images, order[:limit].tolist())
    which = {**known.samples(split), "samples": len(images)}
    which.pop("warning")  # of calibration, which is not what all of them are for
    return images, which


def _drop_asked_for(checkpoint: str, model: Any) -> dict[str, Any]:
    """The accuracy drop, and its guarantee, for which `lgvit calibrate` or `grow` chose the policy that a model has.

    Raises:
        ValueError: Their report beside the checkpoint is damaged.
    """
    from ..policies import build_policy

    for name in ("calibration.json", "grow.json"):
        file = Path(checkpoint) / name
        if not file.is_file():
            continue
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            report = {**report.get("settings", {}), **report}
            chosen = build_policy(report["policy"], len(model.config.exit_positions))
            if chosen.to_dict() != model.exit_policy.to_dict():
                continue
            numbers = {key: report.get(key) for key in ("max_accuracy_drop", "delta")}
            asked: dict[str, Any] = {key: float(value) for key, value in numbers.items() if value is not None}
            return {**asked, "bound": report["bound"]} if "delta" in asked else asked
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}); restore it, or remove it to do without") from error
    return {}


def export_as_text(manifest: Manifest, folder: str | Path) -> str:
    """What `lgvit export` wrote and how it was checked, for a terminal."""
    from ..evaluation.report_text import policy_in_words

    size = sum((Path(folder) / name).stat().st_size for name in manifest.files)
    checks, sizes = manifest.checks, ", ".join(map(str, manifest.checks["batch_sizes"]))
    lines = [
        f"{', '.join(manifest.files)} in {folder}: {manifest.precision}, {size / 1e6:.1f} MB; policy "
        f"{policy_in_words(manifest.policy)}",
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
        lines += _quantization_as_text(manifest)
    elif manifest.precision != "float32":
        lines.append(f"what {manifest.precision} costs in accuracy was not measured; --data says on which images to")
    return "\n".join(lines)


def _quantization_as_text(manifest: Manifest) -> list[str]:
    """What was measured of a quantized export: thresholds that fit it, and whether a static one is worth it."""
    from ..evaluation.report_text import policy_in_words
    from ..runtimes.manifest import QUANTIZED

    lines, checks = [], manifest.checks
    if "recalibration" in checks:
        found = checks["recalibration"]
        before, after = found["before"], found["after"]
        certainty = "" if found["delta"] is None else f" with probability {1 - found['delta']:g}"
        lines.append(
            f"thresholds calibrated anew on {found['samples']} other samples, for an accuracy drop of at most "
            f"{found['max_accuracy_drop']:.2%}{certainty}:\n"
            f"  before: {policy_in_words(before['policy'])}; {before['accuracy']:.2%} right, mean depth "
            f"{before['mean_depth']:.2f}\n"
            f"  after: {policy_in_words(after['policy'])}; {after['accuracy']:.2%} right, mean depth "
            f"{after['mean_depth']:.2f}"
        )
    elif manifest.precision in QUANTIZED:
        lines.append("thresholds are those of the model, not calibrated anew")
    if "against_int8" in checks:
        timed, images = checks["against_int8"], checks["images"]
        times = ", ".join(
            f"batch {each['batch_size']} in {each['p50_ms']:.2f} ms against {each['int8_p50_ms']:.2f} ms "
            f"({each['speed_up']:.2f}x, {'faster' if each['speed_up'] > 1 else 'not faster'})"
            for each in timed["batches"]
        )
        lost = images["accuracy_of_model"] - images["accuracy"]
        lines += [
            f"against int8 on this machine, {timed['threads']} thread(s), no early exit: {times}",
            f"{100 * lost:.2f} points of accuracy lost against float: "
            f"{'more' if lost > 0.005 else 'not more'} than half a point",
        ]
    return lines
