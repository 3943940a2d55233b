"""Thresholds, exits and temperatures chosen on a table of exits, with or without a guarantee."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..policies import POLICIES, probabilities
from .bounds import drop_p_value, harm_p_value, passed_in_order, rows_needed
from .costs import Costs
from .table import ExitTable

# of the sureness of a row, which is the policy's score, or minus it for the entropy: all rows are above the first
# number and none above the second
_RANGES = {"confidence": (0.0, 1.0), "margin": (-1.0, 1.0), "entropy": (-1e9, 0.0)}
# of one lost answer, in full models: from hardly any to more than any table can tell apart
_PRICES = np.geomspace(1000, 0.1, 25)
_UNIFORM_THRESHOLDS = 60
_MAX_SWEEPS = 10


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` chose, and what it is worth on rows it was not fitted on.

    Args:
        policy (`dict`): For `model.set_exit_policy`.
        exits (`tuple[int, ...]`): Indices of the early exits that stay switched on; their heads are paid for.
        thresholds (`tuple[float, ...]`): One per early exit; an exit that is off has one no score passes.
        temperatures (`tuple[float, ...]`): One per exit, the final classifier last.
        accuracy (`float`): Share of the rows answered rightly; without labels, as the full model does.
        full_accuracy (`float`): The same of the full model.
        mean_depth (`float`): Blocks run per row.
        mean_cost (`float`): Of one row, heads counted, in the unit of the costs.
        bound (`str`): `"drop"`, `"harm"`, or `"none"`: no guarantee, but a point estimate on `n` rows.
        n (`int`): Rows tested on, which the search has not seen.
        delta (`float`, *optional*): Probability that the guarantee does not hold, over the calibration rows.
        guaranteed_drop (`float`, *optional*): What the true drop (or harm) then exceeds with that probability at most.
    """

    policy: dict[str, Any]
    exits: tuple[int, ...]
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    accuracy: float
    full_accuracy: float
    mean_depth: float
    mean_cost: float
    bound: str
    n: int
    delta: float | None = None
    guaranteed_drop: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class _Rows:
    """How sure each early exit is of each row, `[E - 1, N]`, and whether each exit is right, `[E, N]`."""

    sureness: Tensor
    right: Tensor


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least negative log-likelihood (Guo et al., https://arxiv.org/abs/1706.04599).

    Golden-section search on its logarithm, in float64: the loss is convex in one over the temperature, so it has one
    valley. Between 1/50 and 50, where it ends if the rows are all answered rightly or are worse than chance.

    Args:
        logits (`Tensor`): `[N, C]`.
        labels (`Tensor`): `[N]` int64.

    Example:

        >>> logits = torch.tensor([[2.0, 0.0]] * 4)
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 2 / log 3: a probability of 3/4
        1.82
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits / np.exp(log_temperature), labels).item()

    ratio = (5**0.5 - 1) / 2
    low, high = -np.log(50), np.log(50)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    while high - low > 1e-5:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = loss(right)
    return float(np.exp((low + high) / 2))


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equal width (https://arxiv.org/abs/1706.04599).

    Args:
        logits (`Tensor`): `[N, C]`, already divided by a temperature if there is one.
        labels (`Tensor`): `[N]` int64.
        bins (`int`, *optional*, defaults to 15): Open below, closed above.

    Example:

        >>> logits = torch.tensor([[9.0, 0.0]] * 4)
        >>> round(expected_calibration_error(logits, torch.tensor([0, 0, 0, 1])), 2)
        0.25
    """
    confidence, answers = torch.softmax(logits.double(), -1).max(-1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, confidence - (answers == labels).double())
    return gaps.abs().sum().item() / len(labels)


def split(table: ExitTable, seed: int = 0) -> tuple[ExitTable, ExitTable]:
    """Two random halves of a table, to search and to test on; the same whatever the order of its rows."""
    key = table.logits.double().sum(-1).T @ torch.arange(1, len(table.depths) + 1, dtype=torch.float64)
    shuffle = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    rows = key.argsort(stable=True)[shuffle]
    half = len(rows) // 2
    return table.select(rows[:half]), table.select(rows[half:])


def calibrate(
    table: ExitTable,
    *,
    costs: Costs,
    policy: str = "confidence",
    max_accuracy_drop: float | None = None,
    min_speedup: float | None = None,
    max_macs: float | None = None,
    delta: float | None = None,
    bound: str = "drop",
    labels: bool = True,
    temperature: bool = True,
    choose_exits: bool = True,
) -> Calibration:
    """Fit temperatures and search for thresholds and exits on one half of a table; choose from these on the other.

    The cheapest policy within `max_accuracy_drop` is returned; without one, the most accurate within the cost asked.
    With `delta`, what was found is tested on the second half from the safest to the fastest, up to the first that
    fails (Learn then Test, https://arxiv.org/abs/2110.01052); if that is the safest, all exits are switched off.

    Args:
        table (`ExitTable`): Of rows that were not trained on.
        costs (`Costs`): Of each segment's blocks and head.
        policy (`str`, *optional*, defaults to `"confidence"`): Or `"margin"`, `"entropy"`.
        max_accuracy_drop (`float`, *optional*): Share of all rows, in (0, 1) with `delta`.
        min_speedup (`float`, *optional*): Cost of the plain model over the mean cost.
        max_macs (`float`, *optional*): Largest mean cost of a row, in the unit of `costs`.
        delta (`float`, *optional*): Allowed probability that the true drop is above `max_accuracy_drop`.
        bound (`str`, *optional*, defaults to `"drop"`): With `delta`, what is bounded: the drop of the accuracy, or
            the `"harm"`, the share of rows where only the full model is right, which repaired mistakes do not offset.
        labels (`bool`, *optional*, defaults to `True`): `False` takes the full model's answers for the truth.
        temperature (`bool`, *optional*, defaults to `True`): Whether each exit's is fitted.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be switched off.

    Raises:
        ValueError: A target is missing, out of range or out of reach, the costs do not fit, or the rows are too few.

    Example:

        >>> logits = torch.tensor([[[4.0, 0.0], [0.0, 0.1]], [[5.0, 0.0], [5.0, 0.0]]]).repeat(1, 50, 1)
        >>> table = ExitTable(logits, labels=torch.zeros(100, dtype=torch.long), depths=[1, 2])
        >>> found = calibrate(table, costs=Costs([4.0, 4.0], [0.1, 0.1]), max_accuracy_drop=0.01, temperature=False)
        >>> found.accuracy, found.exits, found.mean_cost < 8.1
        (1.0, (0,), True)
    """
    _check(table, costs, policy, max_accuracy_drop, min_speedup, max_macs, delta, bound)
    if not labels:
        table = ExitTable(table.logits, table.logits[-1].argmax(-1), table.depths)
    searched, tested = split(table)
    if delta is not None and len(tested) < (needed := rows_needed(bound, max_accuracy_drop, delta)):
        raise ValueError(
            f"{len(table)} rows are too few to prove a {bound} of {max_accuracy_drop:g} at delta={delta:g}, of which "
            f"half are tested on: at least {2 * needed} are needed, more if any answer is lost"
        )
    temperatures = tuple(fit_temperature(exit, searched.labels) if temperature else 1.0 for exit in searched.logits)
    off = torch.full((len(table.depths) - 1,), _RANGES[policy][1])
    # safest first, and always within any drop: the full model
    candidates = [off, *_frontier(_rows(searched, policy, temperatures), costs, policy, choose_exits)]
    rows = _rows(tested, policy, temperatures)
    results = [_results(rows, thresholds, costs, policy) for thresholds in candidates]
    chosen = _choose(results, costs, max_accuracy_drop, min_speedup, max_macs, delta, bound)
    left, mean_cost, _ = results[chosen]
    thresholds = candidates[chosen]
    sign = -1 if policy == "entropy" else 1
    numbers = tuple(sign * threshold for threshold in thresholds.tolist())
    return Calibration(
        policy={"name": policy, "threshold": list(numbers), "temperature": list(temperatures)},
        exits=tuple((thresholds < _RANGES[policy][1]).nonzero()[:, 0].tolist()),
        thresholds=numbers,
        temperatures=temperatures,
        accuracy=_answered(rows.right, left).double().mean().item(),
        full_accuracy=rows.right[-1].double().mean().item(),
        mean_depth=torch.tensor(table.depths, dtype=torch.float64)[left].mean().item(),
        mean_cost=mean_cost,
        bound="none" if delta is None else bound,
        n=len(tested),
        delta=delta,
        guaranteed_drop=None if delta is None else max_accuracy_drop,
    )


def _check(table, costs, policy, max_accuracy_drop, min_speedup, max_macs, delta, bound) -> None:
    exits = len(table.depths)
    if len(costs.trunks) != exits or len(costs.heads) != exits:
        raise ValueError(
            f"costs are of {len(costs.trunks)} segments and {len(costs.heads)} heads, the table of {exits}"
        )
    if policy not in _RANGES:
        raise ValueError(f"calibrate knows the policies {', '.join(_RANGES)}, not {policy!r}")
    if bound not in ("drop", "harm"):
        raise ValueError(f"bound={bound!r} must be 'drop' or 'harm'")
    if max_accuracy_drop is None and min_speedup is None and max_macs is None:
        raise ValueError("nothing is asked: give max_accuracy_drop, min_speedup or max_macs")
    if delta is not None and not (max_accuracy_drop is not None and 0 < max_accuracy_drop < 1 and 0 < delta < 1):
        raise ValueError("delta, between 0 and 1, needs a max_accuracy_drop between 0 and 1")
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop:g} is a share of all rows, from 0 to 1")
    for name, value in (("min_speedup", min_speedup), ("max_macs", max_macs)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value:g} must be above 0")
    unknown = int(table.logits.isnan().any(-1).any(0).sum())
    if unknown:
        raise ValueError(f"{unknown} of {len(table)} rows have NaN logits; leave them out, or repair the model")
    if len(table) < 2:
        raise ValueError(f"{len(table)} rows are too few: at least 2 are needed, one to search and one to test on")


def _rows(table: ExitTable, policy: str, temperatures: tuple[float, ...]) -> _Rows:
    # the policy's own arithmetic, so that no row is on the other side of a threshold when the model runs
    judge = POLICIES[policy](threshold=0.0, temperature=list(temperatures))
    scores = [judge(logits, {}, index)[1]["score"] for index, logits in enumerate(table.logits[:-1])]
    sign = -1 if policy == "entropy" else 1
    return _Rows(sign * torch.stack(scores), table.logits.argmax(-1) == table.labels)


def _results(rows: _Rows, thresholds: Tensor, costs: Costs, policy: str) -> tuple[Tensor, float, Tensor]:
    """Where each row leaves `[N]`, the mean cost, and the drop of each row `[N]` in {-1, 0, 1}."""
    leaves = torch.cat([rows.sureness > thresholds[:, None], torch.ones_like(rows.right[-1:])])
    left = leaves.byte().argmax(0)
    on = (thresholds < _RANGES[policy][1]).nonzero()[:, 0].tolist()
    spent = torch.tensor([costs.of_exit(index, on) for index in range(len(leaves))], dtype=torch.float64)
    drops = rows.right[-1].long() - _answered(rows.right, left).long()
    return left, spent[left].mean().item(), drops


def _answered(right: Tensor, left: Tensor) -> Tensor:
    return right.gather(0, left[None])[0]


def _choose(results, costs, max_accuracy_drop, min_speedup, max_macs, delta, bound) -> int:
    """Index of the candidate to return; the first is the full model, the others go from safest to fastest."""
    speedup_cost = costs.backbone / min_speedup if min_speedup is not None else float("inf")
    budget = min(speedup_cost, float("inf") if max_macs is None else max_macs)
    drops = [drop.double().mean().item() for _, _, drop in results]
    allowed = range(len(results))
    if delta is not None:
        p_values = [_p_value(drop.numpy(), max_accuracy_drop, delta, bound) for _, _, drop in results[1:]]
        allowed = range(1 + passed_in_order(p_values, delta))
    elif max_accuracy_drop is not None:
        allowed = [index for index in allowed if drops[index] <= max_accuracy_drop]
    within = [index for index in allowed if results[index][1] <= budget]
    if not within:
        least = min(results[index][1] for index in allowed)
        limits = "" if max_accuracy_drop is None else f" within max_accuracy_drop={max_accuracy_drop:g}"
        raise ValueError(f"a mean cost of {budget:g} is out of reach{limits}: the least is {least:g}")
    if max_accuracy_drop is None:
        return min(within, key=lambda index: (drops[index], results[index][1]))
    return min(within, key=lambda index: results[index][1])


def _p_value(drops: np.ndarray, limit: float, delta: float, bound: str) -> float:
    return harm_p_value(drops == 1, limit) if bound == "harm" else float(drop_p_value(drops, limit, delta))


# -- search ----------------------------------------------------------------------------------------------------


def _frontier(rows: _Rows, costs: Costs, policy: str, choose_exits: bool) -> list[Tensor]:
    """Thresholds `[E - 1]`, safest first: one for all exits or one for each, none worse in both cost and drop."""
    limits = _RANGES[policy]
    prices = [price * costs.backbone for price in _PRICES]
    found = [search(rows.sureness, rows.right, costs, price, limits, choose_exits) for price in prices]
    found += _uniform(rows.sureness, limits)
    measured = []
    for thresholds in found:
        _, cost, drop = _results(rows, thresholds, costs, policy)
        measured.append((cost, drop.double().mean().item(), thresholds))
    measured.sort(key=lambda entry: entry[:2])
    path, least = [], float("inf")
    for _, drop, thresholds in measured:
        if drop < least:
            path.append(thresholds)
            least = drop
    return path[::-1]


def _uniform(sureness: Tensor, limits: tuple[float, float]) -> list[Tensor]:
    """The curve to beat: thresholds `[E - 1]` that are one for all exits, an equal share of the scores apart."""
    shares = torch.linspace(0, 1, _UNIFORM_THRESHOLDS, dtype=torch.float64)
    ranked = sureness.flatten().sort().values
    shared = ranked[(shares * (len(ranked) - 1)).long()].unique().tolist()
    return [sureness.new_full((len(sureness),), number) for number in [limits[0], *shared] if number < limits[1]]


def search(
    sureness: Tensor, right: Tensor, costs: Costs, price: float, limits: tuple[float, float], choose_exits: bool = True
) -> Tensor:
    """Thresholds that make `mean cost + price * share of wrong answers` small: exact for each exit given the others.

    The exits are visited from deep to shallow until nothing gets better; each is given the best of all its
    thresholds, or is switched off if its head costs more than that gains.

    Args:
        sureness (`Tensor`): `[E - 1, N]`; a row leaves where this is above the threshold.
        right (`Tensor`): `[E, N]` bool, the final classifier last.
        costs (`Costs`): Of each segment.
        price (`float`): Of one wrong answer, in the unit of the costs.
        limits (`tuple[float, float]`): Thresholds above which every row is, and none.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be switched off.

    Returns:
        `[E - 1]` float32, the upper limit where an exit is off.

    Example:

        >>> right = torch.tensor([[True, False], [True, True]])
        >>> search(torch.tensor([[0.75, 0.25]]), right, Costs([1.0, 9.0], [0.0, 0.0]), 100.0, (0.0, 1.0)).tolist()
        [0.5]
    """
    orders = sureness.argsort(dim=-1, descending=True, stable=True)
    thresholds = torch.full((len(sureness),), limits[1])
    best, least = thresholds, float("inf")
    for _ in range(_MAX_SWEEPS):
        thresholds = thresholds.clone()
        leaves = sureness > thresholds[:, None]
        to_go = costs.trunks[-1] + costs.heads[-1] + price * (~right[-1]).double()
        for index in reversed(range(len(sureness))):
            lost = price * (~right[index]).double()
            order = orders[index][~leaves[:index].any(0)[orders[index]]]
            head = costs.heads[index]
            thresholds[index] = _best_cut(sureness[index][order], (lost - to_go)[order], head, limits, choose_exits)
            leaves[index] = sureness[index] > thresholds[index]
            paid = head if not choose_exits or thresholds[index] < limits[1] else 0.0
            to_go = costs.trunks[index] + paid + torch.where(leaves[index], lost, to_go)
        if not to_go.mean().item() < least - 1e-9 * abs(least if least < float("inf") else 0):
            break
        best, least = thresholds, to_go.mean().item()
    return best


def _best_cut(
    sureness: Tensor, change: Tensor, head: float, limits: tuple[float, float], choose_exits: bool
) -> Tensor:
    """The threshold for rows sorted from surest down, if `change` is what each one's leaving adds to the objective."""
    floor, ceiling = (sureness.new_tensor(limit) for limit in limits)
    if len(sureness) == 0:
        return ceiling
    totals = change.cumsum(0)
    # rows of one score leave together
    totals[:-1] = totals[:-1].masked_fill(sureness[:-1] == sureness[1:], torch.inf)
    cut = int(totals.argmin())
    if totals[cut] + (head * len(sureness) if choose_exits else 0.0) >= 0:
        return ceiling
    if cut == len(sureness) - 1:
        return floor
    # half way, so that none lies on it; two neighbours in float32 have no such number
    middle = (sureness[cut] + sureness[cut + 1]) / 2
    return torch.where(middle < sureness[cut], middle, sureness[cut + 1])


def best_threshold(table: ExitTable) -> float:
    """The confidence threshold, one for all exits, with the highest accuracy on a table; the fastest of several.

    A point estimate on the table's rows, without a guarantee: report on other rows.

    Args:
        table (`ExitTable`): Of rows that were not trained on.

    Returns:
        A threshold from 0 (every row leaves at the first exit) to 1 (none leaves early).

    Example:

        >>> import torch
        >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[5.0, 0.0], [5.0, 0.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 0]), depths=[1, 2])
        >>> 0.52 < best_threshold(table) < 0.96
        True
    """
    scores = probabilities(table.logits[:-1].flatten(0, 1)).amax(-1).unique()
    # between two scores, so that none lies on a threshold; a few hundred of them are fine enough
    candidates = ((scores[1:] + scores[:-1]) / 2)[:: max(1, len(scores) // 500)].tolist()

    def accuracy(threshold: float) -> float:
        answers = table.replay({"name": "confidence", "threshold": threshold})
        return (answers.logits.argmax(-1) == table.labels).float().mean().item()

    # the first of equals is the lowest
    return max([0.0, *candidates, 1.0], key=accuracy)
