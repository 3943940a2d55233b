"""Candidates for a calibration: policies searched for on a table, from the safest to the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..policies import build_policy
from .costs import Costs
from .exit_table import ExitTable
from .gate_fitting import cross_fitted_scores, fit_gate

# of the confidence of a sample, which is the policy's score, or minus it for the entropy: all samples are above the
# first number and none above the second
RANGES = {"confidence": (0.0, 1.0), "margin": (-1.0, 1.0), "entropy": (-1e9, 0.0)}
# of one lost answer, in full models: from hardly any to more than any table can tell apart
_PRICES = np.geomspace(1000, 0.1, 17)
_FOLDS = 3
_UNIFORM_THRESHOLDS = 60
_MAX_SWEEPS = 10
# of policies with several parameters, every combination is tried
_FEW_THRESHOLDS = 8
_FEW_PRICES = _PRICES[::3]
# of a reliability diagram, and of the accuracies that are tried as threshold
_MOST_BINS, _FEWEST_IN_BIN, _MOST_LEVELS = 50, 20, 30
# sets of exits, where scores depend on which are evaluated
_MOST_SETS = 8

Settings = dict[str, Any]
# mean cost and predicted drop of settings on the table that is searched on
Measured = tuple[float, float, Settings]


def candidates(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool = True
) -> list[Settings]:
    """Policies of one name or of all, none worse than another in both cost and accuracy drop, as the table predicts.

    They come from the safest to the fastest. What was fitted to the samples is judged by cross-fitting, and a drop is
    predicted as `predicted_drop` says.

    Args:
        table (`ExitTable`): Samples to search on.
        costs (`Costs`): Of each segment, in any unit.
        policy (`str`): Its name, one of `SEARCHES`, or `"auto"` for all of them.
        temperatures (`tuple[float, ...]`): One per exit, the final classifier last.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be skipped.

    Example:

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
        for name in (SEARCHES if auto else [policy])
    )
    path, least = [], float("inf")
    for cost, drop, settings in sorted(measured, key=lambda entry: entry[:2]):
        # what is no cheaper than the full model must be more accurate
        if drop < min(least, 0.0 if cost >= costs.backbone else least):
            path.append(settings)
            least = drop
    return path[::-1]


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


# -- one threshold per exit ------------------------------------------------------------------------------------


def _thresholds(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    def fitted(part: ExitTable, exits: tuple[int, ...]) -> tuple[np.ndarray, Settings]:
        kept = tuple(temperatures[index] for index in (*exits, -1))
        return confidence_scores(part, policy, kept).numpy(), {}

    limits, sign = RANGES[policy], -1 if policy == "entropy" else 1
    if table.ensemble is None:
        scores = confidence_scores(table, policy, temperatures).numpy()
        found = _threshold_paths(table, costs, scores, limits, choose_exits)
    else:
        by_exits = _by_exits(table, costs, limits, choose_exits, fitted)
        found = ((cost, drop, settings["threshold"]) for cost, drop, settings in by_exits)
    for cost, drop, thresholds in found:
        numbers = [sign * number + 0.0 for number in thresholds]  # no negative zero
        yield cost, drop, {"name": policy, "threshold": numbers, "temperature": list(temperatures)}


def _gates(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    """The harm gate."""

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
        for cost, drop, thresholds in _threshold_paths(part, prices, scores, limits, False):
            spread = dict(zip(exits, thresholds, strict=True))
            yield cost, drop, {**settings, "threshold": [spread.get(index, limits[1]) for index in every]}
        if choose_exits:
            right = part.answered_right().numpy()
            found = [search(scores, right, prices, price, limits) for price in _FEW_PRICES * costs.backbone]
            kept = [tuple(np.array(exits)[thresholds < limits[1]].tolist()) for thresholds in found]
            waiting += [each for each in dict.fromkeys(kept) if each and each not in tried and each not in waiting]


def _threshold_paths(
    table: ExitTable, costs: Costs, scores: np.ndarray, limits: tuple[float, float], choose_exits: bool
) -> Iterator[tuple[float, float, list[float]]]:
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

    def settings(thresholds: np.ndarray) -> list[float]:
        all_exit = np.flatnonzero(thresholds <= limits[0])
        if len(all_exit):
            # no sample reaches the deeper exits
            thresholds = np.where(np.arange(len(thresholds)) > all_exit[0], limits[1], thresholds)
        return [float(number) for number in thresholds]

    for price in _PRICES * costs.backbone:
        # thresholds look better on samples they were fitted to than on new ones: each fold is judged by the others'
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
    """The confidence of each early exit in each sample, `[E - 1, N]`: the policy's score, minus it for the entropy."""
    # the policy's own arithmetic, so that no sample is on the other side of a threshold when the model runs
    judge = build_policy({"name": policy, "threshold": 0.0, "temperature": list(temperatures)}, len(temperatures) - 1)
    scores = [judge(logits, {}, index)[1]["score"] for index, logits in enumerate(table.policy_logits()[:-1])]
    return (-1 if policy == "entropy" else 1) * torch.stack(scores)


def uniform_thresholds(
    scores: np.ndarray, limits: tuple[float, float], number: int = _UNIFORM_THRESHOLDS
) -> list[np.ndarray]:
    """The curve to beat: thresholds `[E - 1]` that are one for all exits, an equal share of the scores apart."""
    cuts = [limits[0], *_cuts(scores, np.linspace(0, 1, number), limits[1])]
    return [np.full(len(scores), cut, scores.dtype) for cut in cuts if cut < limits[1]]


def _cuts(scores: np.ndarray, shares: np.ndarray, ceiling: float) -> list[float]:
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


# -- a few parameters, all of them tried -----------------------------------------------------------------------


def _grid(
    table: ExitTable, costs: Costs, policy: str, temperatures: tuple[float, ...], choose_exits: bool
) -> Iterator[Measured]:
    combinations, num_exits = _combinations(table, policy, temperatures), len(table.depths) - 1

    @cache
    def judged(number: int, exits: tuple[int, ...]) -> tuple[float, float]:
        settings = _with_exits(combinations[number], exits, num_exits)
        exit_index, evaluated = replayed_exits(table, settings)
        cost, drops = consequences(table, exit_index, evaluated, costs)
        early = (exit_index < num_exits).double().mean().item()
        return cost, predicted_drop(drops.cpu().double().numpy(), early, len(table))

    choose_exits = choose_exits and policy != "fixed"
    for number, exits in _with_fewer_exits(num_exits, len(combinations), judged, costs.backbone, choose_exits):
        yield *judged(number, exits), _with_exits(combinations[number], exits, num_exits)


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
            exits = min(without_one(exits), key=partial(objective, best)) if len(exits) > 1 else ()
        yield min(path)[1:]


def without_one(exits: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same exits without one of them, each in turn."""
    return [tuple(index for index in exits if index != out) for out in exits]


def _combinations(table: ExitTable, policy: str, temperatures: tuple[float, ...]) -> list[Settings]:
    """Settings of a policy with few parameters, without the exits that are evaluated."""

    def cuts(score: str) -> list[float]:
        scores = confidence_scores(table, score, temperatures).numpy()
        found = _cuts(scores, np.linspace(0, 1, _FEW_THRESHOLDS + 1)[:-1], RANGES[score][1])
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
    edges = np.unique([cut for cut in _cuts(scores, np.linspace(0, 1, number + 1)[1:-1], 1.0) if cut < scores.max()])
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


_GRIDS = ("calibrated_confidence", "confidence_entropy", "patience", "patience_confidence", "fixed")
SEARCHES = {**dict.fromkeys(RANGES, _thresholds), "gate": _gates, **dict.fromkeys(_GRIDS, _grid)}
