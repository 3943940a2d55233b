"""One ONNX file open in OpenVINO, on the CPU, with the interface of ONNX Runtime's session; without PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_TYPES = {"f32": "tensor(float)", "f16": "tensor(float16)", "i64": "tensor(int64)"}


class _Port(NamedTuple):
    name: str
    type: str
    shape: list[int | str]


class _Session:
    """A compiled model with the interface of `onnxruntime.InferenceSession`."""

    def __init__(self, compiled: Any):
        self._request, self._lock = compiled.create_infer_request(), threading.Lock()
        self._inputs, self._outputs = (
            [_port(port) for port in compiled.inputs],
            [_port(port) for port in compiled.outputs],
        )

    def get_inputs(self) -> list[_Port]:
        return self._inputs

    def get_overridable_initializers(self) -> list[_Port]:
        return []

    def get_outputs(self) -> list[_Port]:
        return self._outputs

    def run(self, names: Sequence[str] | None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        # one request serves one caller at a time
        with self._lock:
            found = self._request.infer(feeds)
            held = {port.name: found[place] for place, port in enumerate(self._outputs)}
            return [held[name].copy() for name in names or held]


def _port(port: Any) -> _Port:
    sizes = [size.get_length() if size.is_static else "batch" for size in port.partial_shape]
    kind = port.element_type.get_type_name()
    # a tensor that is only handed on has several names; the node has that of the ONNX output, with a suffix
    name = port.get_node().get_friendly_name().partition("/sink_port_")[0]
    return _Port(name, _TYPES.get(kind, kind), sizes)


def open_openvino(file: Path, threads: int | None, cache_dir: str | Path | None = None) -> _Session:
    """Open an ONNX file.

    Args:
        file (`Path`): The file.
        threads (`int`, *optional*): By default as OpenVINO chooses.
        cache_dir (`str` or `Path`, *optional*): Where OpenVINO keeps what it compiles, for a faster next start.

    Raises:
        ImportError: openvino is not installed.
        ValueError: OpenVINO does not take it.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError('this runtime needs OpenVINO: pip install "lgvit-hf[openvino]"') from error
    settings: dict[str, Any] = {
        # by default, processors that can compute in bfloat16 do so: other answers than those that were calibrated
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads or 0,
        "PERFORMANCE_HINT": "LATENCY",
        # a thread that is bound to a busy core waits for it
        "ENABLE_CPU_PINNING": False,
    }
    if cache_dir is not None:
        settings["CACHE_DIR"] = str(cache_dir)
    try:
        return _Session(openvino.Core().compile_model(str(file), "CPU", settings))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{file} does not open in OpenVINO; export again ({reason})") from error
