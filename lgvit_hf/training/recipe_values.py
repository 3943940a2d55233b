"""How the values of `lgvit train`'s options are read, from words and from YAML."""

from __future__ import annotations

import json
from typing import Any

from ..data.settings import parse_yaml, real, whole


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, or its YAML text."""
    if isinstance(value, str):
        value = parse_yaml(value, repr(value[:40]))
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no mapping")
    return value


def policy(value: Any) -> Any:
    """A policy's name or mapping."""
    return mapping(value) if isinstance(value, dict) or "{" in str(value) else str(value)


def adapters(value: Any) -> Any:
    """The rank of LoRA adapters, or a mapping."""
    return mapping(value) if isinstance(value, dict) or "{" in str(value) else whole(-(2**31))(value)


def position(value: Any) -> int | str:
    """A block, or `lgvit`."""
    return value if value == "lgvit" else whole()(value)


def weight(value: Any) -> float | str:
    """A loss weight, or `depth` or `uniform` for all."""
    return value if value in ("depth", "uniform") else real()(value)


def resumption(value: Any) -> str | None:
    """`auto`, a folder, or nothing; YAML's true and false mean the first and the last."""
    return {True: "auto", False: None}[value] if isinstance(value, bool) else str(value)


def boolean(value: Any) -> bool:
    """True or false, in any of the words that `HfArgumentParser` knows."""
    from transformers.hf_argparser import string_to_bool

    return string_to_bool(str(value))


def text(value: Any) -> str:
    """The value as a word; a mapping as JSON."""
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)


integer = whole(-(2**31))
boolean.__name__, integer.__name__ = "true or false", "a whole number"
