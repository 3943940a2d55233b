"""KServe's V2 protocol (Open Inference Protocol) over HTTP: tensors as JSON or as bytes after it.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md; bytes after JSON:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from .admission import Refused
from .device.info import PartInfo
from .device.loop import Arrays
from .model_version import Served

JSON_LENGTH = "inference-header-content-length"
SERVER = {"name": "lgvit serve", "version": __version__, "extensions": ["binary_tensor_data"]}
DTYPES = {"FP32": "<f4", "FP16": "<f2", "INT64": "<i8", "UINT8": "u1"}
_CODES = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8"}
# of JSON, which is parsed in one go, without a chance for other requests; bytes after it are not limited by this
JSON_BYTES = 4 << 20


@dataclass(frozen=True)
class Asked:
    """A request, read: its tensors, or what image files hold; and which outputs are wanted, in bytes or in JSON."""

    id: str | None
    inputs: Arrays
    images: list[bytes] | None
    outputs: dict[str, bool]


def model_name(served: Served) -> str:
    """By which a model is known: its folder's name."""
    return Path(served.highway.part.folder).resolve().name


def check_model(request: Request, served: Served) -> None:
    """Raise `Refused` for the path of another model or version."""
    name, version = model_name(served), request.path_params.get("version", str(served.version))
    if (request.path_params["model"], version) != (name, str(served.version)):
        raise Refused(404, f"there is model {name!r} in version {served.version}")


def metadata(served: Served) -> dict[str, Any]:
    """What KServe asks of a model; `image` takes what image files hold, instead of the first input."""
    info = served.info
    inputs = [_described(name, array) for name, array in info.takes.items()]
    if info.index == 0:
        inputs.append({"name": "image", "datatype": "BYTES", "shape": [-1]})
    return {
        "name": model_name(served),
        "versions": [str(served.version)],
        "platform": f"lgvit_{info.format}",
        "inputs": inputs,
        "outputs": [_described(name, array) for name, array in info.answers.items()],
    }


def read(body: bytes, headers: Mapping[str, str], info: PartInfo, most: int) -> Asked:
    """A request to `.../infer`, all of it checked.

    Raises:
        Refused: It is not as the protocol says, or holds other tensors than the model takes.
    """
    length = _whole(headers.get(JSON_LENGTH, str(len(body))))
    if length is None or length > len(body):
        raise Refused(400, f"{JSON_LENGTH}={headers.get(JSON_LENGTH, '')[:40]!r} is no length within the body")
    head, data = body[:length], memoryview(body)[length:]
    if length > JSON_BYTES:
        raise Refused(413, f"{length} bytes of JSON, but at most {JSON_BYTES} are taken; send tensors as binary data")
    try:
        said = json.loads(head)
        given, outputs = said["inputs"], said.get("outputs")
        parameters = said.get("parameters") or {}
        names = {tensor["name"] for tensor in given}
        wanted = ({"image"} if "image" in names else set(info.takes)) if info.index == 0 else set(info.takes)
        if names != wanted or len(given) != len(wanted):
            raise Refused(400, f"inputs: {sorted(map(str, names))[:5]} must be {sorted(wanted)}")
        found: dict[str, Any] = {}
        for tensor in given:
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            piece = None if size is None else _piece(data, size)
            data = data[len(piece) :] if piece is not None else data
            found[tensor["name"]] = _tensor(tensor, piece, info.takes, most)
        if len(data):
            raise Refused(400, f"{len(data)} bytes after the last tensor")
        asked = _outputs(outputs, bool(parameters.get("binary_data_output", False)), info)
        identity = said.get("id")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise Refused(400, f"not a request of KServe V2 ({type(error).__name__}: {error})") from error
    images = found.pop("image", None)
    if len({len(array) for array in found.values()}) > 1:
        raise Refused(400, "every input must have the same number of samples")
    return Asked(None if identity is None else str(identity)[:200], found, images, asked)


def answered(asked: Asked, served: Served, answers: Arrays) -> Response:
    """The response, tensors in the form that was asked for."""
    outputs, pieces = [], []
    for name, binary in asked.outputs.items():
        array = np.ascontiguousarray(answers[name])
        entry: dict[str, Any] = {"name": name, "datatype": _CODES[array.dtype.name], "shape": list(array.shape)}
        if binary:
            pieces.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            entry["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            # JSON has no NaN
            entry["data"] = [None if value != value else value for value in array.ravel().tolist()]
        outputs.append(entry)
    said: dict[str, Any] = {"model_name": model_name(served), "model_version": str(served.version), "outputs": outputs}
    if asked.id is not None:
        said["id"] = asked.id
    if not pieces:
        return JSONResponse(said)
    head = json.dumps(said).encode()
    return Response(
        b"".join([head, *pieces]), headers={JSON_LENGTH: str(len(head))}, media_type="application/octet-stream"
    )


def _described(name: str, array: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "datatype": _CODES[array["dtype"]], "shape": [-1, *array["shape"]]}


def _outputs(outputs: Any, binary: bool, info: PartInfo) -> dict[str, bool]:
    """Which outputs are wanted, and whether as bytes; all of them where none is named."""
    if not outputs:
        return dict.fromkeys(info.answers, binary)
    asked = {each["name"]: bool((each.get("parameters") or {}).get("binary_data", binary)) for each in outputs}
    unknown = sorted(set(asked) - set(info.answers))
    if unknown:
        raise Refused(400, f"outputs: {unknown[0][:40]!r} must be one of {', '.join(info.answers)}")
    return asked


def _tensor(tensor: Any, piece: memoryview | None, takes: Mapping[str, Any], most: int) -> Any:
    """One input: an array, or the bytes of each image."""
    name, shape, code = tensor["name"], tensor["shape"], tensor["datatype"]
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape) or not shape:
        raise Refused(400, f"{name}: shape {str(shape)[:80]} must be positive sizes, samples first")
    if shape[0] > most:
        raise Refused(413, f"{shape[0]} samples, but at most {most} are taken at once")
    if name == "image":
        if code != "BYTES" or len(shape) > 2 or math.prod(shape) != shape[0]:
            raise Refused(400, f"image: {code} {shape} must be BYTES of shape [samples], what image files hold")
        if piece is None:
            raise Refused(400, "image: BYTES come as binary data, or as base64 JSON at /predict")
        return _strings(piece, shape[0])
    wanted = takes[name]
    codes = ("FP32", "FP16") if wanted["dtype"] == "float32" else (_CODES[wanted["dtype"]],)
    if code not in codes or shape[1:] != list(wanted["shape"]):
        must = [-1, *wanted["shape"]]
        raise Refused(400, f"{name}: {str(code)[:20]} of shape {shape} must be {' or '.join(codes)} of shape {must}")
    if piece is not None:
        array = np.frombuffer(piece, DTYPES[code])
    elif code == "FP16":
        raise Refused(400, f"{name}: FP16 comes as binary data alone")
    else:
        array = np.asarray(tensor["data"])
        if array.dtype.kind not in "iuf":
            raise Refused(400, f"{name}: data must be numbers")
    if array.size != math.prod(shape):
        raise Refused(400, f"{name}: {array.size} numbers do not fill shape {shape}")
    with np.errstate(over="ignore"):
        array = array.astype(wanted["dtype"]).reshape(shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(400, f"{name}: NaN or infinity in it")
    return array


def _piece(data: memoryview, size: Any) -> memoryview:
    if type(size) is not int or not 0 <= size <= len(data):
        raise Refused(400, f"binary_data_size={str(size)[:40]}, but {len(data)} bytes are left")
    return data[:size]


def _strings(data: memoryview, count: int) -> list[bytes]:
    """BYTES: each with its length before it, in four bytes."""
    found, start = [], 0
    for _ in range(count):
        size = int.from_bytes(data[start : start + 4], "little")
        if start + 4 + size > len(data):
            raise Refused(400, f"image: the bytes do not hold {count} images")
        found.append(bytes(data[start + 4 : start + 4 + size]))
        start += 4 + size
    if start != len(data):
        raise Refused(400, f"image: {len(data) - start} bytes after the last image")
    return found


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else None
