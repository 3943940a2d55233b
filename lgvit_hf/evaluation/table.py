"""ExitTable: every exit's logits and the labels, collected once; replaying a policy on it needs no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import stack
from ..engine import Answers, replay, run_all
from ..policies import ExitPolicy, build_policy
from ..segments import State


@dataclass(frozen=True)
class ExitTable:
    """What every exit says of every row.

    Args:
        logits (`Tensor`): `[E, N, C]` float32, shallowest exit first, the final classifier last.
        labels (`Tensor`): `[N]` int64.
        depths (`list[int]`): Blocks run before each exit, from 1.

    Example:

        >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[0.0, 5.0], [0.0, 5.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 1]), depths=[1, 2])
        >>> table.replay({"name": "confidence", "threshold": 0.9}).exit_layer.tolist()
        [1, 2]
        >>> table.accuracies()
        [1.0, 0.5]
    """

    logits: Tensor
    labels: Tensor
    depths: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def replay(
        self, policy: ExitPolicy | dict[str, Any] | str, *, min_depth: int | None = None, max_depth: int | None = None
    ) -> Answers:
        """What the model would answer under `policy`: the same loop as the model's, on the stored logits."""
        policy = build_policy(policy, len(self.depths) - 1)
        return replay(self.logits, self.depths, policy, min_depth=min_depth, max_depth=max_depth)

    def accuracies(self) -> list[float]:
        """Share of all rows that each exit answers rightly."""
        return (self.logits.argmax(-1) == self.labels).float().mean(-1).tolist()


@torch.no_grad()
def collect(model: PreTrainedModel, dataset: Dataset, *, batch_size: int = 64) -> ExitTable:
    """Run every exit of a highway on every row of a dataset, in `eval()` mode.

    Args:
        model (`PreTrainedModel`): A highway.
        dataset (`Dataset`): Items `{"pixel_values": [C, H, W], "labels": int}`.
        batch_size (`int`, *optional*, defaults to 64): Rows at a time.
    """
    was_training = model.training
    model.eval()
    segments, logits, labels = model.segments(), [], []
    for batch in _progress(DataLoader(dataset, batch_size=batch_size, collate_fn=stack)):
        state = State({"pixel_values": batch["pixel_values"].to(model.device, model.dtype)})
        logits.append(torch.stack(run_all(segments, state)).float().cpu())
        labels.append(batch["labels"])
    model.train(was_training)
    return ExitTable(torch.cat(logits, dim=1), torch.cat(labels), [segment.depth for segment in segments])


def _progress(batches: Iterable) -> Iterable:
    return logging.tqdm(batches, desc="exits", leave=False)
