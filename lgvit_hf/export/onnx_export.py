"""`export_onnx`: a highway as ONNX files that have been run against it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor

from ..data.batches import Samples
from ..evaluation.costs import model_macs
from ..files import replace_folder
from ..modeling_highway import HighwayMixin
from ..policies import ExitPolicy
from ..runtimes.manifest import LAYOUTS, PRECISIONS, THRESHOLDS, Manifest, exits_that_run
from ..runtimes.onnxruntime import ORTHighway
from ..runtimes.single_file import parameter_inputs
from ..serving.device.info import file_digest
from ..serving.device.pixels import PixelSettings
from .infer import write_infer
from .segment_graphs import EXPORTABLE, check_file_sizes, export_decisions, export_parts, weight_bytes
from .verification import compare, verify


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
            each output channel with its own scale, so that a sample's answer does not depend on its batch. Pixels and
            logits are float32 in every case.
        thresholds (`str`, *optional*, defaults to `"optional"`):
            Of a single file: `"optional"`: inputs with a default, which ONNX Runtime knows; `"input"`: required
            inputs, whose numbers are in the manifest; `"fixed"`: none. OpenVINO and onnxruntime-web take the last two.
        processor (`BaseImageProcessor`, *optional*): Saved beside the model.
        images (`Dataset`, *optional*):
            Items `pixel_values` and perhaps `labels`, on which the files are judged as well; where there are no
            labels, the model's answers stand for them. The one way to know what `float16` and `int8` cost.
        max_accuracy_drop (`float`, *optional*, defaults to 0.005): On `images`; more fails the export.

    Returns:
        What is in the folder, and in `checks` what was run against PyTorch: `largest_difference` of logits on batches
        of `batch_sizes` that take every exit, and on `images` the accuracies, agreement and mean depths.

    Raises:
        ImportError: The extra `onnx` is not installed.
        ValueError: An `AViT`, unknown layout, precision, thresholds or policy, a file of more than 2 GB, the folder is
            in use, or the files do not answer as the model does.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is none of {', '.join(PRECISIONS)}")
    if thresholds not in THRESHOLDS:
        raise ValueError(f"thresholds={thresholds!r} is none of {', '.join(THRESHOLDS)}")
    _check_exportable(model, layout)
    if layout != "single" and thresholds != "optional":
        raise ValueError(f"thresholds={thresholds!r} is for layout='single'; {layout!r} decides outside its files")
    model = copy.deepcopy(model).eval().cpu().float()
    with replace_folder(folder) as new:
        names = write_onnx(model, new, layout, precision=precision)
        model.config.save_pretrained(new)
        image = None
        if processor is not None:
            processor.save_pretrained(new)
            if layout == "single":
                image = write_infer(new, processor, model.config.num_channels)
        manifest = verified(
            model, new, names, layout, precision, image=image, images=images, max_accuracy_drop=max_accuracy_drop
        )
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


def exits_in_files(policy: ExitPolicy, num_exits: int, layout: str) -> list[int]:
    """Indices of the exits that a layout holds: a single file those that its policy evaluates, others all."""
    return exits_that_run(policy, num_exits) if layout == "single" else list(range(num_exits))


def _check_exportable(model: HighwayMixin, layout: str) -> None:
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
    try:
        import onnx

        from .composition import compose_all_exits, compose_single
        from .quantization import quantize
    except ImportError as error:
        raise ImportError('export needs onnx and onnxruntime: pip install "lgvit-hf[onnx]"') from error
    _check_exportable(model, layout)
    if precision == "float16":
        model = copy.deepcopy(model).half()
    policy, depths = model.exit_policy, [segment.depth for segment in model.segments()]
    exits = exits_in_files(policy, len(depths), layout)
    names = [f"segment_{index:02}.onnx" for index in exits] if layout == "segments" else [file]
    _check_sizes(model, exits, names, precision)
    parts = export_parts(model, exits)
    if precision == "int8":
        parts = [replace(part, model=quantize(part.model)) for part in parts]
    if layout == "single":
        decisions = export_decisions(model.answering_policy, model.config.num_labels, exits, len(depths) - 1)
        models = {file: compose_single(parts, decisions, depths, parameter_inputs(policy, len(depths)))}
    elif layout == "all_exits":
        models = {file: compose_all_exits(parts)}
    else:
        models = {name: part.model for name, part in zip(names, parts, strict=True)}
    for name, content in models.items():
        onnx.save(content, Path(folder) / name)
    return list(models)


def _check_sizes(model: HighwayMixin, exits: list[int], names: list[str], precision: str) -> None:
    """Raise `ValueError`, before anything is traced, where a file would hold more weights than ONNX takes."""
    sizes, smaller = weight_bytes(model, exits), "more exits, which make smaller segments"
    if len(names) < len(sizes):
        sizes, smaller = [sum(sizes)], "layout='segments' (--layout segments)"
    if precision != "float16":
        smaller += " or precision='float16' (--quantize float16)"
    why = " (int8 is made of a file in float32)" if precision == "int8" else ""
    check_file_sizes(dict(zip(names, sizes, strict=True)), f"use {smaller}{why}")


def verified(
    model: HighwayMixin,
    folder: Path,
    files: Sequence[str],
    layout: str = "single",
    precision: str = "float32",
    *,
    image: PixelSettings | None = None,
    images: Samples | None = None,
    max_accuracy_drop: float = 0.005,
) -> Manifest:
    """Run files that `write_onnx` wrote against their model, and write the manifest beside them.

    Args:
        model (`HighwayMixin`), folder (`Path`), layout (`str`, *optional*), precision (`str`, *optional*):
            As given to `write_onnx`.
        files (`Sequence[str]`): As it returned.
        image (`dict`, *optional*): How images are prepared without PyTorch, see `checked_pixel_settings`.
        images (`Dataset`, *optional*), max_accuracy_drop (`float`, *optional*): See `export_onnx`.

    Raises:
        ValueError: They do not answer as the model does.
    """
    policy, depths, macs = model.exit_policy, [segment.depth for segment in model.segments()], model_macs(model)
    inputs = parameter_inputs(policy, len(depths)) if layout == "single" else {}
    manifest = Manifest(
        layout=layout,
        precision=precision,
        files={name: file_digest(folder / name) for name in files},
        depths=depths,
        exits=exits_in_files(policy, len(depths), layout),
        policy=policy.to_dict(),
        macs={"backbone_costs": macs.backbone_costs, "heads": macs.heads},
        versions={name: version(name) for name in ("lgvit_hf", "torch", "transformers", "onnxruntime")},
        checks={},
        ensemble=model.config.exit_ensemble,
        inputs={name: numbers.tolist() for name, numbers in inputs.items()},
        image=image,
    )
    # without it, the folder would not open
    manifest.save(folder)
    checks: dict[str, Any] = verify(model, folder)
    if images is not None:
        checks["images"] = compare(model, ORTHighway.from_pretrained(folder), images, max_accuracy_drop)
    manifest = replace(manifest, checks=checks)
    manifest.save(folder)
    return manifest
