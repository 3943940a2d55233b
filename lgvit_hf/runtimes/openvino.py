"""`OVHighway`: an exported highway in OpenVINO, on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .exported import ExportedHighway

_TYPES = {"f32": "tensor(float)", "f16": "tensor(float16)", "i64": "tensor(int64)"}


class OVHighway(ExportedHighway):
    """A folder that `export_onnx` wrote, in OpenVINO; same call and output as `ORTHighway`. See `ExportedHighway`.

    OpenVINO knows no inputs with a default: a single file of `thresholds="optional"` decides by the numbers in it.

    Example:

        >>> model = OVHighway.from_pretrained("onnx/", threads=1)  # doctest: +SKIP
        >>> model(pixel_values).exit_layer  # doctest: +SKIP
    """

    FIXED: ClassVar[tuple[str, ...]] = ("fixed", "optional")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, threads: int | None = None, cache_dir: str | Path | None = None
    ) -> OVHighway:
        """Open an exported folder; its files must be those that were verified when it was written.

        Args:
            folder (`str` or `Path`): What `export_onnx` or `lgvit export` wrote.
            threads (`int`, *optional*): By default as many as PyTorch uses.
            cache_dir (`str` or `Path`, *optional*): Where OpenVINO keeps what it compiles, for a faster next start.

        Raises:
            ImportError: openvino is not installed.
            OSError: There is no exported highway.
            ValueError: A file is not what the manifest says, or `config.json` is of another highway, or asks for a
                policy or numbers that a single file does not take.
        """
        return cls._opened(folder, "openvino", threads, partial(_open, cache_dir=cache_dir))


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


def _open(file: Path, threads: int, cache_dir: str | Path | None) -> _Session:
    try:
        import openvino
    except ImportError as error:
        raise ImportError('OVHighway needs OpenVINO: pip install "lgvit-hf[openvino]"') from error
    settings: dict[str, Any] = {
        # by default, processors that can compute in bfloat16 do so: other answers than those that were calibrated
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
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
