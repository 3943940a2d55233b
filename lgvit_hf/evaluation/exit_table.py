"""ExitTable: every exit's logits and the labels, collected once; replaying a policy on it needs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers.utils import logging

from ..data.batches import Samples, in_batches, to_model
from ..data.shares import gather, own_share
from ..engine import Answers, replay, run_all
from ..ensemble import build_ensemble, with_ensemble
from ..files import add_files
from ..hub.report_keys import current_names
from ..modes import evaluating
from ..policies import ExitPolicy, build_policy, probabilities
from ..segments import State
from .costs import Costs, Highway, export_of, model_macs


@dataclass(frozen=True)
class ExitTable:
    """What every exit says of every sample.

    Args:
        logits (`Tensor`): `[E, N, C]` float32, shallowest exit first, the final classifier last.
        labels (`Tensor`): `[N]` int64.
        depths (`list[int]`): Blocks run before each exit, from 1.
        costs (`Costs`, *optional*): MACs of each segment's blocks and head for one sample.
        weights (`str`, *optional*): Digest of the model's weights, by which a table of another model is known.
        ensemble (`dict`, *optional*):
            The model's `exit_ensemble`, with which policies are replayed; `logits` stay each exit's own.

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
    costs: Costs | None = None
    weights: str | None = None
    ensemble: dict[str, Any] | None = None

    @property
    def known_costs(self) -> Costs:
        """The costs.

        Raises:
            ValueError: There are none.
        """
        if self.costs is None:
            raise ValueError(
                "the table has no costs; `collect` counts them, or give `ExitTable(..., costs=Costs(...))`"
            )
        return self.costs

    def __len__(self) -> int:
        return len(self.labels)

    def replay(
        self, policy: ExitPolicy | dict[str, Any] | str, *, min_depth: int | None = None, max_depth: int | None = None
    ) -> Answers:
        """What the model would answer under `policy`: the same loop as the model's, on the stored logits."""
        policy = with_ensemble(build_policy(policy, len(self.depths) - 1), self.ensemble, *self._sizes)
        return replay(self.logits.unbind(), self.depths, policy, min_depth=min_depth, max_depth=max_depth)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Exits, the final classifier counted, and classes."""
        return len(self.logits), self.logits.shape[-1]

    def policy_logits(self, exits: Sequence[int] | None = None) -> Tensor:
        """What a policy sees at each exit, `[E, N, C]`: its logits, or those of the ensemble up to it.

        Args:
            exits (`Sequence[int]`, *optional*): Of the early exits those that are evaluated, from 0; all by default.
        """
        if self.ensemble is None:
            return self.logits
        ensemble = build_ensemble(self.ensemble, *self._sizes)
        evaluated = range(len(self.logits)) if exits is None else exits
        seen, memory = [], ensemble.start(len(self), self.logits.device)
        for index, logits in enumerate(self.logits):
            answer, _, after = ensemble.combine(logits, memory, index)
            seen.append(answer)
            memory = after if index in evaluated else memory
        return torch.stack(seen)

    @cached_property
    def right(self) -> Tensor:
        """Whether each exit answers each sample rightly, `[E, N]` bool; of an `expected` table, how likely it does."""
        return is_right(self.logits, self.labels)

    def answered_right(self, exits: Sequence[int] | None = None) -> Tensor:
        """As `right`, of what samples that exit are answered with `exits` evaluated; see `policy_logits`."""
        return self.right if self.ensemble is None else is_right(self.policy_logits(exits), self.labels)

    def accuracies(self) -> list[float]:
        """Share of all samples that each exit's own head answers rightly, whatever the ensemble."""
        return self.right.float().mean(-1).tolist()

    def select(self, rows: Tensor) -> ExitTable:
        """The table of some samples, by number `[K]` int64, in that order."""
        return replace(self, logits=self.logits[:, rows], labels=self.labels[rows])

    def without_labels(self) -> ExitTable:
        """The table with the full model's answers for labels."""
        return replace(self, labels=self.logits[-1].argmax(-1))

    def check_finite(self) -> None:
        """Raise `ValueError` where logits are NaN or infinite: nothing is fitted to such samples."""
        unknown = int((~self.logits.isfinite()).any(-1).any(0).sum())
        if unknown:
            raise ValueError(
                f"{unknown} of {len(self)} samples have NaN or infinite logits; leave them out, or repair the model"
            )

    def with_exits(self, exits: Sequence[int]) -> ExitTable:
        """The same samples with only some of the early exits, by index from 0 in ascending order; without costs."""
        kept = [*exits, len(self.depths) - 1]
        depths, ensemble = [self.depths[index] for index in kept], self.ensemble
        if ensemble is not None:
            weights = [ensemble["weights"][index] for index in kept]
            # of exits without any weight it is none
            ensemble = {**ensemble, "weights": weights} if any(weights) else None
        return replace(self, logits=self.logits[kept], depths=depths, costs=None, ensemble=ensemble)

    def expected(self) -> ExitTable:
        """The table with the full model's probabilities for labels, `[N, C]`.

        The mean difference of an exit's answers to the full model's is then the expected drop of accuracy, exact if
        the full model is calibrated.

        Example:

            >>> logits = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
            >>> ExitTable(logits, labels=torch.tensor([1]), depths=[1, 2]).expected().right.tolist()
            [[0.119...], [0.880...]]
        """
        return replace(self, labels=probabilities(self.logits[-1]))

    def save(self, file: str | Path) -> None:
        """Write the table to one safetensors file, depths and costs as JSON in its header; all of it or nothing."""
        file, costs = Path(file), None if self.costs is None else asdict(self.costs)
        tensors = {"logits": self.logits.contiguous(), "labels": self.labels.contiguous()}
        settings = {"depths": list(self.depths), "costs": costs, "weights": self.weights, "ensemble": self.ensemble}
        with add_files(file.parent) as folder:
            save_file(tensors, folder / file.name, metadata={"exit_table": json.dumps(settings)})

    @classmethod
    def load(
        cls,
        file: str | Path,
        *,
        depths: list[int] | None = None,
        num_labels: int | None = None,
        weights: str | None = None,
    ) -> ExitTable:
        """Read what `save` wrote.

        Args:
            file (`str` or `Path`): The safetensors file.
            depths (`list[int]`, *optional*), num_labels (`int`, *optional*), weights (`str`, *optional*):
                Of the model that the table must fit; `weights` as `weights_digest` gives them.

        Raises:
            ValueError: The file is no table, its parts do not fit together, or it is a table of another model.
        """
        try:
            with safe_open(str(file), framework="pt") as stored:
                settings = json.loads((stored.metadata() or {})["exit_table"])
                costs = Costs(**current_names(settings["costs"])) if settings.get("costs") else None
                logits, labels = stored.get_tensor("logits"), stored.get_tensor("labels")
                table = cls(
                    logits, labels, settings["depths"], costs, settings.get("weights"), settings.get("ensemble")
                )
        except (SafetensorError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a table of exits as ExitTable.save writes it ({error})") from error
        shape = tuple(table.logits.shape)
        if len(shape) != 3 or shape[:2] != (len(table.depths), len(table.labels)):
            raise ValueError(
                f"{file}: logits {shape} do not fit {len(table.depths)} exits, {len(table.labels)} labels"
            )
        if table.ensemble is not None:
            build_ensemble(table.ensemble, *table._sizes)
        if depths is not None and list(depths) != table.depths:
            raise ValueError(f"{file} is a table of exits at {table.depths}, but the model's are at {list(depths)}")
        if num_labels is not None and num_labels != shape[2]:
            raise ValueError(f"{file} is a table of {shape[2]} labels, but the model has {num_labels}")
        if weights is not None and table.weights not in (None, weights):
            raise ValueError(f"{file} is a table of a model with other weights; collect it again")
        return table


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether answers `[..., N, C]` are right, `[..., N]` bool; with probabilities `[N, C]` as labels, how likely."""
    answers = logits.argmax(-1)
    if not labels.is_floating_point():
        return answers == labels
    return labels.expand_as(logits).gather(-1, answers[..., None])[..., 0]


@torch.no_grad()
def collect(
    model: Highway,
    dataset: Samples,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    distributed: bool = False,
) -> ExitTable:
    """Run every exit of a highway on every sample of a dataset, in `eval()` mode, and count the MACs of one sample.

    Args:
        model (`Highway`): Of PyTorch, or an exported one of the layouts `segments` and `all_exits`.
        dataset (`Dataset`):
            Items `{"pixel_values": [C, H, W], "labels": int}`; where there are no labels, the full model's answers
            stand for them.
        batch_size (`int`, *optional*, defaults to 64): Samples at a time.
        num_workers (`int`, *optional*):
            Processes that read images; by default none on a CPU, and a few beside an accelerator.
        distributed (`bool`, *optional*, defaults to `False`):
            Called by all processes of `torch.distributed`'s group at once: each runs its share of the samples, and all
            get the whole table.

    Raises:
        ValueError: The dataset is empty, or the model is one exported file, which does not say what exits answer.
    """
    if len(dataset) == 0:
        raise ValueError("there is no image to collect exits for: the dataset is empty")
    if distributed:
        mine = Subset(cast("Dataset[Any]", dataset), own_share(len(dataset)))
        part = collect(model, mine, batch_size=batch_size, num_workers=num_workers)
        logits = gather(part.logits.transpose(0, 1), len(dataset)).transpose(0, 1).contiguous()
        return replace(part, logits=logits, labels=gather(part.labels, len(dataset)))
    with evaluating(model):
        batches = in_batches(dataset, batch_size, num_workers=num_workers)
        segments, logits, costs, start = model.segments(), torch.empty(0), None, 0
        labels: list[Tensor] = []
        for batch in logging.tqdm(batches, desc="exits", leave=False):
            pixels = to_model(batch["pixel_values"], model)
            exit_logits = run_all(segments, State({"pixel_values": pixels}))
            if not labels:  # all of the table at once: it may be too large to be there twice
                logits = torch.empty(len(segments), len(dataset), exit_logits[-1].shape[-1], dtype=torch.float32)
            here = logits[:, start : start + len(pixels)]
            for samples, answered in zip(here, exit_logits, strict=True):
                samples.copy_(answered)
            labels.append(batch.get("labels", here[-1].argmax(-1)))
            costs, start = costs or model_macs(model, pixels[:1]), start + len(pixels)
    depths = [segment.depth for segment in segments]
    return ExitTable(logits, torch.cat(labels), depths, costs, weights_digest(model), model.config.exit_ensemble)


def weights_digest(model: Highway) -> str | None:
    """A SHA-256 of the names and values of a model's weights; of an exported one, of its files.

    `None` where accelerate keeps weights elsewhere, to bring them only when they are used.
    """
    exported = export_of(model)
    if exported is not None:
        return exported.digest
    digest, state = hashlib.sha256(), cast("nn.Module", model).state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        return None
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
