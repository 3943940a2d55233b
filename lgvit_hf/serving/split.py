"""`split`: a highway cut at exits into parts for device, edge and cloud, chained and compared before they are kept."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..engine import Answers, run_all
from ..evaluation.costs import Highway
from ..evaluation.exit_table import weights_digest
from ..export.infer import checked_pixel_settings
from ..export.segment_graphs import EXPORTABLE, Read, check_file_sizes, export_decisions, export_parts, weight_bytes
from ..export.verification import verify_answers
from ..files import replace_folder, write_json
from ..hub.loading import HIGHWAYS, example_image
from ..modeling_highway import HighwayMixin
from ..policies import POLICIES, ExitPolicy
from ..runtimes.manifest import exits_that_run
from ..segments import Segment, State
from .device.info import MEMORY, PART_FILE, PART_FORMATS, WEIGHTS, Array, Exit, PartInfo, file_digest
from .device.loop import ANSWERS, Arrays, Runs
from .device.pixels import PixelSettings
from .open_part import open_part
from .torch_part import TorchPart, merged_segments

if TYPE_CHECKING:
    from .device.part import Part

# the folder beside an ONNX part with what runs it
RUNNER = "lgvit_part"


@dataclass(frozen=True)
class _Cut:
    """A part before it is written: its description, still without digests, its segments, and what comes in."""

    info: PartInfo
    segments: list[Segment]
    state: State

    def folder(self, home: Path) -> Path:
        """Where the part lies in the folder of all."""
        return home / f"part{self.info.index}"


@torch.no_grad()
def split(
    model: HighwayMixin,
    positions: Sequence[int],
    folder: str | Path,
    format: str = "safetensors",
    *,
    processor: BaseImageProcessor | None = None,
) -> list[PartInfo]:
    """Cut a highway after exits into parts that run on machines in a row, and keep them only if they answer alike.

    Every part answers the samples that exit early in it and gives the state of the others, with the policy's memory.
    Of each part the last exit is run even where the policy skips it: its answer stands in when no deeper part can be
    reached.

    Args:
        model (`HighwayMixin`): A highway, with its exit policy; split in `eval()` mode and float32, on the CPU.
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
    model = copy.deepcopy(model).train(False).cpu().float()
    image = None if processor is None else _image_settings(processor, model.config.num_channels)
    cuts = _cuts(model, list(positions), format, image)
    with replace_folder(folder) as new:
        write = _write_onnx if format == "onnx" else _write_safetensors
        write(model, cuts, new)
        infos = []
        for cut in cuts:
            files = {name: file_digest(cut.folder(new) / name) for name in cut.info.files}
            infos.append(replace(cut.info, files=files))
            write_json(cut.folder(new) / PART_FILE, infos[-1].as_json())
        checks = _verify(model, [open_part(cut.folder(new), threads=torch.get_num_threads()) for cut in cuts])
        infos = [replace(info, checks=checks) for info in infos]
        for cut, info in zip(cuts, infos, strict=True):
            write_json(cut.folder(new) / PART_FILE, info.as_json())
    return infos


def _check(model: HighwayMixin, positions: Sequence[int], format: str) -> None:
    if format not in PART_FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(PART_FORMATS)}")
    if model.config.model_type == "avit":
        raise ValueError("an AViT has no exits to be split at")
    choices = [segment.depth for segment in model.segments()[:-1]]
    if not positions or sorted({*positions} & {*choices}) != list(positions):
        raise ValueError(
            f"positions={list(positions)}: a highway is split after exits, here at {choices or 'none'}; give some of "
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


def _cuts(model: HighwayMixin, positions: list[int], format: str, image: PixelSettings | None) -> list[_Cut]:
    """The parts; the blocks before a skipped exit join those after it."""
    segments, policy = model.segments(), model.exit_policy
    depths, evaluated = [segment.depth for segment in segments], exits_that_run(policy, len(segments))
    decides = {"policy": policy.to_dict(), "ensemble": model.config.exit_ensemble}
    settings = json.dumps({**decides, "positions": positions, "depths": depths})
    memory = model.answering_policy.start(1, "cpu")
    described = partial(
        PartInfo,
        model=hashlib.sha256(f"{weights_digest(cast(Highway, model))}{settings}".encode()).hexdigest(),
        parts=len(positions) + 1,
        format=format,
        memory={name: tensor[0].tolist() for name, tensor in memory.items()},
        depths=depths,
        policy=policy.to_dict(),
        labels=[str(model.config.id2label[index]) for index in range(model.config.num_labels)],
        versions={name: version(name) for name in ("lgvit_hf", "torch", "transformers")},
    )
    cuts, start, state = list[_Cut](), 0, State({"pixel_values": example_image(model)})
    takes = _arrays(state.tensors)
    for number, end in enumerate(map(depths.index, [*positions, depths[-1]])):
        indices = [index for index in range(start, end + 1) if index in evaluated or index == end]
        exits, first, here = list[Exit](), state, merged_segments(segments, indices, start)
        for index, segment in zip(indices, here, strict=True):
            leave = "policy" if index in evaluated else "nobody"
            if index == len(depths) - 1 or (leave == "policy" and policy.name == "fixed"):
                leave = "everybody"
            exits.append({"index": index, "leave": leave, "grid": list(state.grid) if state.grid else None})
            state = segment.advance(state)
        carried = {f"{MEMORY}{name}": tensor for name, tensor in memory.items()}
        gives = _arrays({**state.tensors, **carried}) if number < len(positions) else {}
        files = [f"segment_{index:02}.onnx" for index in indices]
        files += (
            [f"decision_{index:02}.onnx" for index in indices]
            if model.answering_policy.differs_by_exit
            else ["decision.onnx"]
        )
        info = described(
            index=number,
            takes=takes,
            gives=gives,
            start=start,
            exits=exits,
            image=image if number == 0 else None,
            files=dict.fromkeys(files if format == "onnx" else ["config.json", WEIGHTS], ""),
        )
        cuts.append(_Cut(info, here, first))
        takes, start = gives, end + 1
    return cuts


def _arrays(tensors: dict[str, Tensor]) -> dict[str, Array]:
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}
        for name, tensor in tensors.items()
    }


def _image_settings(processor: BaseImageProcessor, num_channels: int) -> PixelSettings | None:
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


def _write_onnx(model: HighwayMixin, cuts: list[_Cut], folder: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise ImportError('parts in ONNX need onnx and onnxruntime: pip install "lgvit-hf[onnx]"') from error
    exits = [exit["index"] for cut in cuts for exit in cut.info.exits]
    sizes = zip(exits, weight_bytes(model, exits), strict=True)
    check_file_sizes({f"segment_{index:02}.onnx": size for index, size in sizes}, "use format='safetensors'")
    stretches = dict(zip(exits, export_parts(model, exits), strict=True))
    policy = model.answering_policy
    decisions = dict(
        zip(exits, export_decisions(policy, model.config.num_labels, exits, len(model.exits)), strict=True)
    )
    runner = Path(__file__).parent / "device"
    for cut in cuts:
        part = cut.folder(folder)
        shutil.copytree(runner, part / RUNNER, ignore=shutil.ignore_patterns("__pycache__"))
        models = [stretches[exit["index"]].model for exit in cut.info.exits]
        models += [decisions[exit["index"]].model for exit in cut.info.exits]
        for name, proto in zip(
            cut.info.files, models, strict=False
        ):  # of the decisions the first, where one is for all
            onnx.save(proto, part / name)


def _write_safetensors(model: HighwayMixin, cuts: list[_Cut], folder: Path) -> None:
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
        PreTrainedModel.save_pretrained(model, cut.folder(folder), state_dict=used)


def _verify(model: HighwayMixin, parts: Sequence[Part | TorchPart]) -> dict[str, Any]:
    """Run the parts as a chain against the model."""
    evaluated = [exit["index"] for part in parts for exit in part.info.exits if exit["leave"] != "nobody"]

    def answer(policy: ExitPolicy, images: Tensor) -> Answers:
        for part in parts:
            part.set_policy(policy.to_dict())
        return run_chain(parts, {"pixel_values": images.numpy()})

    return verify_answers(model, evaluated, answer, "the parts do not answer")


def run_chain(parts: Sequence[Runs], inputs: Arrays) -> Answers:
    """The answers of parts in a row, in one process.

    Args:
        parts (`Sequence`): Opened, all of one split.
        inputs (`dict[str, np.ndarray]`): What the first takes.
    """
    answers, samples, state = parts[0](inputs)
    for part in parts[1:]:
        if not len(samples):
            break
        deeper, further, state = part(state)
        for name, array in deeper.items():
            answers[name][samples] = array
        samples = samples[further]
    return Answers(*(torch.from_numpy(answers[name]) for name in ANSWERS))
