"""Candidates for a calibration: policies searched for on a table, from the safest to the fastest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

from .costs import Costs
from .exit_table import ExitTable
from .grid_search import search_grid
from .predictions import Measured, Settings
from .threshold_search import RANGES, search_gates, search_thresholds

# costs below this share of another are no accident of the samples that are searched on
_CLEARLY = 0.9
# judged on the samples that they were fitted to, so that they seem cheaper than they are
_FITTED = ("calibrated_confidence",)
_GRIDS = ("calibrated_confidence", "confidence_entropy", "patience", "patience_confidence", "fixed")
SEARCHES = {**dict.fromkeys(RANGES, search_thresholds), "gate": search_gates, **dict.fromkeys(_GRIDS, search_grid)}


def candidates(
    table: ExitTable,
    costs: Costs,
    policy: str,
    temperatures: tuple[float, ...],
    choose_exits: bool = True,
    proven: float | None = None,
) -> list[Settings]:
    """Policies of one name or of all, none worse than another in both cost and accuracy drop, as the table predicts.

    They come from the safest to the fastest. What was fitted to the samples is judged by cross-fitting, and a drop is
    predicted as `predicted_drop` says. For a proof those that differ in one number only, see `of_one_path`.

    Args:
        table (`ExitTable`): Samples to search on.
        costs (`Costs`): Of each segment, in any unit.
        policy (`str`): Its name, one of `SEARCHES`, or `"auto"` for all of them.
        temperatures (`tuple[float, ...]`): One per exit, the final classifier last.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be skipped.
        proven (`float`, *optional*): Drop that is to be proven.

    Example:

        >>> import torch
        >>> logits = torch.tensor([[[4.0, 0.0], [0.0, 0.1]], [[5.0, 0.0], [5.0, 0.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 0]), depths=[1, 2])
        >>> found = candidates(table, Costs([4.0, 4.0], [0.1, 0.1]), "confidence", (1.0, 1.0))
        >>> [round(settings["threshold"][0], 2) for settings in found]
        [0.75, 0.0]
    """
    auto = policy == "auto"
    measured = chain.from_iterable(
        # with every set of exits the policies of several parameters would take most of the time and win nothing
        SEARCHES[name](table, costs, name, temperatures, choose_exits and not (auto and name in _GRIDS))
        for name in ([name for name in SEARCHES if proven is None or name not in _FITTED] if auto else [policy])
    )
    if proven is not None:
        return of_one_path(measured, proven, "confidence" if auto else policy, len(table.depths) - 1)
    path, least = [], float("inf")
    for entry in sorted((entry for entry in measured if not entry.proof_only), key=lambda entry: entry[:2]):
        # what is no cheaper than the full model must be more accurate
        if entry.drop < min(least, 0.0 if entry.cost >= costs.backbone else least):
            path.append(entry.settings)
            least = entry.drop
    return path[::-1]


def of_one_path(measured: Iterable[Measured], limit: float, usual: str, num_exits: int) -> list[Settings]:
    """Policies that differ in one number, from the safest to the fastest: of the path that is cheapest within a drop.

    Tests in a fixed order end at the first that fails. Along a path one test differs little from the next; where a
    sequence goes from policy to policy, some test soon fails by chance. For the same reason a path must be clearly
    cheaper than that of the `usual` policy with all exits, of which some must be within the drop.
    """
    paths: dict[tuple[Any, ...], list[Measured]] = {}
    for entry in measured:
        if entry.path is not None:
            paths.setdefault((entry.settings["name"], *entry.path), []).append(entry)

    def least(path: list[Measured]) -> float:
        return min((entry.cost for entry in path if entry.drop <= limit), default=math.inf)

    all_exits = usual, tuple(range(num_exits))
    expected = min((path for key, path in paths.items() if key[:2] == all_exits), key=least)
    cheapest = min(paths.values(), key=least)
    chosen = cheapest if least(cheapest) < _CLEARLY * least(expected) < math.inf else expected
    # of twins the first
    apart = {entry[:2]: entry.settings for entry in reversed(chosen)}
    return [apart[point] for point in sorted(apart, reverse=True)]
