"""Datasets of images as `datasets` loads them, made what a Trainer takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from transformers.image_processing_utils import BaseImageProcessor

from ..data.datasets import IMAGE_NAMES, LABEL_NAMES, find_columns, has_labels, refuse_missing, with_columns
from ..data.folders import require_datasets
from ..data.processing import ProcessedImages, decoded, make_processor, open_processor

# of images, and of labels if there are any
Columns = tuple[str, str | None]

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
    """A streaming dataset of images as a model takes them: items are those of `ProcessedImages`.

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

    def __init__(self, images: Any, processor: BaseImageProcessor, columns: Columns, label_names: list[str]):
        self.columns, self.label_names = columns, label_names
        images = images.with_format(None)
        if images.features is not None:
            # with its images as their files hold them: as everywhere, `read_image` is to decode them
            images = images.cast_column(columns[0], require_datasets().Image(decode=False))
        self.images = images
        self._one = ProcessedImages([], processor)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, where the stream is shuffled."""
        self.images.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        image_column, label_column = self.columns
        for number, sample in enumerate(self.images):
            for column in self.columns:
                if column is not None and sample[column] is None:
                    raise ValueError(f"sample {number} of the stream has no {column}; leave it out, as filter does")
            name = f"image {number} of the stream"
            image = decoded(sample[image_column], name)
            try:
                item: dict[str, Any] = {"pixel_values": self._one.pixels(image)}
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if label_column is not None:
                label = sample[label_column]
                item["labels"] = _number_of(label, self.label_names) if isinstance(label, str) else label
            yield item


def with_pixels(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer, in which datasets of images give `pixel_values` and `labels` instead.

    Args:
        model (`PreTrainedModel`): Whose image processor is taken where `processing_class` is none.
        arguments (`dict`):
            `train_dataset`, `eval_dataset` and `test_dataset` may be such datasets, streaming ones too, and dicts of
            them; all others stay what they are. Columns are found as `load_images` finds them.

    Raises:
        ValueError: Training images without labels; a sample without image or label; classes in another order.

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
    found: dict[str, Any] = {}

    def converted(name: str, dataset: Any) -> Any:
        if isinstance(dataset, dict):
            if name == "train_dataset" and any(_columns_of(name, each) for each in dataset.values()):
                raise ValueError(f"train_dataset: a dict of {', '.join(dataset)}; give one of them")
            return {key: converted(name, each) for key, each in dataset.items()}
        columns = _columns_of(name, dataset)
        if columns is None:
            return dataset
        if not found:
            found["processing_class"] = arguments.get("processing_class") or _processor_of(model)
        return _pixels(name, dataset, columns, found["processing_class"], model.config)

    given: list[str] = [name for name in ("train_dataset", "eval_dataset", "test_dataset") if name in arguments]
    made = {name: converted(name, arguments[name]) for name in given}
    return {**arguments, **made, **found} if found else arguments


def _columns_of(name: str, dataset: Any) -> Columns | None:
    """The columns of images and labels; `None` for what is no dataset of images, or gives pixel values already."""
    if not hasattr(dataset, "column_names") or (hasattr(dataset, "__len__") and len(dataset) == 0):
        return None
    there, label, is_sample = dataset.features, None, False
    if hasattr(dataset, "__len__") and dataset.format["type"] == "custom":
        # what a transform of one's own gives may be pixel values already
        there, is_sample = dataset[0], True
    elif there is None:
        # of a stream without features, its first sample shows them
        there, is_sample = next(iter(dataset), {}), True
    if "pixel_values" in there:
        return None
    if is_sample:
        images = [column for column, value in there.items() if hasattr(value, "convert")]
        image = next((column for column in (*IMAGE_NAMES, *images) if column in images), None)
    else:
        image, label = find_columns(there)
    if image is None:
        return None
    # of several labels a sample, or numbers to come near to, the column has another type than that of classes
    label = label or next((column for column in LABEL_NAMES if column in there), None)
    if label is None and name == "train_dataset":
        raise ValueError(f"{name}: no column of labels; columns: {', '.join(there)}; call it 'label'")
    return image, label


def _pixels(name: str, dataset: Any, columns: Columns, processor: BaseImageProcessor, config: PretrainedConfig) -> Any:
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


class _Renamed:
    """Samples of a dataset with a transform of its own, which must see the columns that it knows."""

    def __init__(self, dataset: Any, columns: Columns):
        self.dataset, self.columns = dataset, dict(zip(columns, ("image", "label"), strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return {new: sample[old] for old, new in self.columns.items() if old is not None}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def _processor_of(model: PreTrainedModel) -> BaseImageProcessor:
    for source in filter(None, (model.name_or_path, getattr(model, "grown_from", ""))):
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
