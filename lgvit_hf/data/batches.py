"""Batches of a dataset for evaluation, as fast as the machine can bring them to the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .devices import accelerator
from .processing import stack

# of the processors beside an accelerator, which would otherwise wait for images to be read
MOST_WORKERS = 4


class Samples(Protocol):
    """A dataset of numbered items, such as a list."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Any:
        """One of them."""


def in_batches(
    dataset: Samples, batch_size: int, *, num_workers: int | None = None, collate: Callable[[list], Any] = stack
) -> DataLoader:
    """Every sample of a dataset once, in order.

    Args:
        dataset (`Dataset`): Items `{"pixel_values": [C, H, W], "labels": int}`.
        batch_size (`int`): Samples at a time.
        num_workers (`int`, *optional*):
            Processes that read and prepare images. By default none on a CPU, which the model itself keeps busy, and a
            few beside an accelerator, where there are several batches for each.
        collate (`Callable`, *optional*): Makes a batch of items.

    Example:

        >>> samples = [{"pixel_values": torch.full((3, 2, 2), float(number))} for number in range(3)]
        >>> [batch["pixel_values"].shape[0] for batch in in_batches(samples, 2)]
        [2, 1]
    """
    found = accelerator()
    if num_workers is None:
        num_batches = -(-len(dataset) // batch_size)
        num_workers = 0 if found is None else min(MOST_WORKERS, os.cpu_count() or 1, num_batches // 4)
    # memory of its own kind, from which an accelerator reads by itself; MPS shares the processor's
    pinned = found is not None and found.type != "mps"
    images = cast("Dataset[Any]", dataset)
    return DataLoader(images, batch_size, num_workers=num_workers, pin_memory=pinned, collate_fn=collate)


class HasDevice(Protocol):
    """A model, or what stands for one, such as an exported highway."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its images."""


def to_model(pixels: Tensor, model: HasDevice) -> Tensor:
    """Pixels in a model's dtype, on its device; where its weights are brought to it by hooks, on the CPU."""
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    return pixels.to(device, model.dtype, non_blocking=pixels.is_pinned())
