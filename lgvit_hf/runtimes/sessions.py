"""Opening an exported file in ONNX Runtime: errors a caller can act on, and nothing read but the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from .manifest import Manifest

NO_WEIGHTS = "session.model_external_initializers_file_folder_path"
OUTPUTS = {
    "single": {"logits", "exit_layer", "exit_index", "exit_score"},
    "segments": {"logits"},
    "all_exits": {"logits", "exit_logits"},
}


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """How exported files are opened: without weights from other files, and without warnings of their making.

    Args:
        threads (`int`, *optional*): Of one operator; by default as ONNX Runtime chooses.
    """
    options = onnxruntime.SessionOptions()
    # thresholds are inputs with a default, which it would otherwise warn of
    options.log_severity_level = 3
    # weights in other files are looked for behind a file, as if it were a folder, where nothing can be
    options.add_session_config_entry(NO_WEIGHTS, os.path.join(os.devnull, "none"))
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def open_session(
    file: str | Path,
    options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Open an ONNX file that holds all its weights, as every exported one does.

    Args:
        file (`str` or `Path`): The file.
        options (`onnxruntime.SessionOptions`, *optional*): As `session_options` gives them.
        providers (`Sequence`, *optional*): ONNX Runtime's execution providers.

    Raises:
        OSError: There is no such file.
        ValueError: ONNX Runtime does not take it: damaged, or with weights in other files.
    """
    file = Path(file)
    if not file.is_file():
        raise OSError(f"{file}: no such file")
    options = options or session_options()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=list(providers))
        # in a damaged file a name, of a size even, need not be text
        [(entry.name, entry.shape) for entry in (*session.get_inputs(), *session.get_outputs())]
        return session
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's errors have no base class of their own
        reason = str(error).strip().partition("\n")[0]
        if any(words in reason for words in ("xternal data", "external TensorProto", "Data of TensorProto")):
            reason = f"weights in other files are not read: {reason}"
        raise ValueError(f"{file} does not open in ONNX Runtime; export it again ({reason})") from error


def open_sessions(
    folder: str | Path,
    manifest: Manifest,
    options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
) -> list[onnxruntime.InferenceSession]:
    """Open the files of an exported folder, in the order in which they run, and check that they fit together.

    Args:
        folder (`str` or `Path`): Where they are.
        manifest (`Manifest`): Of that folder, checked when it was loaded.
        options (`onnxruntime.SessionOptions`, *optional*), providers (`Sequence`, *optional*): See `open_session`.

    Raises:
        OSError: A file is missing.
        ValueError: A file does not open, or does not take what it is given or give what its layout promises.
    """
    sessions: list[onnxruntime.InferenceSession] = []
    given = {"pixel_values"}
    for name in manifest.files:
        file = Path(folder) / name
        session = open_session(file, options, providers)
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


def _takes_images(session: onnxruntime.InferenceSession) -> bool:
    entry = session.get_inputs()[0]
    sizes = list(entry.shape)[1:]
    return entry.type.startswith("tensor(float") and len(sizes) == 3 and all(isinstance(size, int) for size in sizes)
