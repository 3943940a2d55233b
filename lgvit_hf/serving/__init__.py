"""Highways that answer for others, in batch engines and as services."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "ray_app":  # takes what the extra `ray` installs
        from .ray_serve import ray_app

        return ray_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
