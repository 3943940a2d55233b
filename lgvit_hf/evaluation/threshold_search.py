"""Thresholds, one per exit, searched for on a table: of confidences and of the harm gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..policies import build_policy
from .costs import Costs
from .exit_table import ExitTable
from .gate_fitting import cross_fitted_scores, fit_gate
from .predictions import Measured, Settings, predicted_drop

# of the confidence of a sample, which is the policy's score, or minus it for the entropy: all samples are above the
# first number and none above the second
RANGES = {"confidence": (0.0, 1.0), "margin": (-1.0, 1.0), "entropy": (-1e9, 0.0)}
# of one lost answer, in full models: from hardly any to more than any table can tell apart
_PRICES = np.geomspace(1000, 0.1, 17)
_FEW_PRICES = _PRICES[::3]
_FOLDS = 3
_UNIFORM_THRESHOLDS = 60
_MAX_SWEEPS = 10
# sets of exits, where scores depend on which are evaluated
_MOST_SETS = 8


def search_thresholds(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    """Thresholds of a policy with one score: one per exit, or one for several exits."""

    def fitted(part: ExitTable, exits: tuple[int, ...]) -> tuple[np.ndarray, Settings]:
        kept = tuple(temperatures[index] for index in (*exits, -1))
        return confidence_scores(part, policy, kept).numpy(), {}

    limits, sign = RANGES[policy], -1 if policy == "entropy" else 1
    if table.ensemble is None:
        scores = confidence_scores(table, policy, temperatures).numpy()
        found = _threshold_paths(table, costs, scores, limits, choose_exits)
    else:
        found = _by_exits(table, costs, limits, choose_exits, fitted)
    for entry in found:
        numbers = [sign * number + 0.0 for number in entry.settings["threshold"]]  # no negative zero
        yield entry._replace(settings={"name": policy, "threshold": numbers, "temperature": list(temperatures)})


def search_gates(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    """As `search_thresholds`, of the harm gate."""

    def fitted(part: ExitTable, exits: tuple[int, ...]) -> tuple[np.ndarray, Settings]:
        gate = fit_gate(part, temperatures=[temperatures[index] for index in exits])
        scores = cross_fitted_scores(part, gate)
        return scores, gate | {"temperature": list(temperatures), "exits": list(exits)}

    return _by_exits(table, costs, (0.0, 1.0), choose_exits, fitted)


def _by_exits(
    table: ExitTable,
    costs: Costs,
    limits: tuple[float, float],
    choose_exits: bool,
    fitted: Callable[[ExitTable, tuple[int, ...]], tuple[np.ndarray, Settings]],
) -> Iterator[Measured]:
    """Thresholds for several sets of exits, where what is known at one depends on those evaluated before.

    `fitted` gives the scores `[exits, N]` and the other settings for the table of some exits. The next sets are those
    that a search in this one keeps.
    """
    every = tuple(range(len(table.depths) - 1))
    waiting: list[tuple[int, ...]] = [every]
    tried: set[tuple[int, ...]] = set()
    while waiting and len(tried) < _MOST_SETS:
        exits = waiting.pop(0)
        tried.add(exits)
        part, prices = table.with_exits(exits), costs.with_exits(exits)
        scores, settings = fitted(part, exits)
        for entry in _threshold_paths(part, prices, scores, limits, False):
            spread = dict(zip(exits, entry.settings["threshold"], strict=True))
            thresholds = [spread.get(index, limits[1]) for index in every]
            yield entry._replace(settings={**settings, "threshold": thresholds}, path=entry.path and (exits,))
        if choose_exits:
            right = part.answered_right().numpy()
            found = [search(scores, right, prices, price, limits) for price in _FEW_PRICES * costs.backbone]
            kept = [tuple(np.array(exits)[thresholds < limits[1]].tolist()) for thresholds in found]
            waiting += [each for each in dict.fromkeys(kept) if each and each not in tried and each not in waiting]


def _threshold_paths(
    table: ExitTable, costs: Costs, scores: np.ndarray, limits: tuple[float, float], choose_exits: bool
) -> Iterator[Measured]:
    """Thresholds for `scores` `[E - 1, N]` at many prices of a lost answer, with their mean cost and drop."""
    right, full = table.answered_right().numpy(), table.right[-1].numpy()
    fold_of, every = np.arange(len(table)) % _FOLDS, np.full(len(table), True)
    folds = [fold_of == fold for fold in range(_FOLDS)] if len(table) >= _FOLDS else [every]

    def found(samples: np.ndarray, price: float) -> np.ndarray:
        return search(scores[:, samples], right[:, samples], costs, price, limits, choose_exits)

    def measured(samples: np.ndarray, thresholds: np.ndarray) -> tuple[float, float]:
        exits_here = scores[:, samples] > thresholds[:, None]
        exit_index = np.concatenate([exits_here, np.full_like(exits_here[:1], True)]).argmax(0)
        evaluated = np.flatnonzero(thresholds < limits[1]).tolist()
        exiting_at = np.bincount(exit_index, minlength=len(right)) / len(exit_index)
        answered = np.take_along_axis(right[:, samples], exit_index[None], 0)[0]
        early = 1 - exiting_at[-1]
        drop = predicted_drop(full[samples].astype(np.float64) - answered, early, len(table))
        return costs.mean(exiting_at.tolist(), evaluated), drop

    def settings(thresholds: np.ndarray) -> Settings:
        all_exit = np.flatnonzero(thresholds <= limits[0])
        if len(all_exit):
            # no sample reaches the deeper exits
            thresholds = np.where(np.arange(len(thresholds)) > all_exit[0], limits[1], thresholds)
        return {"threshold": [float(number) for number in thresholds]}

    for price in _PRICES * costs.backbone:
        # thresholds look better on samples they were fitted to than on new ones: each fold is judged by the others'
        apart = [measured(fold, found(~fold if len(folds) > 1 else fold, price)) for fold in folds]
        thresholds = found(every, price)
        cost, drop = np.maximum(np.mean(apart, axis=0), measured(every, thresholds)).tolist()
        yield Measured(cost, drop, settings(thresholds))
    for index in range(len(scores)) if choose_exits else ():
        # the static model that ends there, which must not be faster than what is found
        thresholds = np.where(np.arange(len(scores)) == index, *map(scores.dtype.type, limits))
        yield Measured(*measured(every, thresholds), settings(thresholds))
    uniform = uniform_thresholds(scores, limits)

    def some(number: int, exits: tuple[int, ...]) -> np.ndarray:
        return np.where(np.isin(np.arange(len(scores)), exits), uniform[number], scores.dtype.type(limits[1]))

    @cache
    def judged(number: int, exits: tuple[int, ...]) -> tuple[float, float]:
        return measured(every, some(number, exits))

    found_sets = list(with_fewer_exits(len(scores), len(uniform), judged, costs.backbone, choose_exits))
    for number, exits in found_sets:
        yield Measured(*judged(number, exits), settings(some(number, exits)), (exits,))
    fewer = dict.fromkeys(exits for _, exits in found_sets if len(exits) < len(scores))
    for exits, number in product(fewer, range(len(uniform))):
        yield Measured(*judged(number, exits), settings(some(number, exits)), (exits,), proof_only=True)


def confidence_scores(table: ExitTable, policy: str, temperatures: tuple[float, ...]) -> Tensor:
    """The confidence of each early exit in each sample, `[E - 1, N]`: the policy's score, minus it for the entropy."""
    # the policy's own arithmetic, so that no sample is on the other side of a threshold when the model runs
    judge = build_policy({"name": policy, "threshold": 0.0, "temperature": list(temperatures)}, len(temperatures) - 1)
    scores = [judge(logits, {}, index)[1]["score"] for index, logits in enumerate(table.policy_logits()[:-1])]
    return (-1 if policy == "entropy" else 1) * torch.stack(scores)


def uniform_thresholds(
    scores: np.ndarray, limits: tuple[float, float], number: int = _UNIFORM_THRESHOLDS
) -> list[np.ndarray]:
    """The curve to beat: thresholds `[E - 1]` that are one for all exits, an equal share of the scores apart."""
    cuts = [limits[0], *cuts_at(scores, np.linspace(0, 1, number), limits[1])]
    return [np.full(len(scores), cut, scores.dtype) for cut in cuts if cut < limits[1]]


def cuts_at(scores: np.ndarray, shares: np.ndarray, ceiling: float) -> list[float]:
    """Thresholds that these shares of the scores do not pass; half way to the next score, so that none lies on one.

    An export differs from its model by a bit, which must not send a sample to another exit.
    """
    ranked, values = np.sort(scores, axis=None), np.unique(scores)
    lower = np.unique(ranked[(shares * (len(ranked) - 1)).astype(int)])
    upper = np.append(values, scores.dtype.type(ceiling))[np.searchsorted(values, lower) + 1]
    cuts: list[float] = _between(lower, upper).tolist()
    return cuts


def _between(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Half way, so that no score lies on it; two neighbours in float32 have no such number."""
    middle = (lower + upper) / 2
    return np.where(middle < upper, middle, lower)


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
    thresholds, or is skipped if its head costs more than that gains.

    Args:
        scores (`np.ndarray`): `[E - 1, N]` float32; a sample exits where this is above the threshold.
        right (`np.ndarray`): `[E, N]` bool, or how likely; the final classifier last.
        costs (`Costs`): Of each segment.
        price (`float`): Of one wrong answer, in the unit of the costs.
        limits (`tuple[float, float]`): Thresholds above which every sample is, and none.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be skipped.

    Returns:
        `[E - 1]` float32, the upper limit where an exit is off.

    Example:

        >>> scores = np.array([[0.75, 0.25]], dtype=np.float32)
        >>> right = np.array([[True, False], [True, True]])
        >>> search(scores, right, Costs([1.0, 9.0], [0.0, 0.0]), price=100.0, limits=(0.0, 1.0)).tolist()
        [0.5]
    """
    # an exit where no sample exits is skipped, or evaluated nevertheless
    floor, ceiling = limits
    ceiling = ceiling if choose_exits else np.nextafter(scores.dtype.type(ceiling), scores.dtype.type(floor))
    orders = (-scores).argsort(axis=-1, kind="stable")
    lost = price * (1 - right)
    thresholds = np.full(len(scores), ceiling, scores.dtype)
    best, least = thresholds, np.inf
    for _ in range(_MAX_SWEEPS):
        thresholds = thresholds.copy()
        exits_here = scores > thresholds[:, None]
        to_go = costs.backbone_costs[-1] + costs.heads[-1] + lost[-1]
        for index in reversed(range(len(scores))):
            order = orders[index][~exits_here[:index].any(0)[orders[index]]]
            head, change = costs.heads[index], (lost[index] - to_go)[order]
            spared = head if choose_exits else 0.0
            thresholds[index] = _best_cut(scores[index][order], change, spared, (floor, ceiling))
            exits_here[index] = scores[index] > thresholds[index]
            paid = head if thresholds[index] < limits[1] else 0.0
            to_go = costs.backbone_costs[index] + paid + np.where(exits_here[index], lost[index], to_go)
        if to_go.mean() >= least * (1 - 1e-9):
            break
        best, least = thresholds, to_go.mean()
    return best


def _best_cut(scores: np.ndarray, change: np.ndarray, head: float, limits: tuple[float, float]) -> float:
    """The threshold for samples in order of confidence, if `change` is what each one's exiting adds to the objective.

    `head` is what a sample is spared where the exit is skipped, which the upper of the `limits` does.
    """
    floor, ceiling = limits
    if len(scores) == 0:
        return ceiling
    totals = change.cumsum()
    # samples of one score exit together
    totals[:-1][scores[:-1] == scores[1:]] = np.inf
    cut = int(totals.argmin())
    if totals[cut] + head * len(scores) >= 0:
        return ceiling
    if cut == len(scores) - 1:
        return floor
    return float(_between(scores[cut + 1], scores[cut]))


def with_fewer_exits(
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
            exits = min(without_one(exits), key=partial(objective, best)) if len(exits) > 1 else ()
        yield min(path)[1:]


def without_one(exits: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same exits without one of them, each in turn."""
    return [tuple(index for index in exits if index != out) for out in exits]
