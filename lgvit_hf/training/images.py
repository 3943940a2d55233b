"""Datasets of images as `datasets` loads them, made what a Trainer takes."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..processing import ProcessedImages, make_processor, open_processor

logger = logging.getLogger(__name__)


def with_pixels(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer, in which datasets with a column `image` give `pixel_values` and `labels` instead.

    Args:
        model (`PreTrainedModel`): Whose image processor is taken where `processing_class` is none.
        arguments (`dict`): `train_dataset` and `eval_dataset` may be such datasets; all others stay what they are.

    Example:

        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> from lgvit_hf.data import load_images
        >>> model = ViTHighway(ViTHighwayConfig(num_hidden_layers=3, hidden_size=24, image_size=16, patch_size=4))
        >>> arguments = with_pixels(model, {"train_dataset": load_images("digits").train})
        >>> sorted(arguments["train_dataset"][0])
        ['labels', 'pixel_values']
        >>> arguments["processing_class"].size["height"]
        16
    """
    given = {name: arguments.get(name) for name in ("train_dataset", "eval_dataset")}
    several = {
        name: dataset if isinstance(dataset, dict) and name == "eval_dataset" else {"": dataset}
        for name, dataset in given.items()
    }
    if not any(_is_of_images(each) for datasets in several.values() for each in datasets.values()):
        return arguments
    processor = arguments.get("processing_class") or _processor_of(model)
    changed: dict[str, Any] = {"processing_class": processor}
    for name, datasets in several.items():
        made = {
            key: ProcessedImages(each, processor) if _is_of_images(each) else each for key, each in datasets.items()
        }
        changed[name] = made if isinstance(given[name], dict) else made[""]
    return {**arguments, **changed}


def _is_of_images(dataset: Any) -> bool:
    """Whether items are images with a label, not yet what a model takes."""
    if not hasattr(dataset, "column_names") or "image" not in dataset.column_names or len(dataset) == 0:
        return False
    # a transform set on the dataset may give pixel values already
    return "pixel_values" not in dataset[0]


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
