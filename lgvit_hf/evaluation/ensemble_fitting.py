"""Fitting the running ensemble to a table of exits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from .exit_table import ExitTable

# of the squared bias: what a class gets that the table lacks stays finite
_PENALTY = 1e-4
# of the logarithms of the weights, whose ratios then stay within float32
_LARGEST = 40.0
_SAMPLES_AT_ONCE = 4096


def fit_ensemble(table: ExitTable) -> dict[str, Any]:
    """Fit `exit_ensemble`: one weight per exit and one bias per class, for the least mean loss of all exits.

    The loss is `mean over exits m of cross_entropy(sum(w_j log p_j, j <= m) / sum(w_j, j <= m) + bias)`, all exits
    evaluated, plus `1e-4 * |bias|^2`; by L-BFGS-B on the logarithms of the weights, from the squares of the depths.

    Args:
        table (`ExitTable`): Of samples that were not trained on; an ensemble that it has is not used.

    Returns:
        `{"weights": [...], "bias": [...]}` for `config.exit_ensemble`: the weights add up to 1, the bias to 0.

    Raises:
        ValueError: There are no samples, or NaN among the logits.

    Example:

        >>> logits = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0))
        >>> ensemble = fit_ensemble(ExitTable(logits, torch.arange(40) % 5, [1, 2, 3]))
        >>> len(ensemble["weights"]), len(ensemble["bias"]), round(sum(ensemble["weights"]), 6)
        (3, 5, 1.0)
    """
    if not len(table):
        raise ValueError("there are no samples to fit an ensemble to: the table is empty")
    table.check_finite()
    num_exits, _, num_labels = table.logits.shape
    start = np.append(2 * np.log(np.array(table.depths, dtype=np.float64)), np.zeros(num_labels))

    def loss_and_gradient(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        total, gradient = 0.0, np.zeros_like(numbers)
        for first in range(0, len(table), _SAMPLES_AT_ONCE):
            part = table.select(torch.arange(first, min(first + _SAMPLES_AT_ONCE, len(table))))
            given = torch.tensor(numbers, requires_grad=True)
            loss = _loss(part, given[:num_exits].softmax(0), given[num_exits:]) * (len(part) / len(table))
            total += loss.item()
            gradient += torch.autograd.grad(loss, given)[0].numpy()
        return total, gradient

    bounds: list[tuple[float | None, float | None]] = [(-_LARGEST, _LARGEST)] * num_exits
    bounds += [(None, None)] * num_labels
    options: Any = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8}
    found = minimize(loss_and_gradient, start, method="L-BFGS-B", jac=True, bounds=bounds, options=options).x
    weights = torch.from_numpy(found[:num_exits]).softmax(0)
    return {"weights": weights.tolist(), "bias": found[num_exits:].tolist()}


def _loss(table: ExitTable, weights: Tensor, bias: Tensor) -> Tensor:
    """What is minimised: the mean cross-entropy of the ensemble at all exits, with the penalty."""
    labels = (table.labels.double() if table.labels.is_floating_point() else table.labels).cpu()
    loss = total = share = torch.zeros((), dtype=torch.float64)
    for logits, weight in zip(table.logits.cpu(), weights, strict=True):
        total, share = total + weight * torch.log_softmax(logits.double(), -1), share + weight
        loss = loss + torch.nn.functional.cross_entropy(total / share + bias, labels)
    return loss / len(weights) + _PENALTY * bias.square().sum()
