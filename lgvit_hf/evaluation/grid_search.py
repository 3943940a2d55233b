"""Policies with a few parameters, all of which are tried on a table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np

from .costs import Costs
from .exit_table import ExitTable
from .predictions import Measured, Settings, consequences, predicted_drop, replayed_exits
from .threshold_search import RANGES, confidence_scores, cuts_at, with_fewer_exits

# of policies with several parameters, every combination is tried
_FEW_THRESHOLDS = 8
# of two parameters, one that is the same along a path
_HELD = {"confidence_entropy": "threshold", "patience_confidence": "patience"}
# of a reliability diagram, and of the accuracies that are tried as threshold
_MOST_BINS, _FEWEST_IN_BIN, _MOST_LEVELS = 50, 20, 30


def search_grid(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    """Combinations of the parameters of a policy, with all exits or the best of them."""
    combinations, num_exits = _combinations(table, policy, temperatures), len(table.depths) - 1

    @cache
    def judged(number: int, exits: tuple[int, ...]) -> tuple[float, float]:
        settings = _with_exits(combinations[number], exits, num_exits)
        exit_index, evaluated = replayed_exits(table, settings)
        cost, drops = consequences(table, exit_index, evaluated, costs)
        early = (exit_index < num_exits).double().mean().item()
        return cost, predicted_drop(drops.cpu().double().numpy(), early, len(table))

    choose_exits = choose_exits and policy != "fixed"
    for number, exits in with_fewer_exits(num_exits, len(combinations), judged, costs.backbone, choose_exits):
        settings, held = _with_exits(combinations[number], exits, num_exits), _HELD.get(policy)
        yield Measured(*judged(number, exits), settings, (exits, held and combinations[number][held]))


def _combinations(table: ExitTable, policy: str, temperatures: tuple[float, ...]) -> list[Settings]:
    """Settings of a policy with few parameters, without the exits that are evaluated."""

    def cuts(score: str) -> list[float]:
        scores = confidence_scores(table, score, temperatures).numpy()
        found = cuts_at(scores, np.linspace(0, 1, _FEW_THRESHOLDS + 1)[:-1], RANGES[score][1])
        return [-cut for cut in found] if score == "entropy" else found

    scaled, patiences = {"name": policy, "temperature": list(temperatures)}, range(1, len(table.depths))
    if policy == "fixed":
        return [{"name": policy, "exit_index": index} for index in range(len(table.depths))]
    if policy == "patience":
        return [{"name": policy, "patience": patience} for patience in patiences]
    if policy == "calibrated_confidence":
        return _accuracies(table, scaled)
    if policy == "patience_confidence":
        return [{**scaled, "patience": count, "threshold": cut} for count, cut in product(patiences, cuts("entropy"))]
    both = product(cuts("confidence"), cuts("entropy"))
    return [{**scaled, "threshold": confidence, "entropy_threshold": entropy} for confidence, entropy in both]


def _accuracies(table: ExitTable, scaled: Settings) -> list[Settings]:
    """Accuracies to demand of each exit, with the reliability diagrams that turn them into confidences."""
    scores = confidence_scores(table, "confidence", tuple(scaled["temperature"])).numpy()
    right = table.answered_right().double().numpy()
    bins = [_reliability(*pair) for pair in zip(scores, right, strict=False)]
    fitted = {"edges": [edges for edges, _ in bins], "accuracies": [accuracies for _, accuracies in bins]}
    levels = np.unique(np.concatenate(fitted["accuracies"]))
    # half way between two levels, so that rounding moves no sample
    middles = (levels[1:] + levels[:-1]) / 2 if len(levels) > 1 else levels / 2
    places = np.linspace(0, len(middles) - 1, min(len(middles), _MOST_LEVELS)).astype(int)
    return [{**scaled, **fitted, "threshold": float(threshold)} for threshold in middles[places]]


def _reliability(scores: np.ndarray, right: np.ndarray) -> tuple[list[float], list[float]]:
    """Confidences between bins of about equally many samples, and the accuracy of each bin."""
    number = min(_MOST_BINS, max(1, len(scores) // _FEWEST_IN_BIN))
    edges = np.unique([cut for cut in cuts_at(scores, np.linspace(0, 1, number + 1)[1:-1], 1.0) if cut < scores.max()])
    places = (scores[:, None] > edges).sum(1)
    counts = np.bincount(places, minlength=len(edges) + 1)
    accuracies = np.bincount(places, weights=right, minlength=len(edges) + 1) / np.maximum(counts, 1)
    return [float(edge) for edge in edges], [float(accuracy) for accuracy in accuracies]


def _with_exits(combination: Settings, exits: tuple[int, ...], num_exits: int) -> Settings:
    """The settings of a policy that evaluates only these exits."""
    if combination["name"] == "fixed":
        return combination
    if combination["name"] in ("confidence_entropy", "calibrated_confidence"):
        threshold, skipped = combination["threshold"], RANGES["confidence"][1]
        return {**combination, "threshold": [threshold if index in exits else skipped for index in range(num_exits)]}
    # with a patience of 1 all exit at the first exit, and none reaches the others
    first_only = combination["name"] == "patience" and combination["patience"] == 1
    return {**combination, "exits": list(exits[:1] if first_only else exits)}
