"""What a policy does to the samples of a table: where they exit, what that costs, and how many answers it loses."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..policies import build_policy
from .costs import Costs
from .exit_table import ExitTable

Settings = dict[str, Any]


class Measured(NamedTuple):
    """Mean cost and predicted drop of settings on the table that is searched on.

    Settings of one policy and one `path` differ in a single number: as it changes, each sample exits earlier, or
    where it did. Those that are there to make a path whole are `proof_only`.
    """

    cost: float
    drop: float
    settings: Settings
    path: tuple[Any, ...] | None = None
    proof_only: bool = False


def replayed_exits(table: ExitTable, settings: Settings) -> tuple[Tensor, list[int]]:
    """At which exit each sample of a table exits, `[N]`, and the early exits whose heads are run for it."""
    early = len(table.depths) - 1
    policy = build_policy(settings, early)
    evaluated = [index for index in range(early) if not policy.skips(index)]
    # no sample goes deeper than a fixed exit
    return table.replay(policy).exit_index, evaluated[:1] if policy.name == "fixed" else evaluated


def consequences(table: ExitTable, exit_index: Tensor, evaluated: list[int], costs: Costs) -> tuple[float, Tensor]:
    """The mean cost, and the drop of each sample `[N]`: 1 if only the full model is right, -1 if only we are, else 0.

    Of an `expected` table, the expected drop, in [-1, 1].
    """
    answered, full = table.answered_right(evaluated).gather(0, exit_index[None])[0], table.right[-1]
    drops = full - answered if full.is_floating_point() else full.long() - answered.long()
    return costs.mean(shares(exit_index, len(table.depths)), evaluated), drops


def predicted_drop(drops: np.ndarray, early_share: float, num_samples: int) -> float:
    """The mean drop and two standard errors of it on `num_samples`, one more loss assumed where all exit early.

    Of policies that seem equal on few samples, one that answers most of them as the full model does is safer than one
    that loses some answers and happens to repair as many, and where none is lost, one with fewer early exits.

    `drops` are of some samples, or all, of a table of `num_samples`; `early_share` of them exit early.

    Example:

        >>> drops = np.zeros(100)
        >>> [round(predicted_drop(drops, share, 100), 3) for share in (0.0, 0.25, 1.0)]
        [0.0, 0.01, 0.02]
    """
    return float(drops.mean() + 2 * ((drops.var() + early_share / num_samples) / num_samples) ** 0.5)


def shares(exit_index: Tensor, num_exits: int) -> list[float]:
    """Share of the samples that exit at each exit."""
    return (torch.bincount(exit_index, minlength=num_exits).cpu().double() / len(exit_index)).tolist()
