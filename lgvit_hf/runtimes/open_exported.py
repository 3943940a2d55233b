"""`open_exported`: an exported folder in one of several runtimes."""

from __future__ import annotations

from pathlib import Path

from .exported import ExportedHighway
from .manifest import is_exported
from .onnxruntime import ORTHighway
from .openvino import OVHighway
from .sessions import check_runtime

RUNTIMES: dict[str, type[ORTHighway] | type[OVHighway]] = {"onnxruntime": ORTHighway, "openvino": OVHighway}


def open_exported(
    folder: str | Path, runtime: str | None = None, threads: int | None = None
) -> ExportedHighway | None:
    """Open what `lgvit export` wrote; `None` where there is something else.

    Args:
        folder (`str` or `Path`): The folder.
        runtime (`str`, *optional*, defaults to `"onnxruntime"`): One of `RUNTIMES`.
        threads (`int`, *optional*): By default as many as PyTorch uses.

    Raises:
        ImportError: The runtime is not installed.
        OSError, ValueError: See `ORTHighway.from_pretrained`; an unknown runtime, or one for something else.
    """
    check_runtime(runtime)
    if is_exported(folder):
        return RUNTIMES[runtime or "onnxruntime"].from_pretrained(folder, threads=threads)
    if runtime is not None:
        raise ValueError(f"runtime={runtime!r} is for an exported folder (`lgvit export`), which {folder} is not")
    return None
