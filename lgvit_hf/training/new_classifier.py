"""`lgvit grow --new-classifier`: a classifier first, on a backbone that has none for the classes of the data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import write_json
from .recipe import train_recipe

# in the folder of the classifier, what it was made with
SETTINGS = "new_classifier.json"


@contextmanager
def with_new_classifier(
    checkpoint: str, dataset: str, output: Path, *, limit: int | None, validation_share: float | None, seed: int
) -> Iterator[Path]:
    """A checkpoint with a classifier for the labels of a dataset, as `lgvit train --stage head` makes it.

    It lies in the hidden folder `.{output}-classifier` while exits grow on it; a stopped run goes on with its own.

    Args:
        checkpoint (`str`): Folder or Hub id of the backbone.
        dataset (`str`): A source with labels for `load_images`.
        output (`Path`): Of the model with exits.
        limit (`int`, *optional*): Fit on at most so many images, and validate and test on as many.
        validation_share, seed: See `grow`.

    Raises:
        ValueError: There are no labels; a stopped run was another one.
    """
    output = output.resolve()
    folder = output.parent / f".{output.name}-classifier"
    given: dict[str, Any] = {"model": checkpoint, "data": dataset, "seed": seed}
    given |= {} if validation_share is None else {"validation_share": validation_share}
    given |= {} if limit is None else {"max_train_samples": limit, "max_eval_samples": limit}
    if not (folder / SETTINGS).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        train_recipe(stage="head", output=str(folder), **given)
        write_json(folder / SETTINGS, given)
    elif json.loads((folder / SETTINGS).read_text(encoding="utf-8")) != given:
        raise ValueError(
            f"{folder}: the classifier of a stopped run with other settings; remove it, or repeat that run"
        )
    yield folder
    # not where growing was stopped or failed: the classifier is as good for another try
    shutil.rmtree(folder)
