"""Thresholds, exits and temperatures chosen on a table of exits, with or without a guarantee."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calibration_report import Calibration
from .cost_table import CostTable
from .exit_table import ExitTable
from .metrics import expected_calibration_error
from .predictions import Settings, consequences, replayed_exits, shares
from .risk_control import drop_p_value, harm_p_value, passed_in_order, samples_needed
from .search import SEARCHES, candidates


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least negative log-likelihood (Guo et al., https://arxiv.org/abs/1706.04599).

    Golden-section search on its logarithm, in float64: the loss is convex in one over the temperature, so it has one
    valley. Between 1/50 and 50, where it ends if the samples are all answered rightly or are worse than chance.

    Args:
        logits (`Tensor`): `[N, C]`.
        labels (`Tensor`): `[N]` int64, or probabilities `[N, C]`.

    Example:

        >>> logits = torch.tensor([[2.0, 0.0]] * 4)
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 2 / log 3: a probability of 3/4
        1.82
    """
    logits, labels = logits.cpu().double(), labels.cpu()  # not every accelerator has float64
    labels = labels.double() if labels.is_floating_point() else labels

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


def split_table(table: ExitTable, seed: int = 0) -> tuple[ExitTable, ExitTable]:
    """Two random halves of a table, to search and to test on; the same whatever the order of its samples."""
    shuffled = _shuffled(table, seed)
    rows, half = torch.arange(len(table)), len(table) // 2
    return shuffled.select(rows[:half]), shuffled.select(rows[half:])


def _shuffled(table: ExitTable, seed: int = 0) -> ExitTable:
    """The samples in a random order that does not depend on the order they came in.

    They are sorted by hashes: a smooth function of their values could sort them by difficulty, and half of them would
    not be a random half. Samples that are alike get hashes of their own, and other samples beside them other hashes.
    """
    digests, seen = _sample_digests(table), Counter[bytes]()
    salt = hashlib.sha256(b"%d" % seed + b"".join(sorted(digests))).digest()
    keys = []
    for digest in digests:
        keys.append(hashlib.sha256(salt + digest + b"%d" % seen[digest]).digest())
        seen[digest] += 1
    return table.select(torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.long))


def _sample_digests(table: ExitTable) -> list[bytes]:
    """A digest of each sample's logits and label."""
    logits, labels = table.logits.transpose(0, 1).contiguous().numpy(), table.labels.tolist()
    return [hashlib.sha256(b"%d " % label + row.tobytes()).digest() for row, label in zip(logits, labels, strict=True)]


def calibrate(
    table: ExitTable,
    *,
    policy: str = "confidence",
    max_accuracy_drop: float | None = None,
    min_speedup: float | None = None,
    max_macs: float | None = None,
    max_latency: float | None = None,
    delta: float | None = None,
    bound: str = "drop",
    labels: bool | str = True,
    cost_table: CostTable | None = None,
    batch_size: int = 1,
    temperature: bool = True,
    choose_exits: bool = True,
    tested: ExitTable | None = None,
) -> Calibration:
    """Fit temperatures and search for thresholds and exits on one half of a table; choose from these on the other.

    The cheapest policy within `max_accuracy_drop` is returned; without one, the most accurate within the cost asked.
    With `delta`, policies that differ in one number (see `of_one_path`) are tested on the second half from the safest
    to the fastest, up to the first that fails (Learn then Test, https://arxiv.org/abs/2110.01052; early exits:
    https://arxiv.org/abs/2405.20915); if that is the safest, all exits are skipped.

    Args:
        table (`ExitTable`): Of samples that were not trained on, with the costs that `collect` counts.
        policy (`str`, *optional*, defaults to `"confidence"`):
            A built-in policy's name, or `"auto"`: all of them, and one confidence where none is clearly cheaper.
        max_accuracy_drop (`float`, *optional*): Share of all samples, in (0, 1) with `delta`.
        min_speedup (`float`, *optional*): Cost of the plain model over the mean cost.
        max_macs (`float`, *optional*): Largest mean MACs of a sample.
        max_latency (`float`, *optional*): Largest mean milliseconds of a sample, by the cost table.
        delta (`float`, *optional*): Allowed probability that the true drop is above `max_accuracy_drop`.
        bound (`str`, *optional*, defaults to `"drop"`): With `delta`, what is bounded: the drop of the accuracy, or
            the `"harm"`, the share of samples where only the full model is right, which repaired mistakes do not
            offset.
        labels (`bool` or `"expected"`, *optional*, defaults to `True`): `False` takes the full model's answers for the
            truth, `"expected"` its probabilities: the drop is then what they expect, a point estimate (no `delta`).
        cost_table (`CostTable`, *optional*): Measured times to save instead of MACs.
        batch_size (`int`, *optional*, defaults to 1): At which the cost table is read.
        temperature (`bool`, *optional*, defaults to `True`): Whether each exit's is fitted.
        choose_exits (`bool`, *optional*, defaults to `True`): Whether exits may be skipped.
        tested (`ExitTable`, *optional*): Other samples to test on, so that the whole `table` is searched on.

    Raises:
        ValueError: A target is missing, out of range or out of reach, costs do not fit, or the samples are too few.

    Example:

        >>> from lgvit_hf.evaluation.costs import Costs
        >>> logits = torch.tensor([[[4.0, 0.0], [0.0, 0.1]], [[5.0, 0.0], [5.0, 0.0]]]).repeat(1, 50, 1)
        >>> labels, costs = torch.zeros(100, dtype=torch.long), Costs([4e6, 4e6], [1e5, 1e5])
        >>> report = calibrate(ExitTable(logits, labels, [1, 2], costs), max_accuracy_drop=0.01, temperature=False)
        >>> report.accuracy, report.exits, report.mean_macs / 1e6
        (1.0, (0,), 6.232)
    """
    budgets = {"max_macs": max_macs, "max_latency": max_latency, "min_speedup": min_speedup}
    given = check_request(policy, max_accuracy_drop, delta, bound, cost_table is not None, **budgets)
    if labels not in (True, False, "expected"):
        raise ValueError(f"labels={labels!r} must be True, False or 'expected'")
    if labels == "expected" and delta is not None:
        raise ValueError("labels='expected' gives point estimates, which guarantee nothing; leave out delta")
    _check_table(table)
    if tested is not None:
        _check_table(tested)
        _check_pair(table, tested)
    if labels is not True:
        table, tested = table.without_labels(), None if tested is None else tested.without_labels()
    searched, tested = split_table(table) if tested is None else (_shuffled(table), _shuffled(tested))
    if labels == "expected":
        searched, tested = searched.expected(), tested.expected()
    check_rows(len(tested), max_accuracy_drop, delta, bound)
    costs = table.known_costs
    if cost_table is not None:
        cost_table.check(len(table.depths))
        costs = cost_table.at(batch_size)
    seen = searched.policy_logits()
    temperatures = tuple(fit_temperature(exit, searched.labels) if temperature else 1.0 for exit in seen)
    # safest first the full model, which is within any drop, unless an ensemble's bias changes its answers
    proven = None if delta is None else max_accuracy_drop
    found = [{"name": "never"}, *candidates(searched, costs, policy, temperatures, choose_exits, proven)]
    results = [_result(tested, settings, cost_table, batch_size) for settings in found]
    allowed = _within_drop(results, max_accuracy_drop, delta, bound, is_sure=not _changes_final(table))
    if not allowed:
        raise ValueError(
            "exit_ensemble: its bias changes the full model's own answers, and not even these are within "
            f"max_accuracy_drop={max_accuracy_drop:g}; take a bias of 0, or leave it out with exit_ensemble=None"
        )
    chosen = _choose(results, allowed, max_accuracy_drop, given)
    full_accuracy = tested.right[-1].cpu().double().mean().item()
    return Calibration(
        exits=tuple(chosen.evaluated),
        temperatures=temperatures,
        full_accuracy=full_accuracy,
        mean_depth=float(np.array(table.depths)[chosen.exit_index.cpu().numpy()].mean()),
        full_macs=table.known_costs.backbone,
        **chosen.figures(full_accuracy),
        full_latency=results[0].latency,
        bound="none" if delta is None else bound,
        samples_tested=len(tested),
        delta=delta,
        guaranteed_drop=None if delta is None else max_accuracy_drop,
        max_accuracy_drop=max_accuracy_drop,
        ladder=tuple(
            {**result.figures(full_accuracy), "baseline": result.baseline(tested)}
            for result in allowed
            if result.like(chosen)
        ),
        frontier=tuple(result.figures(full_accuracy) for result in results),
        ensemble=table.ensemble,
        baseline=chosen.baseline(tested),
        weights=table.weights,
        calibration_errors=tuple(_errors(tested, chosen, temperatures)),
    )


def _errors(table: ExitTable, chosen: _Result, temperatures: tuple[float, ...]) -> Iterator[dict[str, float | None]]:
    seen = table.policy_logits(chosen.evaluated)
    for index, (logits, temperature) in enumerate(zip(seen, temperatures, strict=True)):
        scaled, here = logits / temperature, chosen.exit_index == index
        yield {
            "before": expected_calibration_error(logits, table.labels),
            "after": expected_calibration_error(scaled, table.labels),
            "exited": expected_calibration_error(scaled[here], table.labels[here]) if here.any() else None,
        }


def check_rows(num_tested: int, max_accuracy_drop: float | None, delta: float | None, bound: str) -> None:
    """Raise `ValueError` where so few samples to test on can prove nothing; it says how many can."""
    if (
        delta is not None
        and max_accuracy_drop is not None
        and num_tested < (needed := samples_needed(bound, max_accuracy_drop, delta))
    ):
        raise ValueError(
            f"{num_tested} samples to test on are too few to prove a {bound} of {max_accuracy_drop:g} at "
            f"delta={delta:g}: at least {needed} are needed (a table of {2 * needed}, half of which is searched on), "
            "more if any answer is lost"
        )


def _check_table(table: ExitTable) -> None:
    table.check_finite()
    strange = table.labels[(table.labels < 0) | (table.labels >= table.logits.shape[-1])]
    if len(strange):
        raise ValueError(f"labels: {int(strange[0])} is none of the {table.logits.shape[-1]} classes, from 0")
    if len(table) < 2:
        raise ValueError(f"{len(table)} samples are too few: at least 2 are needed, one to search and one to test on")
    if len(table.depths) < 2:
        raise ValueError("the table has the final classifier only: there is no exit to calibrate")
    segments, heads = len(table.known_costs.backbone_costs), len(table.known_costs.heads)
    if {segments, heads} != {len(table.depths)}:
        raise ValueError(f"costs are of {segments} segments and {heads} heads, the table of {len(table.depths)}")


def _check_pair(table: ExitTable, tested: ExitTable) -> None:
    for name in ("depths", "weights", "ensemble"):
        one, other = getattr(table, name), getattr(tested, name)
        if one != other:
            raise ValueError(f"tested is a table of another model: {name} {other}, not {one}")
    if table.logits.shape[-1] != tested.logits.shape[-1]:
        raise ValueError(f"tested is a table of {tested.logits.shape[-1]} classes, not {table.logits.shape[-1]}")
    common = len(set(_sample_digests(table)) & set(_sample_digests(tested)))
    if 2 * common > len(tested):
        raise ValueError(f"{common} of the {len(tested)} samples to test on are in the table that is searched on too")


def check_request(
    policy: str,
    max_accuracy_drop: float | None,
    delta: float | None,
    bound: str,
    has_cost_table: bool,
    **budgets: float | None,
) -> dict[str, float]:
    """Raise `ValueError` where what is asked of `calibrate` makes no sense; the budgets that are given."""
    if policy not in (*SEARCHES, "auto"):
        raise ValueError(f"calibrate knows the policies auto, {', '.join(sorted(SEARCHES))}, not {policy!r}")
    if bound not in ("drop", "harm"):
        raise ValueError(f"bound={bound!r} must be 'drop' or 'harm'")
    if budgets.get("max_latency") is not None and not has_cost_table:
        raise ValueError("max_latency needs measured times: give cost_table (`lgvit benchmark --cost-table FILE`)")
    given = {name: value for name, value in budgets.items() if value is not None}
    if max_accuracy_drop is None and not given:
        raise ValueError("nothing is asked: give max_accuracy_drop, min_speedup, max_macs or max_latency")
    if delta is not None and not (max_accuracy_drop is not None and 0 < max_accuracy_drop < 1 and 0 < delta < 1):
        raise ValueError("delta, between 0 and 1, needs a max_accuracy_drop between 0 and 1")
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop:g} is a share of all samples, from 0 to 1")
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name}={value:g} must be above 0")
    return given


@dataclass(frozen=True)
class _Result:
    """What a candidate does on samples it was not searched on; its latency where there is a cost table."""

    settings: Settings
    exit_index: Tensor
    evaluated: list[int]
    drops: Tensor
    macs: float
    latency: float | None

    @property
    def drop(self) -> float:
        return self.drops.cpu().double().mean().item()

    @property
    def cost(self) -> float:
        return self.macs if self.latency is None else self.latency

    def like(self, other: _Result) -> bool:
        """Whether both are of one family and evaluate the same exits, so that thresholds alone tell them apart."""
        return (self.settings["name"], self.evaluated) == (other.settings["name"], other.evaluated)

    def figures(self, full_accuracy: float) -> dict[str, Any]:
        what = {"policy": self.settings, "accuracy": full_accuracy - self.drop}
        return {**what, "mean_macs": self.macs, "mean_latency": self.latency}

    def baseline(self, table: ExitTable) -> dict[str, Any]:
        """What `DriftMonitor` compares samples in use with: counts of the samples that this is the result of."""
        answers = table.policy_logits(self.evaluated)[self.exit_index, torch.arange(len(table))]
        labels = answers.argmax(-1)
        counts = {"exits": (self.exit_index, len(table.depths)), "labels": (labels, table.logits.shape[-1])}
        return {
            "samples": len(table),
            **{name: torch.bincount(values, minlength=size).tolist() for name, (values, size) in counts.items()},
            "harm": int((labels != table.logits[-1].argmax(-1)).sum()),
        }


def _result(table: ExitTable, settings: Settings, cost_table: CostTable | None, batch_size: int) -> _Result:
    exits, evaluated = replayed_exits(table, settings)
    macs, drops = consequences(table, exits, evaluated, table.known_costs)
    exiting_at = shares(exits, len(table.depths))
    latency = None if cost_table is None else cost_table.mean_latency(exiting_at, evaluated, batch_size)
    return _Result(settings, exits, evaluated, drops, macs, latency)


def _within_drop(
    results: list[_Result], max_accuracy_drop: float | None, delta: float | None, bound: str, is_sure: bool
) -> list[_Result]:
    """Candidates that lose little enough; the first is the full model, the others go from safest to fastest.

    `is_sure` says whether the first loses nothing; otherwise it is tested as the others are.
    """
    if delta is not None and max_accuracy_drop is not None:
        tested = results[is_sure:]
        p_values = [_p_value(result.drops.numpy(), max_accuracy_drop, delta, bound) for result in tested]
        return results[: is_sure + passed_in_order(p_values, delta)]
    return [result for result in results if max_accuracy_drop is None or result.drop <= max_accuracy_drop]


def _changes_final(table: ExitTable) -> bool:
    """Whether samples that no other exit was evaluated for may be answered otherwise than by the final classifier."""
    return table.ensemble is not None and any(table.ensemble["bias"]) and table.ensemble["weights"][-1] > 0


def _choose(
    results: list[_Result], allowed: list[_Result], max_accuracy_drop: float | None, budgets: dict[str, float]
) -> _Result:
    """The candidate to return, of those that are allowed."""

    def fits(result: _Result) -> bool:
        spent = {"max_macs": result.macs, "max_latency": result.cost, "min_speedup": result.cost / results[0].cost}
        return all(spent[name] <= (1 / value if name == "min_speedup" else value) for name, value in budgets.items())

    within = list(filter(fits, allowed))
    if not within:
        least = min(allowed, key=lambda result: result.cost)
        asked = ", ".join(f"{name}={value:g}" for name, value in budgets.items())
        drop = "" if max_accuracy_drop is None else f" within max_accuracy_drop={max_accuracy_drop:g}"
        latency = "" if least.latency is None else f", {least.latency:g} ms"
        raise ValueError(
            f"{asked} is out of reach{drop}: the least is {least.macs:g} MACs{latency}, "
            f"a speed-up of {results[0].cost / least.cost:.3g}"
        )
    if max_accuracy_drop is None:
        return min(within, key=lambda result: (result.drop, result.cost))
    return min(within, key=lambda result: result.cost)


def _p_value(drops: np.ndarray, limit: float, delta: float, bound: str) -> float:
    return harm_p_value(drops == 1, limit) if bound == "harm" else float(drop_p_value(drops, limit, delta))
