"""ExitTable: every exit's logits and the labels, collected once; replaying a policy on it needs no model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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

    def select(self, rows: Tensor) -> ExitTable:
        """The table of some rows, by number `[K]` int64, in that order."""
        return ExitTable(self.logits[:, rows], self.labels[rows], self.depths)

    def save(self, file: str | Path) -> None:
        """Write the table to one safetensors file, the depths as JSON in its header."""
        tensors = {"logits": self.logits.contiguous(), "labels": self.labels.contiguous()}
        save_file(tensors, file, metadata={"exit_table": json.dumps({"depths": list(self.depths)})})

    @classmethod
    def load(cls, file: str | Path, *, depths: list[int] | None = None, num_labels: int | None = None) -> ExitTable:
        """Read what `save` wrote.

        Args:
            file (`str` or `Path`): The safetensors file.
            depths (`list[int]`, *optional*), num_labels (`int`, *optional*): Of the model that the table must fit.

        Raises:
            ValueError: The file is no table, its parts do not fit together, or it is a table of another model.
        """
        try:
            with safe_open(str(file), framework="pt") as stored:
                settings = json.loads((stored.metadata() or {})["exit_table"])
                table = cls(stored.get_tensor("logits"), stored.get_tensor("labels"), settings["depths"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a table of exits as ExitTable.save writes it ({error})") from error
        shape = tuple(table.logits.shape)
        if len(shape) != 3 or shape[:2] != (len(table.depths), len(table.labels)):
            raise ValueError(
                f"{file}: logits {shape} do not fit {len(table.depths)} exits, {len(table.labels)} labels"
            )
        if depths is not None and list(depths) != table.depths:
            raise ValueError(f"{file} is a table of exits at {table.depths}, but the model's are at {list(depths)}")
        if num_labels is not None and num_labels != shape[2]:
            raise ValueError(f"{file} is a table of {shape[2]} labels, but the model has {num_labels}")
        return table


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
