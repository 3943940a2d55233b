"""Opening and running an ONNX file in ONNX Runtime: errors a caller can act on, and nothing read but the file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

NO_WEIGHTS = "session.model_external_initializers_file_folder_path"
ELSEWHERE = ("xternal data", "external TensorProto", "Data of TensorProto")


def open_session(
    file: Path, threads: int | None, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> onnxruntime.InferenceSession:
    """Open an ONNX file that holds all its weights, without warnings.

    Args:
        file (`Path`): The file.
        threads (`int`, *optional*): Of one operator; by default as ONNX Runtime chooses.
        providers (`Sequence`, *optional*): ONNX Runtime's execution providers.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: ONNX Runtime does not take it: damaged, or with weights in other files.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('ONNX files run in ONNX Runtime: pip install "lgvit-hf[onnx]"') from error
    options = onnxruntime.SessionOptions()
    # thresholds are inputs with a default, which it would otherwise warn of
    options.log_severity_level = 3
    # its threads would go on spinning after an answer, on cores that others need
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # weights in other files are looked for in a file, as if it were a folder, where nothing can be
    options.add_session_config_entry(NO_WEIGHTS, os.path.join(os.devnull, "none"))
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(file, options, providers=list(providers))
        # in a damaged file a name, of a size even, need not be text
        [(entry.name, entry.shape) for entry in (*session.get_inputs(), *session.get_outputs())]
        return session
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's errors have no base class of their own
        reason = str(error).strip().partition("\n")[0]
        if any(words in reason for words in ELSEWHERE):
            reason = f"weights in other files are not read: {reason}"
        raise ValueError(f"{file} does not open in ONNX Runtime; export or split again ({reason})") from error


def run_session(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of a session by name; feeds that it has no use for are no inputs of it."""
    names = [entry.name for entry in session.get_outputs()]
    given = {entry.name: feeds[entry.name] for entry in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def run_segment(session: onnxruntime.InferenceSession, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state after a segment's file, with the `logits` of its exit; the last file gives these alone."""
    return {name.removesuffix("_out"): array for name, array in run_session(session, state).items()}
