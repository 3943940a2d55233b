"""The images of `lgvit grow`: which of them exits are trained on, and which they are chosen on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.datasets import class_names, load_unlabelled, refuse_broken, require_datasets
from ..data.held_out import (
    TrainingData,
    doubt,
    load_known,
    read_training_data,
    seen_warning,
    splits_of_training,
)

if TYPE_CHECKING:
    import datasets

    from .cached_states import Samples

logger = logging.getLogger(__name__)

SHARE = 0.2


@dataclass(frozen=True)
class ToGrow:
    """Images for exits, and how they are divided.

    Args:
        images (`Samples`): All of them.
        history (`list[TrainingData]`): What backbone and exits are trained on, for the folder of the model.
        num_trained (`int`, *optional*): The exits are trained on the first so many; `None`: on any of them.
        validation_share (`float`, *optional*, defaults to 0.2): Share to choose on, where `num_trained` is `None`.
        samples (`dict`, *optional*): Source and splits, for the report.
    """

    images: Samples
    history: list[TrainingData]
    num_trained: int | None = None
    validation_share: float = SHARE
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What tells a stopped run with these images from others."""
        return {} if self.num_trained is None else {"split": self.history[-1].digest}

    def drawn(self, order: Sequence[int], count: int) -> tuple[list[int], int]:
        """Some images in a random order, those to train on first, and the number of these.

        Args:
            order (`Sequence[int]`): All indices in a random order.
            count (`int`): Of images to take.

        Example:

            >>> ToGrow(range(6), [], num_trained=4).drawn([5, 0, 4, 2, 1, 3], 3)
            ([0, 2, 5], 2)
        """
        if self.num_trained is None:
            return list(order[:count]), count - max(1, round(count * self.validation_share))
        first = [index for index in order if index < self.num_trained]
        held_out = [index for index in order if index >= self.num_trained]
        number = _num_held_out(count, len(first), len(held_out))
        return first[: count - number] + held_out[:number], count - number

    def as_text(self) -> str:
        """Which samples they are, in a line."""
        data = self.samples
        if self.num_trained is None:
            return f"images of {data['data']}, divided at random"
        how = f"split by seed {data['seed']} and validation share {data['validation_share']:g}"
        known = ", as in the training of the backbone" if data["warning"] is None else ""
        return f"images of {data['data']}: train for the exits, validation for the choice; {how}{known}"


def _num_held_out(count: int, num_trained: int, num_held_out: int) -> int:
    """Of so many images, how many are from those that are held out, by their share; at least one of either."""
    return min(max(1, round(count * num_held_out / (num_trained + num_held_out))), count - 1)


def images_to_grow(
    dataset: str | Samples,
    checkpoint: str | os.PathLike | None,
    *,
    limit: int | None,
    ignore_labels: bool,
    validation_share: float | None,
    seed: int,
) -> ToGrow:
    """The images of a source, divided as in the backbone's training if that had them; warns where that is not known.

    Args:
        dataset (`str` or `Samples`): A source for `load_images` or `load_unlabelled`, or the images.
        checkpoint (`str` or path, *optional*): The backbone; `None` if it has no folder.
        limit, ignore_labels, validation_share, seed: See `grow`.
    """
    folder = None if checkpoint is None else os.fspath(checkpoint)
    history = [] if folder is None else read_training_data(folder)
    # where it is not known what a model was trained on, its history begins with that
    known = history or [TrainingData(None)]
    share = SHARE if validation_share is None else validation_share
    if not isinstance(dataset, str):
        return ToGrow(dataset, [*known, TrainingData(None)], validation_share=share)
    given: dict[str, Any] = {} if validation_share is None else {"validation_share": validation_share}
    labelled = class_names(load_unlabelled(dataset, limit=1)) is not None
    if labelled and (not ignore_labels or splits_of_training(dataset, history, given)):
        found = load_known(dataset, folder or "the model", **given, defaults=(seed, share))
        splits = found.splits.train, found.splits.validation
        if limit is not None and limit < sum(map(len, splits)):
            number = _num_held_out(limit, *map(len, splits))
            splits = _some(splits[0], limit - number, seed), _some(splits[1], number, seed)
        images = require_datasets().concatenate_datasets(splits)
        if Path(dataset).is_dir():
            refuse_broken(images)
        warning, samples = found.warning("validation"), found.samples("validation")
        history = [*known, replace(found.data, used=("train", "validation"))]
        num_trained: int | None = len(splits[0])
    else:
        images, num_trained = load_unlabelled(dataset, limit=limit, seed=seed), None
        warning = seen_warning(str(checkpoint or "the model"), dataset, doubt(dataset, history) or "")
        samples = {"data": dataset, "split": None, "warning": warning}
        history = [*known, TrainingData(dataset, used=("train", "validation"))]
    if warning is not None:
        logger.warning(warning)
    return ToGrow(images, history, num_trained, share, samples)


def _some(images: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """So many of them, drawn at random, in their order."""
    return images.select(sorted(np.random.default_rng(seed).permutation(len(images))[:count]))
