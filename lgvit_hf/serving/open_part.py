"""What can be served: a part of a split highway of either format, or a whole one. Imports what that takes, no more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device.info import PART_FILE, PartInfo

if TYPE_CHECKING:
    from .device.part import Part
    from .torch_part import TorchPart
    from .whole_model import Whole


def open_part(folder: str | Path, *, threads: int | None = None) -> Part | TorchPart:
    """A part that `split` wrote, of either format.

    Args:
        folder (`str` or `Path`): Of the part.
        threads (`int`, *optional*): Of the processor.

    Raises:
        ImportError: onnxruntime is not installed, and the part takes it.
        OSError: There is no part.
        ValueError: It is damaged.
    """
    if PartInfo.load(folder).format == "onnx":
        from .device.part import Part

        return Part(folder, threads=threads)
    from .torch_part import TorchPart

    return TorchPart(folder, threads=threads)


def open_any(
    path: str | Path,
    *,
    policy: dict[str, Any] | None = None,
    max_batch_size: int = 32,
    threads: int | None = None,
    runtime: str | None = None,
) -> Part | TorchPart | Whole:
    """A part, or a whole highway as the only part there is.

    Args:
        path (`str` or `Path`): Folder of a part, of a checkpoint or of an exported highway, or a Hub id.
        policy (`dict`, *optional*): Exit policy of a whole highway, instead of the saved one.
        max_batch_size (`int`, *optional*, defaults to 32): Samples that a whole highway runs at once.
        threads (`int`, *optional*): Of the processor.
        runtime (`str`, *optional*): Of an exported highway, see `open_exported`.

    Raises:
        OSError, ValueError: There is no such thing, or it is damaged; a part was given another policy or a runtime.
    """
    if (Path(path) / PART_FILE).is_file():
        if policy is not None:
            raise ValueError(f"{path}: the policy of a part is that of its split; split the model again for another")
        if runtime is not None:
            raise ValueError(f"{path}: --runtime {runtime} is for a whole exported highway; a part has its format")
        return open_part(path, threads=threads)
    from .whole_model import Whole

    return Whole(path, policy, max_batch_size=max_batch_size, runtime=runtime, threads=threads)
