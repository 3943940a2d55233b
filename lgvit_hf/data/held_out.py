"""What a model was trained on, and the samples of the same data that were held out of it."""

from __future__ import annotations

import hashlib
import json
import logging
import ntpath
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_json
from .datasets import ImageSplits, load_images

if TYPE_CHECKING:
    import datasets

FILE = "training.json"
SPLITS = ("train", "validation", "test")
SHARE = 0.15

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Data that a model was trained on: an entry of the list `data` in `training.json`.

    Args:
        source (`str`, *optional*): As `load_images` takes it; `None` where it is not known.
        seed, validation_share, image_column, label_column: See `load_images`.
        max_train_samples (`int`, *optional*): At most so many of the training split were used.
        used (`list[str]`, *optional*, defaults to `["train"]`): Splits that were trained or chosen on.
        samples (`dict[str, int]`, *optional*): How many samples each split has.
        digest (`str`, *optional*): Of the splits, by `digest_of`; `None` where there are none to be found again.

    Raises:
        ValueError: A field of the wrong type.
    """

    source: str | None
    seed: int = 0
    validation_share: float = SHARE
    image_column: str | None = None
    label_column: str | None = None
    max_train_samples: int | None = None
    used: Sequence[str] = ("train",)
    samples: dict[str, int] | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        for name in ("source", "image_column", "label_column", "digest"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), str | None), "text or null")
        is_seed = isinstance(self.seed, int) and 0 <= self.seed < 2**32
        _check("seed", self.seed, is_seed, "a whole number from 0 to 2 ** 32 - 1")
        _check("samples", self.samples, isinstance(self.samples, dict | None), "a mapping or null")
        share = self.validation_share
        _check("validation_share", share, isinstance(share, float) and 0 < share < 1, "a number between 0 and 1")
        is_known = isinstance(self.used, list | tuple) and all(name in SPLITS for name in self.used)
        _check("used", self.used, is_known, f"a list of {', '.join(SPLITS)}")
        # JSON has no tuples: an entry that was read equals the one that was written
        object.__setattr__(self, "used", list(self.used))

    @classmethod
    def of(cls, splits: ImageSplits, source: str, **settings: Any) -> TrainingData:
        """The entry for splits that `load_images(source, ...)` gave with these settings."""
        samples = {name: len(getattr(splits, name)) for name in SPLITS}
        return cls(source, **settings, samples=samples, digest=digest_of(splits))

    def splitting(self) -> dict[str, Any]:
        """The settings of `load_images` by which its splits are found again."""
        return {name: getattr(self, name) for name in ("seed", "validation_share", "image_column", "label_column")}


def _check(name: str, value: Any, is_good: bool, wanted: str) -> None:
    if not is_good:
        raise ValueError(f"{name}: {value!r} must be {wanted}")


def digest_of(splits: ImageSplits) -> str:
    """A digest by which the splits of a dataset are known again, wherever it lies; no image is read.

    It covers the names of the classes and, of each sample, split by split and in order, its label, its place in the
    source and the name of its file.

    Example:

        >>> digest_of(load_images("digits")) == digest_of(load_images("digits"))
        True
        >>> digest_of(load_images("digits")) == digest_of(load_images("digits", seed=1))
        False
    """
    digest = hashlib.sha256(json.dumps(splits.label_names).encode())
    for name in SPLITS:
        dataset = getattr(splits, name)
        digest.update(f"\n{name} {len(dataset)}\n".encode())
        digest.update(np.asarray(dataset["label"][:], "<i8").tobytes() + _places(dataset).astype("<i8").tobytes())
        digest.update("\n".join(_file_names(dataset)).encode())
    return digest.hexdigest()


def _places(dataset: datasets.Dataset) -> np.ndarray:
    """Of each sample, its number in the table that the dataset is a selection of."""
    chosen = dataset._indices
    return np.arange(len(dataset)) if chosen is None else chosen.column(0).to_numpy()


def _file_names(dataset: datasets.Dataset) -> Iterable[str]:
    """Of each sample, the name of its file without the folder; empty where it has none."""
    import pyarrow.compute as compute

    paths = compute.struct_field(dataset.data.column("image"), "path")
    if dataset._indices is not None:
        paths = paths.take(dataset._indices.column(0))
    # of either kind of separator
    return (ntpath.basename(path or "") for path in paths.to_pylist())


def read_training_data(checkpoint: str | Path) -> list[TrainingData]:
    """What a saved model was trained on, by the `training.json` of its folder; empty where that does not say.

    Args:
        checkpoint (`str` or `Path`): Folder of the model.

    Raises:
        ValueError: The file is damaged.

    Example:

        >>> read_training_data("nowhere")
        []
    """
    file = Path(checkpoint) / FILE
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("data", []), list):
            raise ValueError("data must be a list")
        return [_entry(settings) for settings in content.get("data", [])]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or remove it to do without") from error


def _entry(settings: Any) -> TrainingData:
    known = {field.name for field in fields(TrainingData)}
    if not isinstance(settings, dict) or "source" not in settings:
        raise ValueError(f"data: {settings!r} must be a mapping with a source")
    # a later version may say more
    return TrainingData(**{name: value for name, value in settings.items() if name in known})


def training_data_as_json(history: Iterable[TrainingData]) -> list[dict[str, Any]]:
    """The list `data` of `training.json`, each entry once.

    Example:

        >>> training_data_as_json([TrainingData(None), TrainingData(None)])[0]["source"] is None
        True
    """
    entries = [asdict(entry) for entry in history]
    return [entry for index, entry in enumerate(entries) if entry not in entries[:index]]


def write_training_data(folder: str | Path, history: Sequence[TrainingData]) -> None:
    """Let a folder that a model is copied to say what it was trained on; nothing where that is not known."""
    if history:
        write_json(Path(folder) / FILE, {"data": training_data_as_json(history)})


@dataclass(frozen=True)
class KnownSplits:
    """Splits of a dataset, and what is known of whether a model was trained on their samples.

    Args:
        splits (`ImageSplits`): Those of the model's training, where they could be found again.
        data (`TrainingData`): How the dataset was split, now.
        checkpoint (`str`): The model, for messages.
        used (`frozenset[str]`): Splits that it was trained or chosen on, as far as that is known.
        doubt (`str`, *optional*):
            Why it is not known whether it was trained on samples of other splits, too; `None` where it was not.
    """

    splits: ImageSplits
    data: TrainingData
    checkpoint: str
    used: frozenset[str]
    doubt: str | None

    def warning(self, split: str) -> str | None:
        """Why calibration on a split may be too optimistic, in a line; `None` where the model has not seen it."""
        if split in self.used:
            free = [name for name in SPLITS if name not in self.used]
            hint = f"take --split {free[0]}" if free else "give other images"
            used = f"the {split} split of {self.data.source} was used in its training"
            return f"{self.checkpoint}: {used}, so that calibration on it is too optimistic; {hint}"
        return None if self.doubt is None else seen_warning(self.checkpoint, str(self.data.source), self.doubt)

    def samples(self, split: str) -> dict[str, Any]:
        """Which samples a split is, for a report."""
        found: dict[str, Any] = {"data": self.data.source, "split": split, "seed": self.data.seed}
        found |= {"validation_share": self.data.validation_share, "samples": len(getattr(self.splits, split))}
        return {**found, "warning": self.warning(split)}

    def as_text(self, split: str) -> str:
        """Which samples a split is, in a line."""
        how = f"split by seed {self.data.seed} and validation share {self.data.validation_share:g}"
        known = "" if self.doubt else ", as in the training of the model"
        return f"{len(getattr(self.splits, split))} samples of {self.data.source}, {split}; {how}{known}"


def seen_warning(checkpoint: str, source: str, why: str) -> str:
    """That a model's training samples cannot be told apart from others, and what to do, in a line."""
    cannot = f"its training samples cannot be told apart from those of {source} ({why})"
    return f"{checkpoint}: {cannot}. Calibration may be too optimistic; give images that were held out of its training"


def load_known(
    source: str,
    checkpoint: str | Path,
    *,
    seed: int | None = None,
    validation_share: float | None = None,
    defaults: tuple[int, float] = (0, SHARE),
) -> KnownSplits:
    """Load images in the splits with which a model was trained, where its folder says so.

    Args:
        source (`str`): See `load_images`.
        checkpoint (`str` or `Path`): The model.
        seed, validation_share (*optional*): Those of `load_images`, instead of those of the training.
        defaults (`tuple[int, float]`, *optional*): Seed and validation share where the training had other data.

    Raises:
        ImportError, OSError, ValueError: As `load_images`; the model's `training.json` is damaged.

    Example:

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     splits = load_images("digits", seed=3)
        ...     write_training_data(folder, [TrainingData.of(splits, "digits", seed=3)])
        ...     known = load_known("digits", folder)
        >>> known.data.seed, sorted(known.used), known.warning("validation")
        (3, ['train'], None)
    """
    given = {"seed": seed, "validation_share": validation_share}
    given = {name: value for name, value in given.items() if value is not None}
    history = read_training_data(checkpoint)
    data = splits_of_training(source, history, given)
    if data is None:
        settings: dict[str, Any] = {**dict(zip(("seed", "validation_share"), defaults, strict=True)), **given}
        splits = load_images(source, **settings)
        data = splits, TrainingData.of(splits, source, **settings)
    same = [entry for entry in history if entry.digest == data[1].digest]
    used = frozenset(name for entry in same for name in entry.used)
    return KnownSplits(*data, str(checkpoint), used, doubt(source, history, same))


def splits_of_training(
    source: str, history: Sequence[TrainingData], given: dict[str, Any] | None = None
) -> tuple[ImageSplits, TrainingData] | None:
    """The splits of a dataset as one training had them, the latest first; `None` where none had these data.

    Args:
        source (`str`): See `load_images`.
        history (`Sequence[TrainingData]`): What the model was trained on.
        given (`dict`, *optional*): Settings of `load_images` that take the place of the training's.
    """
    tried = []
    for entry in reversed(history):
        settings = {**entry.splitting(), **(given or {})}
        if entry.digest is None or settings in tried:
            continue
        tried.append(settings)
        try:
            splits = load_images(source, **settings)
        except ValueError:  # such as no column of that name: these are other data
            continue
        data = TrainingData.of(splits, source, **settings)
        if any(data.digest == known.digest for known in history):
            return splits, data
    return None


def doubt(source: str, history: Sequence[TrainingData], same: Sequence[TrainingData] = ()) -> str | None:
    """Why it is not known which samples of a dataset a model was trained on; `None` where it is.

    Args:
        source (`str`): See `load_images`.
        history (`Sequence[TrainingData]`): What the model was trained on.
        same (`Sequence[TrainingData]`, *optional*): Those of its entries whose splits were found again in the dataset.

    Example:

        >>> doubt("photos", [TrainingData("digits")])
        'it was trained on digits'
    """
    others = [entry for entry in history if entry not in same]
    if not history:
        return f"there is no {FILE} with its data"
    if not others:
        return None
    entry = others[-1]
    if entry.source is None:
        return f"{FILE} does not name all data that it was trained on"
    if entry.source != source:
        return f"it was trained on {entry.source}{' too' if same else ''}"
    if entry.digest is None:
        return f"it was made with images drawn from {source} at random"
    split = f"seed {entry.seed} and validation share {entry.validation_share:g}"
    return f"it was trained on {source} as it was split by {split}, which gives other samples now"
