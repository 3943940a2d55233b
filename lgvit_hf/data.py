"""A dataset name and an image processor become datasets of `pixel_values` and `labels`. No torchvision anywhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

if TYPE_CHECKING:
    import datasets
    from transformers import BaseImageProcessor

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
LABEL_NAMES = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class ImageSplits:
    """Three splits with columns `image` and `label`, and the names of the classes.

    `validation` is for choices (thresholds, early stopping), `test` for what is reported.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    label_names: list[str]


def load_images(source: str, *, validation_share: float = 0.15, seed: int = 0) -> ImageSplits:
    """Load images and labels.

    Args:
        source (`str`):
            `"digits"` (scikit-learn's 1,797 handwritten digits, no network), a folder of images (`imagefolder`), a
            folder of parquet files or one parquet file, or the id of a dataset on the Hub.
        validation_share (`float`, *optional*, defaults to 0.15):
            Share of the training rows that becomes the validation split where the source has no split to spare, and of
            the remaining rows that becomes the test split where it has neither.
        seed (`int`, *optional*, defaults to 0): Decides which rows.

    Raises:
        ImportError: The extra `train` is not installed.
        ValueError: No images, no labels or no training split there.

    Example:

        >>> splits = load_images("digits")
        >>> len(splits.train), len(splits.validation), len(splits.test), splits.label_names[:3]
        (1221, 216, 360, ['0', '1', '2'])
    """
    raw = _load_digits(seed) if source == "digits" else _load_dataset(source)
    found = {}
    for split, names in SPLITS.items():
        present = [name for name in names if name in raw]
        if present:
            found[split] = _with_plain_columns(raw[present[0]], f"{source} ({present[0]})")
    if "train" not in found:
        raise ValueError(f"{source}: no split called 'train'; splits there: {', '.join(raw)}")
    label_names = _label_names(found["train"], source)
    found = {split: _with_labels(dataset, label_names, f"{source} ({split})") for split, dataset in found.items()}

    # the split that others report on is the test; whatever is missing is taken from the training rows
    test = found.get("test", found.get("validation"))
    validation = found.get("validation") if "test" in found else None
    train = found["train"]
    if test is None:
        train, test = _hold_out(train, validation_share, seed)
    if validation is None:
        train, validation = _hold_out(train, validation_share, seed)
    return ImageSplits(train, validation, test, label_names)


def _require_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('images are loaded with the datasets library: pip install "lgvit-hf[train]"') from error
    return datasets


def _load_dataset(source: str) -> Any:
    datasets = _require_datasets()
    path = Path(source)
    if path.is_file() and path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files={"train": str(path)})
    if path.is_dir():
        shards: dict[str, list[str]] = {}
        for file in sorted(path.glob("*.parquet")):
            shards.setdefault(file.stem.split("-")[0], []).append(str(file))
        if shards:
            return datasets.load_dataset("parquet", data_files=shards)
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    if path.suffix or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: no such file or folder")
    return datasets.load_dataset(source)


def _load_digits(seed: int) -> dict[str, Any]:
    datasets = _require_datasets()
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    train, test = _hold_out(whole, 0.2, seed)
    return {"train": train, "test": test}


def _hold_out(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    rows_of = Counter(dataset["label"])
    # every class on both sides, where there are enough rows for that
    enough = len(dataset) * min(share, 1 - share) >= len(rows_of) and min(rows_of.values()) >= 2
    stratify = "label" if enough else None
    parts = dataset.train_test_split(test_size=share, seed=seed, stratify_by_column=stratify)
    return parts["train"], parts["test"]


def _with_plain_columns(dataset: Any, where: str) -> Any:
    datasets = _require_datasets()
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = [name for name in LABEL_NAMES if name in dataset.features] or labels
    if not images or not labels:
        missing = "images" if not images else "labels"
        raise ValueError(f"{where}: no column of {missing}; columns: {dict(dataset.features)}")
    dataset = dataset.select_columns([images[0], labels[0]])
    dataset = dataset.rename_columns(
        {old: new for old, new in ((images[0], "image"), (labels[0], "label")) if old != new}
    )
    return dataset


def _with_labels(dataset: Any, names: list[str], where: str) -> Any:
    """The dataset with its classes numbered as in the training split."""
    datasets = _require_datasets()
    own = dataset.features["label"]
    if isinstance(own, datasets.ClassLabel) and own.names == names:
        return dataset
    labels = [own.int2str(label) if isinstance(own, datasets.ClassLabel) else str(label) for label in dataset["label"]]
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise ValueError(
            f"{where}: class {unknown[0]!r} is not among the training rows'; those are: {', '.join(names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    dataset = dataset.remove_columns("label").add_column("label", [numbers[label] for label in labels])
    return dataset.cast_column("label", datasets.ClassLabel(names=names))


def _label_names(dataset: Any, source: str) -> list[str]:
    feature = dataset.features["label"]
    names = (
        list(feature.names) if hasattr(feature, "names") else [str(label) for label in sorted(set(dataset["label"]))]
    )
    if len(names) < 2:
        raise ValueError(f"{source}: {len(names)} class(es) found ({names}); at least two are needed")
    return names


class ProcessedImages(TorchDataset):
    """Images as a model takes them: each item is `{"pixel_values": [C, H, W] float32, "labels": int}`.

    Args:
        images (`datasets.Dataset`): With columns `image` and `label`.
        processor (`BaseImageProcessor`): Resizes and normalises.
        keep (`bool`, *optional*, defaults to `False`): Hold what was processed in memory; for small sets.

    Example:

        >>> images = ProcessedImages(load_images("digits").test, make_processor(16))
        >>> images[0]["pixel_values"].shape
        torch.Size([3, 16, 16])
    """

    def __init__(self, images: datasets.Dataset, processor: BaseImageProcessor, *, keep: bool = False):
        self.images = images
        self.processor = processor
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        row = self.images[int(index)]
        pixels = self.processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
        item = {"pixel_values": pixels, "labels": row["label"]}
        if self._kept is not None:
            self._kept[index] = item
        return item


def make_processor(image_size: int) -> BaseImageProcessor:
    """The image processor of ViT for square images of `image_size` pixels, values in [-1, 1]; saved with the model."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


def stack(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of items, as the model's forward takes it."""
    return {
        "pixel_values": torch.stack([torch.as_tensor(item["pixel_values"]) for item in items]),
        "labels": torch.as_tensor([item["labels"] for item in items]),
    }
