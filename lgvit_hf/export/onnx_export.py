"""`export_onnx`: a highway as ONNX files that have been run against it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor

from ..data.batches import Samples
from ..files import replace_folder
from ..modeling_highway import HighwayMixin
from ..runtimes.manifest import LAYOUTS, PRECISIONS, QUANTIZED, THRESHOLDS, Manifest
from ..runtimes.onnxruntime import ORTHighway
from ..serving.device.info import file_digest
from ..serving.device.pixels import PixelSettings
from .infer import write_infer
from .recalibration import QuantizationImages, quantized, quantized_on_images
from .segment_graphs import EXPORTABLE, check_file_sizes, export_parts, weight_bytes
from .verification import compare, verify
from .writing import exits_in_files, manifest_of, names_of_files, write_parts

NO_IMAGES = QuantizationImages()


def export_onnx(
    model: HighwayMixin,
    folder: str | Path,
    layout: str = "single",
    *,
    precision: str = "float32",
    thresholds: str = "optional",
    processor: BaseImageProcessor | None = None,
    images: Samples | None = None,
    max_accuracy_drop: float = 0.005,
    quantization: QuantizationImages = NO_IMAGES,
) -> Manifest:
    """Write a highway as ONNX, run it in ONNX Runtime against PyTorch, and keep it only if they agree.

    Args:
        model (`HighwayMixin`): A highway, with its exit policy; exported in `eval()` mode and float32, on the CPU.
        folder (`str` or `Path`): To be made: the model, config, processor, `manifest.json` and `infer.py`.
        layout (`str`, *optional*, defaults to `"single"`):
            `"single"`: one file whose exits are real branches and which drops exited samples; its thresholds are
            inputs with defaults. `"segments"`: one file per segment, for any policy. `"all_exits"`: all exits' logits.
        precision (`str`, *optional*, defaults to `"float32"`):
            `"float16"`: weights and arithmetic of half the width. `"int8"`: matrix products in 8 bits, each token and
            each output channel with its own scale, so that a sample's answer does not depend on its batch.
            `"int8-static"`: the same with one scale per activation, measured on `quantization.ranges`. Pixels and
            logits are float32 in every case.
        thresholds (`str`, *optional*, defaults to `"optional"`):
            Of a single file: `"optional"`: inputs with a default, which ONNX Runtime knows; `"input"`: required
            inputs, whose numbers are in the manifest; `"fixed"`: none. OpenVINO and onnxruntime-web take the last two.
        processor (`BaseImageProcessor`, *optional*): Saved beside the model.
        images (`Dataset`, *optional*):
            Items `pixel_values` and perhaps `labels`, on which the files are judged as well; where there are no
            labels, the model's answers stand for them. The one way to know what `float16` and `int8` cost.
        max_accuracy_drop (`float`, *optional*, defaults to 0.005): On `images`; more fails the export.
        quantization (`QuantizationImages`, *optional*):
            Of `int8` and `int8-static`: images for the ranges of activations, and for thresholds that fit the file.

    Returns:
        What is in the folder, and in `checks` what was run against PyTorch: `largest_difference` of logits on batches
        of `batch_sizes` that take every exit, and on `images` the accuracies, agreement and mean depths. With images
        for thresholds also `recalibration` (see `recalibrate`), of `int8-static` `against_int8` (see `time_against`).

    Raises:
        ImportError: The extra `onnx` is not installed.
        ValueError: An `AViT`, unknown layout, precision, thresholds or policy, images that the precision needs or has
            no use for, a file of more than 2 GB, the folder is in use, or the files do not answer as the model does.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is none of {', '.join(PRECISIONS)}")
    if thresholds not in THRESHOLDS:
        raise ValueError(f"thresholds={thresholds!r} is none of {', '.join(THRESHOLDS)}")
    _check_exportable(model, layout)
    if layout != "single" and thresholds != "optional":
        raise ValueError(f"thresholds={thresholds!r} is for layout='single'; {layout!r} decides outside its files")
    quantization.check(precision, images)
    model = copy.deepcopy(model).eval().cpu().float()
    before, found = model.exit_policy, dict[str, Any]()
    with replace_folder(folder) as new:
        if quantization.ranges is None and quantization.thresholds is None:
            names = write_onnx(model, new, layout, precision=precision)
        else:
            names, found = _write_quantized(model, new, layout, precision, quantization, images)
        model.config.save_pretrained(new)
        image = None
        if processor is not None:
            processor.save_pretrained(new)
            if layout == "single":
                image = write_infer(new, processor, model.config.num_channels)
        manifest = verified(model, new, names, layout, precision, image=image)
        if images is not None:
            after = model.exit_policy
            # with the thresholds that it came with
            model.set_exit_policy(before)
            found["images"] = compare(model, ORTHighway.from_pretrained(new), images, max_accuracy_drop)
            model.set_exit_policy(after)
        manifest = replace(manifest, checks={**manifest.checks, **found})
        manifest.save(new)
        if thresholds == "optional":
            return manifest
        return _with_thresholds(model, new, manifest, thresholds)


def _with_thresholds(model: HighwayMixin, folder: Path, manifest: Manifest, thresholds: str) -> Manifest:
    """Change a single file that has been verified with all its inputs, and verify it again."""
    import onnx

    from .composition import set_thresholds

    (name,) = manifest.files
    content = onnx.load(folder / name)
    set_thresholds(content, thresholds)
    onnx.save(content, folder / name)
    manifest = replace(manifest, files={name: file_digest(folder / name)}, thresholds=thresholds)
    manifest.save(folder)
    verify(model, folder)
    return manifest


def _check_exportable(model: HighwayMixin, layout: str) -> None:
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f'export needs {" and ".join(missing)}: pip install "lgvit-hf[onnx]"')
    if model.config.model_type == "avit":
        raise ValueError("an AViT does not export to ONNX: which tokens stay depends on the image; run it in PyTorch")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    if layout == "single" and model.exit_policy.name not in EXPORTABLE:
        raise ValueError(
            f"exit_policy {model.exit_policy.name!r} is not built in and does not export; layout='segments' runs any "
            "policy"
        )


def write_onnx(
    model: HighwayMixin,
    folder: str | Path,
    layout: str = "single",
    *,
    precision: str = "float32",
    file: str = "model.onnx",
) -> list[str]:
    """Write a highway's ONNX files into a folder that is there, without running them.

    Args:
        model (`HighwayMixin`): A highway in `eval()` mode, float32, on the CPU.
        folder (`str` or `Path`): Where to.
        layout (`str`, *optional*), precision (`str`, *optional*): See `export_onnx`.
        file (`str`, *optional*, defaults to `"model.onnx"`): Name of the file; one per segment has names of its own.

    Returns:
        Names of the files, in the order in which they run.

    Raises:
        ImportError: The extra `onnx` is not installed.
        ValueError: Unknown layout, a policy that is not built in in a single file, or a file of more than 2 GB.
    """
    _check_exportable(model, layout)
    if precision == "float16":
        model = copy.deepcopy(model).half()
    exits = exits_in_files(model.exit_policy, len(model.segments()), layout)
    _check_sizes(model, exits, names_of_files(exits, layout, file), precision)
    return write_parts(model, quantized(export_parts(model, exits), precision), Path(folder), layout, file)


def _write_quantized(
    model: HighwayMixin,
    folder: Path,
    layout: str,
    precision: str,
    quantization: QuantizationImages,
    images: Samples | None,
) -> tuple[list[str], dict[str, Any]]:
    """As `write_onnx`, on images: changes the model's policy, and returns what was found as well."""
    from .composition import joined

    every = list(range(len(model.segments())))
    exits = exits_in_files(model.exit_policy, len(every), layout)
    _check_sizes(model, exits, names_of_files(exits, layout), precision)
    parts, found = quantized_on_images(model, export_parts(model, every), precision, quantization, images)
    parts = joined(parts, exits_in_files(model.exit_policy, len(every), layout))
    return write_parts(model, parts, folder, layout), found


def _check_sizes(model: HighwayMixin, exits: list[int], names: list[str], precision: str) -> None:
    """Raise `ValueError`, before anything is traced, where a file would hold more weights than ONNX takes."""
    sizes, smaller = weight_bytes(model, exits), "more exits, which make smaller segments"
    if len(names) < len(sizes):
        sizes, smaller = [sum(sizes)], "layout='segments' (--layout segments)"
    if precision != "float16":
        smaller += " or precision='float16' (--quantize float16)"
    why = f" ({precision} is made of a file in float32)" if precision in QUANTIZED else ""
    check_file_sizes(dict(zip(names, sizes, strict=True)), f"use {smaller}{why}")


def verified(
    model: HighwayMixin,
    folder: Path,
    files: Sequence[str],
    layout: str = "single",
    precision: str = "float32",
    *,
    image: PixelSettings | None = None,
) -> Manifest:
    """Run files that `write_onnx` wrote against their model, and write the manifest beside them.

    Args:
        model (`HighwayMixin`), folder (`Path`), layout (`str`, *optional*), precision (`str`, *optional*):
            As given to `write_onnx`.
        files (`Sequence[str]`): As it returned.
        image (`dict`, *optional*): How images are prepared without PyTorch, see `checked_pixel_settings`.

    Raises:
        ValueError: They do not answer as the model does.
    """
    manifest = replace(manifest_of(model, folder, files, layout, precision), image=image)
    # without it, the folder would not open
    manifest.save(folder)
    manifest = replace(manifest, checks=verify(model, folder))
    manifest.save(folder)
    return manifest
