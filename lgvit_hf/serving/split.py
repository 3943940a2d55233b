"""`split`: a highway cut at exits into parts for device, edge and cloud, chained and compared before they are kept."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..engine import Answers, run_all
from ..evaluation.exit_table import weights_digest
from ..export.infer import checked_pixel_settings
from ..export.segment_graphs import (
    EXPORTABLE,
    Read,
    check_file_sizes,
    export_decision,
    export_parts,
    weight_bytes,
)
from ..export.verification import verify_answers
from ..files import replace_folder, write_json
from ..hub.loading import HIGHWAYS, example_image
from ..policies import POLICIES, ExitPolicy
from ..runtimes.manifest import exits_that_run
from ..segments import Segment, State
from .device.info import MEMORY, PART_FILE, PART_FORMATS, WEIGHTS, PartInfo, file_digest
from .open_part import open_part
from .torch_part import merged_segments

# the folder beside an ONNX part with what runs it
RUNNER = "lgvit_part"


@dataclass(frozen=True)
class _Cut:
    """A part before it is written: its segments, and what comes in."""

    index: int
    start: int
    exits: list[dict[str, Any]]
    segments: list[Segment]
    state: State


@torch.no_grad()
def split(
    model: PreTrainedModel,
    positions: Sequence[int],
    folder: str | Path,
    format: str = "safetensors",
    *,
    processor: BaseImageProcessor | None = None,
) -> list[PartInfo]:
    """Cut a highway behind exits into parts that run on machines in a row, and keep them only if they answer alike.

    Every part answers the rows that are sure at its exits and gives the state of the rest, with the policy's memory.
    Of each part the last exit is run even where the policy does not ask it: its answer stands in when nobody deeper
    can be reached.

    Args:
        model (`PreTrainedModel`): A highway, with its exit policy; split in `eval()` mode and float32, on the CPU.
        positions (`Sequence[int]`): Blocks run before each cut, ascending; there must be exits.
        folder (`str` or `Path`): To be made, with `part0`, `part1`, ... in it.
        format (`str`, *optional*, defaults to `"safetensors"`):
            `"safetensors"`: of the weights those that the part uses; runs with this package. `"onnx"`: runs on numpy,
            pillow and onnxruntime alone, by the code in its folder `lgvit_part`.
        processor (`BaseImageProcessor`, *optional*):
            What prepares images: written into the first part if that can do the same with numpy and pillow.

    Returns:
        What is in the parts; their `checks` hold the `largest_difference` of logits from the unsplit model's.

    Raises:
        ImportError: For `"onnx"`, the extra `onnx` is not installed.
        ValueError: Unknown format, no exit at a position, a policy that cannot travel, an ONNX file of more than 2 GB,
            the folder is in use, or the parts do not answer as the model does.

    Example:

        >>> import tempfile
        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> small = dict(hidden_size=24, intermediate_size=24, num_attention_heads=2, image_size=32)
        >>> model = ViTHighway(ViTHighwayConfig(**small, num_hidden_layers=4, exit_positions=[1, 2, 3])).eval()
        >>> with tempfile.TemporaryDirectory() as home:
        ...     parts = split(model, [2], f"{home}/parts")
        >>> [[exit["index"] for exit in part.exits] for part in parts], parts[0].gives["hidden"]["shape"]
        ([[0, 1], [2, 3]], [5, 24])
    """
    _check(model, positions, format)
    model = copy.deepcopy(model).eval().cpu().float()
    cuts = _cuts(model, positions)
    infos = _described(model, cuts, list(positions), format, processor)
    with replace_folder(folder) as new:
        write = _write_onnx if format == "onnx" else _write_safetensors
        names = write(model, cuts, new)
        for info, files in zip(infos, names, strict=True):
            part = new / f"part{info.index}"
            info = replace(info, files={name: file_digest(part / name) for name in files})
            write_json(part / PART_FILE, info.as_json())
        checks = _verify(model, new, infos)
        infos = [replace(PartInfo.load(new / f"part{info.index}"), checks=checks) for info in infos]
        for info in infos:
            write_json(new / f"part{info.index}" / PART_FILE, info.as_json())
    return infos


def _check(model: PreTrainedModel, positions: Sequence[int], format: str) -> None:
    if format not in PART_FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(PART_FORMATS)}")
    if model.config.model_type == "avit":
        raise ValueError("an AViT has no exits to be split at")
    choices = [segment.depth for segment in model.segments()[:-1]]
    ascending = all(before < after for before, after in zip(positions, positions[1:], strict=False))
    if not positions or not ascending or not set(positions) <= set(choices):
        raise ValueError(
            f"positions={list(positions)}: a highway is split behind exits, here at {choices or 'none'}; give some of "
            "them, ascending"
        )
    policy = model.exit_policy
    if format == "safetensors" and model.config.model_type not in HIGHWAYS:
        raise ValueError(f"format='safetensors': parts of a {type(model).__name__} are split as format='onnx'")
    known = EXPORTABLE if format == "onnx" else POLICIES
    if policy.name not in known:
        raise ValueError(
            f"exit_policy {policy.name!r} cannot travel with format={format!r}; it takes {', '.join(known)}"
        )


def _cuts(model: PreTrainedModel, positions: Sequence[int]) -> list[_Cut]:
    """The segments of each part; the blocks before a skipped exit join those after it."""
    segments, policy = model.segments(), model.exit_policy
    evaluated, last = exits_that_run(policy, len(segments)), len(segments) - 1
    ends = [*(index for index, segment in enumerate(segments[:-1]) if segment.depth in positions), last]
    cuts, state, start = [], State({"pixel_values": example_image(model)}), 0
    for number, end in enumerate(ends):
        indices = [index for index in range(start, end + 1) if index in evaluated or index == end]
        exits, first, here = [], state, merged_segments(segments, indices, start)
        for index, segment in zip(indices, here, strict=True):
            leave = "policy" if index in evaluated else "nobody"
            if index == last or (leave == "policy" and policy.name == "fixed"):
                leave = "everybody"
            exits.append({"index": index, "leave": leave, "grid": state.grid and list(state.grid)})
            state = segment.advance(state)
        cuts.append(_Cut(number, start, exits, here, first))
        start = end + 1
    return cuts


def _described(
    model: PreTrainedModel,
    cuts: list[_Cut],
    positions: list[int],
    format: str,
    processor: BaseImageProcessor | None,
) -> list[PartInfo]:
    policy, depths = model.exit_policy, [segment.depth for segment in model.segments()]
    memory = policy.start(1, "cpu")
    carried = {f"{MEMORY}{name}": tensor for name, tensor in memory.items()}
    states = [cut.state.tensors if cut.index == 0 else {**cut.state.tensors, **carried} for cut in cuts]
    arrays = [{name: _array(tensor) for name, tensor in state.items()} for state in states] + [{}]
    settings = {"policy": policy.to_dict(), "positions": positions, "depths": depths}
    digest = hashlib.sha256((weights_digest(model) + json.dumps(settings)).encode()).hexdigest()
    image = None if processor is None else _image_settings(processor, model.config.num_channels)
    return [
        PartInfo(
            model=digest,
            index=cut.index,
            parts=len(cuts),
            format=format,
            takes=arrays[cut.index],
            gives=arrays[cut.index + 1],
            memory={name: tensor.item() for name, tensor in memory.items()},
            depths=depths,
            start=cut.start,
            exits=cut.exits,
            policy=policy.to_dict(),
            labels=[str(model.config.id2label[index]) for index in range(model.config.num_labels)],
            image=image if cut.index == 0 else None,
            files={},
            versions={name: version(name) for name in ("lgvit_hf", "torch", "transformers")},
        )
        for cut in cuts
    ]


def _array(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}


def _image_settings(processor: BaseImageProcessor, num_channels: int) -> dict[str, Any] | None:
    """How numpy and pillow do what the processor does; nothing, and a warning, where they cannot."""
    try:
        return checked_pixel_settings(processor, num_channels)
    except ValueError as error:
        warnings.warn(
            f"the first part takes pixel_values, no images: numpy and pillow cannot do what the image processor does "
            f"({error})",
            stacklevel=2,
        )
        return None


def _write_onnx(model: PreTrainedModel, cuts: list[_Cut], folder: Path) -> list[list[str]]:
    try:
        import onnx
    except ImportError as error:
        raise ImportError('parts in ONNX need onnx and onnxruntime: pip install "lgvit-hf[onnx]"') from error
    exits = [exit["index"] for cut in cuts for exit in cut.exits]
    sizes = zip(exits, weight_bytes(model, exits), strict=True)
    check_file_sizes({f"segment_{index:02}.onnx": size for index, size in sizes}, "use format='safetensors'")
    stretches = dict(zip(exits, export_parts(model, exits), strict=True))
    decision = export_decision(model.exit_policy, model.config.num_labels)
    names = []
    for cut in cuts:
        part = folder / f"part{cut.index}"
        part.mkdir()
        names.append([*(f"segment_{exit['index']:02}.onnx" for exit in cut.exits), "decision.onnx"])
        models = [*(stretches[exit["index"]].model for exit in cut.exits), decision.model]
        for name, content in zip(names[-1], models, strict=True):
            onnx.save(content, part / name)
        shutil.copytree(Path(__file__).parent / "device", part / RUNNER, ignore=shutil.ignore_patterns("__pycache__"))
    return names


def _write_safetensors(model: PreTrainedModel, cuts: list[_Cut], folder: Path) -> list[list[str]]:
    held = model.state_dict()
    for cut in cuts:
        with Read() as read:
            run_all(cut.segments, cut.state)
        used = {
            name: tensor.contiguous()
            for name, tensor in held.items()
            if tensor.untyped_storage().data_ptr() in read.storages
        }
        # upstream's own writing: under the names that files have, whatever this version calls its modules
        PreTrainedModel.save_pretrained(model, folder / f"part{cut.index}", state_dict=used)
    return [["config.json", WEIGHTS] for _ in cuts]


def _verify(model: PreTrainedModel, folder: Path, infos: list[PartInfo]) -> dict[str, Any]:
    """Run the parts as a chain against the model."""
    evaluated = [exit["index"] for info in infos for exit in info.exits if exit["leave"] != "nobody"]
    parts = [open_part(folder / f"part{info.index}", threads=torch.get_num_threads()) for info in infos]

    def answer(policy: ExitPolicy, images: Tensor) -> Answers:
        for part in parts:
            part.set_policy(policy.to_dict())
        return run_chain(parts, {"pixel_values": images.numpy()})

    return verify_answers(model, evaluated, answer, "the parts do not answer")


def run_chain(parts: Sequence[Any], inputs: dict[str, np.ndarray]) -> Answers:
    """The answers of parts in a row, in one process.

    Args:
        parts (`Sequence`): Opened, all of one split.
        inputs (`dict[str, np.ndarray]`): What the first takes.
    """
    answers, rows, state = parts[0](inputs)
    for part in parts[1:]:
        if not len(rows):
            break
        deeper, further, state = part(state)
        for name, array in deeper.items():
            answers[name][rows] = array
        rows = rows[further]
    order = ("logits", "exit_index", "exit_layer", "exit_score")
    return Answers(*(torch.from_numpy(answers[name]) for name in order))
