"""Fitting the harm gate to a table of exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gate import EARLIER_FEATURES, FEATURES_OF_NUMBERS, NUM_EARLIER, earlier_features, own_numbers
from ..policies import number_at, probabilities
from .exit_table import ExitTable

# of the squared weights, for each sample: scikit-learn's `C = 1 / (0.02 * N)`
_PENALTY = 0.02
_MAX_STEPS = 100


def fit_gate(
    table: ExitTable,
    *,
    exits: Sequence[int] | None = None,
    temperatures: Sequence[float] | float = 1.0,
    threshold: float | Sequence[float] = 0.95,
) -> dict[str, Any]:
    """Fit the policy `gate`: at each exit, how likely it is that exiting there loses no answer.

    An answer is lost where this exit is wrong and the final classifier right. Each of two halves of the samples (the
    even and the odd ones) gives one regression; the policy takes the mean of both. `calibrate(policy="gate")` also
    searches for exits and thresholds; here the threshold is what is given.

    Args:
        table (`ExitTable`):
            Of samples that were not trained on. Without labels (`table.without_labels()`) the final answer is the
            truth, and any other answer is lost.
        exits (`Sequence[int]`, *optional*): Which exits are evaluated, by index from 0; all by default.
        temperatures (`Sequence[float]` or `float`, *optional*, defaults to 1.0): One per exit, or one for all.
        threshold (`float` or `Sequence[float]`, *optional*, defaults to 0.95): Least probability that nothing is lost.

    Returns:
        `{"name": "gate", "threshold", "temperature", "exits", "models", "num_labels"}`, for `set_exit_policy`.

    Raises:
        ValueError: There is no exit, an exit that does not exist, or fewer than four samples, or NaN among the logits.

    Example:

        >>> logits = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0))
        >>> gate = fit_gate(ExitTable(logits, torch.arange(40) % 5, [1, 2, 3]))
        >>> gate["exits"], len(gate["models"][1]["mean"])
        ([0, 1], 8)
    """
    early = len(table.depths) - 1
    exits = list(range(early)) if exits is None else list(exits)
    if not exits or not all(0 <= index < early for index in exits):
        raise ValueError(f"exits={exits}: at least one of the table's {early} early exits, from 0, is needed")
    if len(table) < 4:
        raise ValueError(f"{len(table)} samples are too few to fit a gate: at least 4 are needed")
    table.check_finite()
    features = gate_features(table, exits, temperatures)
    kept = _kept(table, exits)
    models = [_fitted(each, kept[index]) for each, index in zip(features, exits, strict=True)]
    return {
        "name": "gate",
        "threshold": threshold if isinstance(threshold, float) else list(threshold),
        "temperature": temperatures if isinstance(temperatures, float) else list(temperatures),
        "exits": exits,
        "models": models,
        "num_labels": table.logits.shape[-1],
    }


def gate_features(table: ExitTable, exits: Sequence[int], temperatures: Sequence[float] | float) -> list[np.ndarray]:
    """What the regression of each of `exits` reads, `[N, F]` float64, by the policy's own arithmetic."""
    before: list[Tensor] = []
    found, seen = [], table.policy_logits(exits)
    for index in exits:
        logits = seen[index].float() / number_at(temperatures, index, 1.0)
        probs = probabilities(logits)
        features = [torch.cat(own_numbers(logits, probs), 1).double() @ torch.from_numpy(FEATURES_OF_NUMBERS).double()]
        if before:
            earlier = torch.stack(before[::-1][:NUM_EARLIER], 1)
            unused = torch.zeros(earlier.shape[1], len(EARLIER_FEATURES))
            features.append(earlier_features(probs, earlier, unused).double())
        before.append(probs)
        found.append(torch.cat(features, 1).numpy())
    return found


def cross_fitted_scores(table: ExitTable, gate: dict[str, Any]) -> np.ndarray:
    """The gate's score of each sample it was fitted on, `[exits, N]` float32, by the other half's regression."""
    scores = []
    for features, model in zip(gate_features(table, gate["exits"], gate["temperature"]), gate["models"], strict=True):
        standard = (features - model["mean"]) / model["scale"]
        both = standard @ np.array(model["weights"]).T + np.array(model["bias"])
        scores.append(np.where(np.arange(len(table)) % 2 == 0, both[:, 1], both[:, 0]))
    return np.asarray(1 / (1 + np.exp(-np.array(scores))), dtype=np.float32)


def _kept(table: ExitTable, exits: Sequence[int]) -> np.ndarray:
    """Where nothing is lost at each exit if `exits` are evaluated, or how likely that is, `[E, N]`."""
    answered = table.answered_right(exits).double()
    kept: np.ndarray = (1 - (1 - answered) * table.right[-1].double()).numpy()
    return kept


def _fitted(features: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    mean, scale = features.mean(0), features.std(0)
    scale[scale < 1e-12] = 1.0
    standard = (features - mean) / scale
    halves = [logistic_regression(standard[half::2], kept[half::2]) for half in (0, 1)]
    return {
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "weights": [weights.tolist() for weights, _ in halves],
        "bias": [bias for _, bias in halves],
    }


def logistic_regression(features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights and bias of least `mean log-loss + 0.01 * |weights|^2`, by Newton's method with halved steps.

    The optimum of scikit-learn's `LogisticRegression(C=1 / (0.02 * N))`; the bias is not penalised. Where the target
    is 1 (or 0) of all samples no finite bias is best: it is that of one sample more which is not.

    Args:
        features (`np.ndarray`): `[N, F]` float64, standardised.
        target (`np.ndarray`): `[N]`, from 0 to 1.
    """
    count = len(target)
    if target.min() == target.max() and target[0] in (0, 1):
        return np.zeros(features.shape[1]), float(np.log(count + 1) * (1 if target[0] else -1))
    design = np.concatenate([features, np.ones((count, 1))], 1)
    penalty = np.append(np.full(features.shape[1], _PENALTY), 0.0)

    def loss(weights: np.ndarray) -> float:
        logits = design @ weights
        return float((np.logaddexp(0, logits) - target * logits).mean() + (penalty * weights**2).sum() / 2)

    weights = np.zeros(design.shape[1])
    for _ in range(_MAX_STEPS):
        probability = 1 / (1 + np.exp(-(design @ weights)))
        gradient = design.T @ (probability - target) / count + penalty * weights
        curvature = (design.T * (probability * (1 - probability))) @ design / count + np.diag(penalty)
        # the bias alone may have no curvature left in float64
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        size, before = 1.0, loss(weights)
        while loss(weights - size * step) > before and size > 1e-8:
            size /= 2
        weights = weights - size * step
        if np.abs(gradient).max() < 1e-10:
            break
    return weights[:-1], float(weights[-1])
