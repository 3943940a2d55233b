"""One binary message: arrays by name and a few words about them, laid out as a safetensors file. Needs numpy alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from .info import Array

CONTENT_TYPE = "application/vnd.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "I64": "int64", "U8": "uint8"}
_CODES = {name: code for code, name in DTYPES.items()}
_HEADER_LIMIT = 1 << 16


class MessageError(ValueError):
    """A message that is not what its receiver takes; says why."""


def pack(arrays: Mapping[str, np.ndarray], words: Mapping[str, str] | None = None) -> bytes:
    """Arrays and words about them as the bytes of a safetensors file.

    Args:
        arrays (`dict[str, np.ndarray]`): float32, float16, int64 or uint8.
        words (`dict[str, str]`, *optional*): What the file calls its metadata.

    Example:

        >>> body = pack({"hidden": np.zeros((2, 3), np.float32)}, {"part": "1"})
        >>> unpack(body, {"hidden": {"dtype": "float32", "shape": [3]}}, {"part": "1"})["hidden"].shape
        (2, 3)
    """
    header: dict[str, Any] = {"__metadata__": dict(words)} if words else {}
    parts, end = [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        parts.append(data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes())
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": _CODES[data.dtype.name], "shape": list(np.shape(array)), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def unpack(
    body: bytes | memoryview,
    wanted: Mapping[str, Array],
    words: Mapping[str, str] | None = None,
    *,
    max_samples: int | None = None,
    finite: bool = True,
) -> dict[str, np.ndarray]:
    """The arrays of a message, all of it checked before any of them is made.

    Args:
        body (`bytes`): What was received.
        wanted (`dict[str, dict]`):
            `dtype` and `shape` of one sample of every array that must be there; no other may be. The batch comes
            first. float32 may be sent as float16.
        words (`dict[str, str]`, *optional*): What the message must say of itself; it may say more.
        max_samples (`int`, *optional*): The largest batch that is taken.
        finite (`bool`, *optional*, defaults to `True`): Whether NaN and infinity are refused.

    Returns:
        Arrays of the dtypes that were wanted, with one batch size of at least 1.

    Raises:
        MessageError: It is no such message, or holds NaN or infinity.
    """
    header, data = _header_of(body)
    said = header.pop("__metadata__", {})
    for name, value in (words or {}).items():
        found = said.get(name) if isinstance(said, dict) else None
        if found != value:
            raise MessageError(f"the message says {name}={_short(found)}, but this is for {name}={_short(value)}")
    if set(header) != set(wanted):
        names = ", ".join(sorted(wanted))
        raise MessageError(f"the message holds {_short(sorted(header))}, but must hold {names}")
    entries = {name: _entry(name, entry, wanted[name]) for name, entry in header.items()}
    samples, end = next(iter(entries.values()))[1][0], 0
    # in the order in which they lie: without a hole, an overlap or a rest
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if shape[0] != samples or samples < 1:
            raise MessageError(f"{name}: {shape[0]} samples, but every array must have the same, and at least one")
        if start != end or stop - start != math.prod(shape) * np.dtype(dtype).itemsize:
            raise MessageError(f"{name}: bytes {start} to {stop} do not hold shape {list(shape)} of {dtype}")
        end = stop
    if end != len(data):
        raise MessageError(f"{len(data)} bytes of data, but the header speaks of {end}")
    if max_samples is not None and samples > max_samples:
        raise MessageError(f"{samples} samples, but at most {max_samples} are taken at once")
    arrays = {}
    for name in wanted:
        dtype, shape, start, _ = entries[name]
        array = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), math.prod(shape), start).reshape(shape)
        if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise MessageError(f"{name}: NaN or infinity in it")
        arrays[name] = array.astype(wanted[name]["dtype"], copy=False)
    return arrays


def _header_of(body: bytes | memoryview) -> tuple[dict[str, Any], memoryview]:
    body = memoryview(body)
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(len(body) - 8, _HEADER_LIMIT):
        raise MessageError(f"{len(body)} bytes that are no safetensors message")
    try:
        header = json.loads(bytes(body[8 : 8 + length]).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MessageError("the message's header is not JSON") from error
    if not isinstance(header, dict):
        raise MessageError("the message's header is not a JSON object")
    return header, body[8 + length :]


def _entry(name: str, entry: object, wanted: Array) -> tuple[str, list[int], int, int]:
    """The dtype, shape, start and end of an array, if they are those that are wanted."""
    fields = entry if isinstance(entry, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None or (dtype != wanted["dtype"] and (dtype, wanted["dtype"]) != ("float16", "float32")):
        raise MessageError(f"{name}: dtype {_short(dtype or code)}, but must be {wanted['dtype']}")
    if not _are_counts(shape) or not shape or shape[1:] != list(wanted["shape"]):
        sizes = ", ".join(map(str, ("samples", *wanted["shape"])))
        raise MessageError(f"{name}: shape {_short(shape)}, but must be [{sizes}]")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise MessageError(f"{name}: data_offsets={_short(offsets)} must be where it starts and ends")
    return dtype, shape, offsets[0], offsets[1]


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
