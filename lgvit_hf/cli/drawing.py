"""What the pictures of several commands have in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.processing import ProcessedImages

UNIT = "million MACs per image, heads counted"


def check_can_draw(file: str | None = None) -> None:
    """Raise `ImportError` where there is no matplotlib, and `ValueError` where `file` is a folder."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('figures are drawn with matplotlib: pip install "lgvit-hf[plots]"')
    if file is not None and Path(file).is_dir():
        raise ValueError(f"{file} is a folder; give the PNG's file name")


def point(macs: float, accuracy: float) -> dict[str, float]:
    """A point of a picture, `cost` in million MACs."""
    return {"cost": macs / 1e6, "accuracy": accuracy}


def points(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Rows of a sweep as points of a picture."""
    return [point(row["mean_macs"], row["accuracy"]) for row in rows]


def evaluated(name: str, overall: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The points of a report's `overall`: the policy, as `name`, and the full model."""
    full = point(overall["backbone_macs"], overall["accuracy_full_model"])
    return {name: point(overall["mean_macs"], overall["accuracy"]), "full model": full}


class StoredImages(Sequence[Any]):
    """The images of a dataset as they are stored, decoded when they are looked at."""

    def __init__(self, dataset: ProcessedImages):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset.picture(index)
