"""The ONNX files of a highway whose parts are there, and their manifest."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from ..evaluation.costs import model_macs
from ..evaluation.exit_table import weights_digest
from ..modeling_highway import HighwayMixin
from ..policies import ExitPolicy
from ..runtimes.manifest import Manifest, exits_that_run
from ..runtimes.onnxruntime import ORTHighway
from ..runtimes.single_file import parameter_inputs
from ..serving.device.info import file_digest
from .segment_graphs import OnnxSegment, export_decisions


def exits_in_files(policy: ExitPolicy, num_exits: int, layout: str) -> list[int]:
    """Indices of the exits that a layout holds: a single file those that its policy evaluates, others all."""
    return exits_that_run(policy, num_exits) if layout == "single" else list(range(num_exits))


def names_of_files(exits: Sequence[int], layout: str, file: str = "model.onnx") -> list[str]:
    """Names of the files of a layout, in the order in which they run."""
    return [f"segment_{index:02}.onnx" for index in exits] if layout == "segments" else [file]


def write_parts(
    model: HighwayMixin, parts: Sequence[OnnxSegment], folder: Path, layout: str, file: str = "model.onnx"
) -> list[str]:
    """Write the parts of a highway in a layout.

    Args:
        model (`HighwayMixin`): The highway, with its exit policy.
        parts (`Sequence[OnnxSegment]`): Of the exits that `exits_in_files` says.
        folder (`Path`), layout (`str`), file (`str`, *optional*): See `write_onnx`.

    Returns:
        Names of the files, in the order in which they run.
    """
    import onnx

    from .composition import compose_all_exits, compose_single

    policy, depths = model.exit_policy, [segment.depth for segment in model.segments()]
    exits = [part.exit_index for part in parts]
    if layout == "single":
        decisions = export_decisions(model.answering_policy, model.config.num_labels, exits, len(depths) - 1)
        models = [compose_single(parts, decisions, depths, parameter_inputs(policy, len(depths)))]
    elif layout == "all_exits":
        models = [compose_all_exits(parts)]
    else:
        models = [part.model for part in parts]
    names = names_of_files(exits, layout, file)
    for name, content in zip(names, models, strict=True):
        onnx.save(content, folder / name)
    return names


def manifest_of(
    model: HighwayMixin, folder: Path, files: Sequence[str], layout: str = "single", precision: str = "float32"
) -> Manifest:
    """The manifest of files that were written, which have not been run yet.

    Args:
        model (`HighwayMixin`), folder (`Path`), layout (`str`, *optional*), precision (`str`, *optional*):
            As given when they were written.
        files (`Sequence[str]`): Their names.
    """
    policy, depths, macs = model.exit_policy, [segment.depth for segment in model.segments()], model_macs(model)
    inputs = parameter_inputs(policy, len(depths)) if layout == "single" else {}
    return Manifest(
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
        weights=weights_digest(model) if precision == "float32" else None,
    )


def open_parts(model: HighwayMixin, parts: Sequence[OnnxSegment], precision: str) -> ORTHighway:
    """All parts of a highway in ONNX Runtime, as the layout `segments`; of no folder that remains.

    Args:
        model (`HighwayMixin`): The highway.
        parts (`Sequence[OnnxSegment]`): Of all exits.
        precision (`str`): Of the parts.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = write_parts(model, parts, folder, "segments")
        manifest_of(model, folder, files, "segments", precision).save(folder)
        model.config.save_pretrained(folder)
        return ORTHighway.from_pretrained(folder)
