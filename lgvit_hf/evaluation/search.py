"""Candidates for a calibration: policies searched for on a table, from the safest to the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..policies import POLICIES, build_policy
from .costs import Costs
from .exit_table import ExitTable

# of the confidence of a sample, which is the policy's score, or minus it for the entropy: all rows are above the first
# number and none above the second
RANGES = {"confidence": (0.0, 1.0), "margin": (-1.0, 1.0), "entropy": (-1e9, 0.0)}
# of one lost answer, in full models: from hardly any to more than any table can tell apart
_PRICES = np.geomspace(1000, 0.1, 17)
_FOLDS = 3
_UNIFORM_THRESHOLDS = 60
_MAX_SWEEPS = 10
# of policies with several parameters, every combination is tried
_FEW_THRESHOLDS = 8
_FEW_PRICES = _PRICES[::3]

Settings = dict[str, Any]
# mean cost and mean drop of settings on the table that is searched on
Measured = tuple[float, float, Settings]


def candidates(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool = True
) -> list[Settings]:
    """Policies of one name, none worse than another in both cost and accuracy drop, as the table lets expect.

    They come from the safest to the fastest. What was fitted to the rows is judged by cross-fitting.

    Args:
        table (`ExitTable`): Rows to search on.
        costs (`Costs`): Of each segment, in any unit.
        policy (`str`): Its name, one of `SEARCHES`.
        temperatures (`tuple[float, ...]`): One per exit, the final classifier last.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be switched off.

    Example:

        >>> logits = torch.tensor([[[4.0, 0.0], [0.0, 0.1]], [[5.0, 0.0], [5.0, 0.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 0]), depths=[1, 2])
        >>> found = candidates(table, Costs([4.0, 4.0], [0.1, 0.1]), "confidence", (1.0, 1.0))
        >>> [round(settings["threshold"][0], 2) for settings in found]
        [0.75, 0.0]
    """
    measured = SEARCHES[policy](table, costs, policy, temperatures, choose_exits)
    path, least = [], float("inf")
    for _, drop, settings in sorted(measured, key=lambda entry: entry[:2]):
        if drop < least:
            path.append(settings)
            least = drop
    return path[::-1]


def leaving(table: ExitTable, settings: Settings) -> tuple[Tensor, list[int]]:
    """At which exit each row of a table leaves, `[N]`, and the early exits whose heads are run for it."""
    early = len(table.depths) - 1
    policy = build_policy(settings, early)
    return table.replay(policy).exit_index, [index for index in range(early) if not policy.skips(index)]


def consequences(table: ExitTable, left: Tensor, asked: list[int], costs: Costs) -> tuple[float, Tensor]:
    """The mean cost, and the drop of each row `[N]`: 1 if only the full model is right, -1 if only we are, else 0.

    Of an `expected` table, the expected drop, in [-1, 1].
    """
    right = table.right if table.right.is_floating_point() else table.right.long()
    drops = right[-1] - right.gather(0, left[None])[0]
    return costs.mean(shares(left, len(table.depths)), asked), drops


def shares(left: Tensor, num_exits: int) -> list[float]:
    """Share of the rows that leave at each exit."""
    return (torch.bincount(left, minlength=num_exits).cpu().double() / len(left)).tolist()


# -- one threshold per exit ------------------------------------------------------------------------------------


def _thresholds(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    limits, sign = RANGES[policy], -1 if policy == "entropy" else 1
    scores, right = confidence_scores(table, policy, temperatures).numpy(), table.right.numpy()
    fold_of, every = np.arange(len(table)) % _FOLDS, np.full(len(table), True)
    folds = [fold_of == fold for fold in range(_FOLDS)] if len(table) >= _FOLDS else [every]

    def found(rows: np.ndarray, price: float) -> np.ndarray:
        return search(scores[:, rows], right[:, rows], costs, price, limits, choose_exits)

    def measured(rows: np.ndarray, thresholds: np.ndarray) -> tuple[float, float]:
        leaves = scores[:, rows] > thresholds[:, None]
        left = np.concatenate([leaves, np.full_like(leaves[:1], True)]).argmax(0)
        asked = np.flatnonzero(thresholds < limits[1]).tolist()
        exiting_at = np.bincount(left, minlength=len(right)) / len(left)
        answered = np.take_along_axis(right[:, rows], left[None], 0)
        return costs.mean(exiting_at.tolist(), asked), right[-1, rows].mean() - answered.mean()

    def settings(thresholds: np.ndarray) -> Settings:
        all_leave = np.flatnonzero(thresholds <= limits[0])
        if len(all_leave):
            # nobody comes to the exits behind
            thresholds = np.where(np.arange(len(thresholds)) > all_leave[0], limits[1], thresholds)
        numbers = [sign * number + 0.0 for number in thresholds.tolist()]  # no negative zero
        return {"name": policy, "threshold": numbers, "temperature": list(temperatures)}

    for price in _PRICES * costs.backbone:
        # thresholds look better on rows they were fitted to than on new ones: each fold is judged by the others'
        apart = [measured(fold, found(~fold if len(folds) > 1 else fold, price)) for fold in folds]
        thresholds = found(every, price)
        yield *np.maximum(np.mean(apart, axis=0), measured(every, thresholds)).tolist(), settings(thresholds)
    for index in range(len(scores)) if choose_exits else ():
        # the static model that ends there, which must not be faster than what is found
        thresholds = np.where(np.arange(len(scores)) == index, *map(scores.dtype.type, limits))
        yield *measured(every, thresholds), settings(thresholds)
    uniform = uniform_thresholds(scores, limits)

    def some(number: int, exits: tuple[int, ...]) -> np.ndarray:
        return np.where(np.isin(np.arange(len(scores)), exits), uniform[number], scores.dtype.type(limits[1]))

    @cache
    def judged(number: int, exits: tuple[int, ...]) -> tuple[float, float]:
        return measured(every, some(number, exits))

    for number, exits in _with_fewer_exits(len(scores), len(uniform), judged, costs.backbone, choose_exits):
        yield *judged(number, exits), settings(some(number, exits))


def confidence_scores(table: ExitTable, policy: str, temperatures: tuple[float, ...]) -> Tensor:
    """How sure each early exit is of each row, `[E - 1, N]`: the policy's score, or minus it for the entropy."""
    # the policy's own arithmetic, so that no row is on the other side of a threshold when the model runs
    judge = POLICIES[policy](threshold=0.0, temperature=list(temperatures))
    scores = [judge(logits, {}, index)[1]["score"] for index, logits in enumerate(table.logits[:-1])]
    return (-1 if policy == "entropy" else 1) * torch.stack(scores)


def uniform_thresholds(
    scores: np.ndarray, limits: tuple[float, float], number: int = _UNIFORM_THRESHOLDS
) -> list[np.ndarray]:
    """The curve to beat: thresholds `[E - 1]` that are one for all exits, an equal share of the scores apart."""
    cuts = [limits[0], *_cuts(scores, np.linspace(0, 1, number), limits[1])]
    return [np.full(len(scores), cut, scores.dtype) for cut in cuts if cut < limits[1]]


def _cuts(scores: np.ndarray, shares: np.ndarray, ceiling: float) -> list[float]:
    """Thresholds that these shares of the scores do not pass; half way to the next score, so that none lies on one.

    An export differs from its model by a bit, which must not send a row to another exit.
    """
    ranked, values = np.sort(scores, axis=None), np.unique(scores)
    below = np.unique(ranked[(shares * (len(ranked) - 1)).astype(int)])
    above = np.append(values, scores.dtype.type(ceiling))[np.searchsorted(values, below) + 1]
    middle = (below + above) / 2
    # two neighbours in float32 have no such number
    return np.where(middle < above, middle, below).tolist()


def search(
    scores: np.ndarray,
    right: np.ndarray,
    costs: Costs,
    price: float,
    limits: tuple[float, float],
    choose_exits: bool = True,
) -> np.ndarray:
    """Thresholds that make `mean cost + price * share of wrong answers` small: exact for each exit given the others.

    The exits are visited from deep to shallow until nothing gets better; each is given the best of all its
    thresholds, or is switched off if its head costs more than that gains.

    Args:
        scores (`np.ndarray`): `[E - 1, N]` float32; a row leaves where this is above the threshold.
        right (`np.ndarray`): `[E, N]` bool, or how likely; the final classifier last.
        costs (`Costs`): Of each segment.
        price (`float`): Of one wrong answer, in the unit of the costs.
        limits (`tuple[float, float]`): Thresholds above which every row is, and none.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be switched off.

    Returns:
        `[E - 1]` float32, the upper limit where an exit is off.

    Example:

        >>> scores = np.array([[0.75, 0.25]], dtype=np.float32)
        >>> right = np.array([[True, False], [True, True]])
        >>> search(scores, right, Costs([1.0, 9.0], [0.0, 0.0]), price=100.0, limits=(0.0, 1.0)).tolist()
        [0.5]
    """
    # an exit where nobody leaves is switched off, or asked nevertheless
    floor, ceiling = limits
    ceiling = ceiling if choose_exits else np.nextafter(scores.dtype.type(ceiling), scores.dtype.type(floor))
    orders = (-scores).argsort(axis=-1, kind="stable")
    lost = price * (1 - right)
    thresholds = np.full(len(scores), ceiling, scores.dtype)
    best, least = thresholds, np.inf
    for _ in range(_MAX_SWEEPS):
        thresholds = thresholds.copy()
        leaves = scores > thresholds[:, None]
        to_go = costs.backbone_costs[-1] + costs.heads[-1] + lost[-1]
        for index in reversed(range(len(scores))):
            order = orders[index][~leaves[:index].any(0)[orders[index]]]
            head, change = costs.heads[index], (lost[index] - to_go)[order]
            spared = head if choose_exits else 0.0
            thresholds[index] = _best_cut(scores[index][order], change, spared, (floor, ceiling))
            leaves[index] = scores[index] > thresholds[index]
            paid = head if thresholds[index] < limits[1] else 0.0
            to_go = costs.backbone_costs[index] + paid + np.where(leaves[index], lost[index], to_go)
        if to_go.mean() >= least * (1 - 1e-9):
            break
        best, least = thresholds, to_go.mean()
    return best


def _best_cut(scores: np.ndarray, change: np.ndarray, head: float, limits: tuple[float, float]) -> float:
    """The threshold for rows sorted from surest down, if `change` is what each one's leaving adds to the objective.

    `head` is what a row is spared where the exit is switched off, which the upper of the `limits` does.
    """
    floor, ceiling = limits
    if len(scores) == 0:
        return ceiling
    totals = change.cumsum()
    # rows of one score leave together
    totals[:-1][scores[:-1] == scores[1:]] = np.inf
    cut = int(totals.argmin())
    if totals[cut] + head * len(scores) >= 0:
        return ceiling
    if cut == len(scores) - 1:
        return floor
    # half way, so that none lies on it; two neighbours in float32 have no such number
    middle = (scores[cut] + scores[cut + 1]) / 2
    return middle if middle < scores[cut] else scores[cut + 1]


# -- a few parameters, all of them tried -----------------------------------------------------------------------


def _every_exit(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    for index in range(len(table.depths)):
        settings = {"name": policy, "exit_index": index}
        cost, drops = consequences(table, *leaving(table, settings), costs)
        yield cost, drops.cpu().double().mean().item(), settings


def _grid(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    combinations = list(_GRIDS[policy](table, temperatures))

    @cache
    def judged(number: int, exits: tuple[int, ...]) -> tuple[float, float]:
        cost, drops = consequences(table, *leaving(table, combinations[number](exits)), costs)
        return cost, drops.cpu().double().mean().item()

    num_exits = len(table.depths) - 1
    for number, exits in _with_fewer_exits(num_exits, len(combinations), judged, costs.backbone, choose_exits):
        yield *judged(number, exits), combinations[number](exits)


def _with_fewer_exits(
    num_exits: int,
    num_combinations: int,
    judged: Callable[[int, tuple[int, ...]], tuple[float, float]],
    full_cost: float,
    choose_exits: bool,
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every combination of parameters with all exits; and the best at some prices, as the worst exit goes in turn."""
    every = tuple(range(num_exits))
    yield from ((number, every) for number in range(num_combinations))
    for price in _FEW_PRICES * full_cost if choose_exits else ():

        def objective(number: int, exits: tuple[int, ...], price: float = price) -> float:
            cost, drop = judged(number, exits)
            return cost + price * drop

        exits, path = every, []
        while exits:
            best = min(range(num_combinations), key=partial(objective, exits=exits))
            path.append((objective(best, exits), best, exits))
            smaller = [tuple(index for index in exits if index != out) for out in exits]
            exits = min(smaller, key=partial(objective, best)) if len(exits) > 1 else ()
        yield min(path)[1:]


Combination = Callable[[tuple[int, ...]], Settings]


def _patience(table: ExitTable, temperatures: tuple[float, ...]) -> Iterator[Combination]:
    for patience in range(1, len(table.depths)):
        yield lambda exits, patience=patience: {
            "name": "patience",
            "patience": patience,
            # with a patience of 1 all leave at the first exit, and nobody comes to the others
            "exits": list(exits if patience > 1 else exits[:1]),
        }


def _patience_confidence(table: ExitTable, temperatures: tuple[float, ...]) -> Iterator[Combination]:
    thresholds = [-number for number in _few_cuts(table, "entropy", temperatures)]
    for patience, threshold in product(range(1, len(table.depths)), thresholds):
        yield lambda exits, patience=patience, threshold=threshold: {
            "name": "patience_confidence",
            "threshold": threshold,
            "temperature": list(temperatures),
            "patience": patience,
            "exits": list(exits),
        }


def _confidence_entropy(table: ExitTable, temperatures: tuple[float, ...]) -> Iterator[Combination]:
    confidences = _few_cuts(table, "confidence", temperatures)
    entropies = [-number for number in _few_cuts(table, "entropy", temperatures)]
    for confidence, entropy in product(confidences, entropies):
        yield lambda exits, confidence=confidence, entropy=entropy: {
            "name": "confidence_entropy",
            "threshold": [
                confidence if index in exits else RANGES["confidence"][1] for index in range(len(table.depths) - 1)
            ],
            "temperature": list(temperatures),
            "entropy_threshold": entropy,
        }


def _few_cuts(table: ExitTable, policy: str, temperatures: tuple[float, ...]) -> list[float]:
    scores = confidence_scores(table, policy, temperatures).numpy()
    return _cuts(scores, np.linspace(0, 1, _FEW_THRESHOLDS + 1)[:-1], RANGES[policy][1])


_GRIDS = {
    "confidence_entropy": _confidence_entropy,
    "patience": _patience,
    "patience_confidence": _patience_confidence,
}
SEARCHES = {**dict.fromkeys(RANGES, _thresholds), **dict.fromkeys(_GRIDS, _grid), "fixed": _every_exit}
