"""Datasets of images as `datasets` loads them, made what a Trainer takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from transformers.image_processing_utils import BaseImageProcessor

from ..data.datasets import LABEL_NAMES, find_columns, has_labels, refuse_missing, with_columns
from ..data.folders import require_datasets
from ..data.processing import ProcessedImages, make_processor, open_processor
from ..serving.device.rgb import read_image

logger = logging.getLogger(__name__)


class TakesImages(Trainer):
    """For a Trainer: datasets of images may be given to `evaluate` and `predict` as well."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As upstream's; a dataset of images goes through the image processor."""
        return super().get_eval_dataloader(self._prepared_images("eval_dataset", eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As upstream's; a dataset of images goes through the image processor."""
        return super().get_test_dataloader(self._prepared_images("test_dataset", test_dataset))

    def _prepared_images(self, name: str, dataset: Any) -> Any:
        arguments = {name: dataset, "processing_class": self.processing_class}
        made = with_pixels(self.accelerator.unwrap_model(self.model), arguments)
        self.processing_class = made["processing_class"]
        return made[name]


class StreamedImages(IterableDataset):
    """A streaming dataset of images as a model takes them: items are as of `ProcessedImages`.

    Nothing is skipped or counted here: a resumed run reads, and drops, what it has seen, as `Trainer` has it.

    Args:
        images (`datasets.IterableDataset`): Shards are shared out among dataloader workers by `datasets` itself.
        processor (`BaseImageProcessor`): Resizes and normalises.
        columns (`tuple`): Of images, and of labels or `None`.
        label_names (`list[str]`): The model's classes, where labels are words.

    Example:

        >>> from lgvit_hf.data.datasets import load_images
        >>> stream = load_images("digits").test.to_iterable_dataset()
        >>> images = StreamedImages(stream, make_processor(16), ("image", "label"), [])
        >>> next(iter(images))["pixel_values"].shape
        torch.Size([3, 16, 16])
    """

    def __init__(
        self,
        images: Any,
        processor: BaseImageProcessor,
        columns: tuple[str, str | None],
        label_names: list[str],
    ):
        self.columns, self.label_names = columns, label_names
        self.images = _as_stored(images, columns[0])
        self._one = ProcessedImages([], processor)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, where the stream is shuffled."""
        self.images.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        image_column, label_column = self.columns
        for number, row in enumerate(self.images):
            if row[image_column] is None:
                raise ValueError(f"row {number} of the stream has no {image_column}; leave it out, as filter does")
            label = {} if label_column is None else {"labels": self._label(row[label_column], number)}
            try:
                pixels = self._one.pixels(_decoded(row[image_column]))
            except ValueError as error:
                raise ValueError(f"image {number} of the stream: {error}") from error
            yield {"pixel_values": pixels, **label}

    def _label(self, label: Any, number: int) -> Any:
        if label is None:
            raise ValueError(f"row {number} of the stream has no {self.columns[1]}; leave it out, as filter does")
        return _number_of(label, self.label_names) if isinstance(label, str) else label


def with_pixels(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer, in which datasets of images give `pixel_values` and `labels` instead.

    Args:
        model (`PreTrainedModel`): Whose image processor is taken where `processing_class` is none.
        arguments (`dict`):
            `train_dataset`, `eval_dataset` and `test_dataset` may be such datasets, streaming ones too, and dicts of
            them; all others stay what they are. Columns are found as `load_images` finds them.

    Raises:
        ValueError: Training images without labels; a row without image or label; the model's classes in another order.

    Example:

        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> from lgvit_hf.data.datasets import load_images
        >>> model = ViTHighway(ViTHighwayConfig(num_hidden_layers=3, hidden_size=24, image_size=16, patch_size=4))
        >>> arguments = with_pixels(model, {"train_dataset": load_images("digits").train})
        >>> sorted(arguments["train_dataset"][0])
        ['labels', 'pixel_values']
        >>> arguments["processing_class"].size["height"]
        16
    """
    given = {name: arguments[name] for name in ("train_dataset", "eval_dataset", "test_dataset") if name in arguments}
    several = {name: dataset if isinstance(dataset, dict) else {"": dataset} for name, dataset in given.items()}
    found = {
        (name, key): _columns_of(name, each) for name, datasets in several.items() for key, each in datasets.items()
    }
    if not any(found.values()):
        return arguments
    if isinstance(given.get("train_dataset"), dict):
        raise ValueError(f"train_dataset: a dict of {', '.join(given['train_dataset'])}; give one of them")
    processor = arguments.get("processing_class") or _processor_of(model)
    changed: dict[str, Any] = {"processing_class": processor}
    for name, datasets in several.items():
        made = {}
        for key, each in datasets.items():
            columns = found[name, key]
            made[key] = each if columns is None else _pixels(name, each, columns, processor, model.config)
        changed[name] = made if isinstance(given[name], dict) else made[""]
    return {**arguments, **changed}


def _columns_of(name: str, dataset: Any) -> tuple[str, str | None] | None:
    """The columns of images and labels; `None` for what is no dataset of images, or gives pixel values already."""
    if not hasattr(dataset, "column_names") or (hasattr(dataset, "__len__") and len(dataset) == 0):
        return None
    if hasattr(dataset, "__len__") and dataset.format["type"] == "custom":
        # what a transform of one's own gives may be pixel values already
        row = dataset[0]
    elif dataset.features is None:
        # of a stream that does not say, its first row does
        row = next(iter(dataset), {})
    else:
        return _checked(name, find_columns(dataset.features), dataset.features)
    if "pixel_values" in row:
        return None
    images = [column for column, value in row.items() if hasattr(value, "convert")]
    image = next((column for column in ("image", "img") if column in images), next(iter(images), None))
    return _checked(name, (image, None), row)


def _checked(name: str, columns: tuple[str | None, str | None], there: Any) -> tuple[str, str | None] | None:
    image, label = columns
    if image is None or "pixel_values" in there:
        return None
    # of several labels a row, or numbers to come near to, the column has another type than that of classes
    label = label or next((column for column in LABEL_NAMES if column in there), None)
    if label is None and name == "train_dataset":
        raise ValueError(f"{name}: no column of labels; columns: {', '.join(there)}; call it 'label'")
    return image, label


def _pixels(
    name: str,
    dataset: Any,
    columns: tuple[str, str | None],
    processor: BaseImageProcessor,
    config: PretrainedConfig,
) -> Any:
    image, label = columns
    known = [str((config.id2label or {}).get(number)) for number in range(config.num_labels)]
    classes = getattr((dataset.features or {}).get(label), "names", None)
    if classes is not None and classes != known and sorted(classes) == sorted(known):
        raise ValueError(
            f"{name}: its classes are the model's in another order: {', '.join(classes)}, the model's are "
            f"{', '.join(known)}; number them as the model does, or set id2label and label2id of a new model"
        )
    if not hasattr(dataset, "__len__"):
        return StreamedImages(dataset, processor, columns, known)
    if dataset.format["type"] == "custom":
        return ProcessedImages(_Renamed(dataset, columns), processor)
    dataset = with_columns(dataset.with_format(None), image, label)
    if name != "train_dataset" and label is not None and not has_labels(dataset):
        dataset = dataset.select_columns("image")  # they are hidden, as in the test splits of competitions
    refuse_missing(dataset, name)
    if getattr(dataset.features.get("label"), "dtype", None) in ("string", "large_string"):
        numbers = [_number_of(word, known) for word in dataset["label"][:]]
        dataset = dataset.remove_columns("label").add_column("label", numbers)
    return ProcessedImages(dataset, processor)


def _number_of(label: str, known: list[str]) -> int:
    if label not in known:
        raise ValueError(f"label {label!r} is none of the model's classes: {', '.join(map(str, known))}")
    return known.index(label)


def _as_stored(images: Any, column: str) -> Any:
    """The stream with its images as their files hold them: as everywhere, `read_image` is to decode them."""
    datasets = require_datasets()
    images = images.with_format(None)
    return images if images.features is None else images.cast_column(column, datasets.Image(decode=False))


def _decoded(image: Any) -> Image.Image:
    if not isinstance(image, dict):
        return image
    path, content = image["path"], image["bytes"]
    if content is None and "://" in path:
        # inside an archive, or elsewhere: only `datasets` can open it
        return require_datasets().Image().decode_example(image)
    return read_image(path if content is None else content)


class _Renamed:
    """Rows of a dataset with a transform of its own, which must see the columns that it knows."""

    def __init__(self, dataset: Any, columns: tuple[str, str | None]):
        self.dataset, self.columns = dataset, dict(zip(columns, ("image", "label"), strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        return {new: row[old] for old, new in self.columns.items() if old is not None}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def _processor_of(model: PreTrainedModel) -> BaseImageProcessor:
    for source in (model.name_or_path, getattr(model, "grown_from", "")):
        if source:
            try:
                return open_processor(source)
            except OSError:
                pass  # saved without one
    size = model.config.image_size
    logger.warning(
        "no image processor is known for this model: images are resized to %s pixels, with values in [-1, 1]; give "
        "processing_class=AutoImageProcessor.from_pretrained(...) for another",
        size,
    )
    return make_processor(size, model.config.num_channels)
