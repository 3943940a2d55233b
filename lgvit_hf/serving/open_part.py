"""What can be served: a part of a split highway of either format, or a whole one. Imports what that takes, no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .device.info import PART_FILE, PartInfo
from .device.remote import Runs


def open_part(folder: str | Path, *, threads: int | None = None) -> Any:
    """A part that `split` wrote, of either format.

    Args:
        folder (`str` or `Path`): Of the part.
        threads (`int`, *optional*): Of an ONNX part; one in PyTorch uses as many as PyTorch does.

    Raises:
        ImportError: onnxruntime is not installed, and the part takes it.
        OSError: There is no part.
        ValueError: It is damaged.
    """
    if PartInfo.load(folder).format == "safetensors":
        from .torch_part import TorchPart

        return TorchPart(folder)
    try:
        from .device.part import Part
    except ImportError as error:
        raise ImportError('ONNX parts run in ONNX Runtime: pip install "lgvit-hf[onnx]"') from error
    return Part(folder, threads=threads)


def open_any(
    path: str | Path, *, policy: dict[str, Any] | None = None, max_batch_size: int = 32, threads: int | None = None
) -> Runs:
    """A part, or a whole highway as the only part there is.

    Args:
        path (`str` or `Path`): Folder of a part, of a checkpoint or of an exported highway, or a Hub id.
        policy (`dict`, *optional*): Exit policy of a whole highway, instead of the saved one.
        max_batch_size (`int`, *optional*, defaults to 32): Rows that a whole highway runs at once.
        threads (`int`, *optional*): Of the processor.

    Raises:
        OSError, ValueError: There is no such thing, or it is damaged; a part was given another policy.
    """
    is_part = (Path(path) / PART_FILE).is_file()
    if is_part and PartInfo.load(path).format == "onnx":
        part = open_part(path, threads=threads)
    else:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        if is_part:
            part = open_part(path)
        else:
            from .whole_model import Whole

            return Whole(path, policy, max_batch_size=max_batch_size)
    if policy is not None:
        raise ValueError(f"{path}: the policy of a part is that of its split; split the model again for another")
    return part
