"""Files of an exported folder, open in a runtime; without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..serving.device.loop import ANSWERS
from ..serving.device.session import open_session
from .manifest import Manifest
from .openvino_session import open_openvino

OUTPUTS = {
    "single": {*ANSWERS},
    "segments": {"logits"},
    "all_exits": {"logits", "exit_logits"},
}


class Session(Protocol):
    """One ONNX file, open in a runtime: what is used of `onnxruntime.InferenceSession`."""

    def get_inputs(self) -> list[Any]:
        """Inputs that must be given: `name`, `type` and `shape`."""

    def get_overridable_initializers(self) -> list[Any]:
        """Inputs that may be given."""

    def get_outputs(self) -> list[Any]:
        """Outputs, likewise."""

    def run(self, names: Sequence[str] | None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """These outputs, or all."""


class Runtime(NamedTuple):
    """How a runtime opens a file with a number of threads, and the `thresholds` of files to which it gives none."""

    open: Callable[[Path, int | None], Session]
    fixed: tuple[str, ...]


# OpenVINO knows no inputs with a default
SESSIONS = {
    "onnxruntime": Runtime(open_session, ("fixed",)),
    "openvino": Runtime(open_openvino, ("fixed", "optional")),
}


def check_runtime(runtime: str | None) -> None:
    """Raise `ValueError` for a runtime that there is not; `None` stands for the first."""
    if runtime not in (None, *SESSIONS):
        raise ValueError(f"runtime={runtime!r} is none of {', '.join(SESSIONS)}")


def open_sessions(folder: Path, manifest: Manifest, open_file: Callable[[Path], Session]) -> list[Session]:
    """Open the files of an exported folder, in the order in which they run, and check that they fit together.

    Raises:
        ValueError: A file does not open, or does not take what it is given or give what its layout promises.
    """
    sessions: list[Session] = []
    given = {"pixel_values", *(manifest.inputs if manifest.thresholds == "input" else ())}
    for name in manifest.files:
        file = folder / name
        session = open_file(file)
        needed = {entry.name for entry in session.get_inputs()}
        found = {entry.name for entry in session.get_outputs()}
        missing = sorted((needed - given) | (OUTPUTS[manifest.layout] - found))
        if not needed or missing:
            raise ValueError(f"{file} is no {manifest.layout!r} highway: {missing or 'an input'} is missing")
        if not sessions and not _takes_images(session):
            raise ValueError(f"{file}: pixel_values is not (batch, channels, height, width)")
        sessions.append(session)
        given = {entry.removesuffix("_out") for entry in found}
    return sessions


def _takes_images(session: Any) -> bool:
    entry = session.get_inputs()[0]
    sizes = list(entry.shape)[1:]
    return entry.type.startswith("tensor(float") and len(sizes) == 3 and all(isinstance(size, int) for size in sizes)
