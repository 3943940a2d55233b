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
        given = torch.tensor(numbers, requires_grad=True)
        log_weights, bias = given[:num_exits], given[num_exits:]
        loss = _PENALTY * bias.square().sum()
        loss.backward()
        total = loss.item()
        for rows in torch.arange(len(table)).split(_SAMPLES_AT_ONCE):
            part = _summed_loss(table.select(rows), log_weights.softmax(0), bias) / (num_exits * len(table))
            part.backward()
            total += part.item()
        assert given.grad is not None
        return total, given.grad.numpy()

    bounds = [(-_LARGEST, _LARGEST)] * num_exits + [(None, None)] * num_labels
    how = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8}
    found = torch.from_numpy(minimize(loss_and_gradient, start, jac=True, bounds=bounds, options=how).x)
    return {"weights": found[:num_exits].softmax(0).tolist(), "bias": found[num_exits:].tolist()}


def _summed_loss(table: ExitTable, weights: Tensor, bias: Tensor) -> Tensor:
    """Cross-entropy of the ensemble at each exit, summed over exits and samples."""
    labels = table.labels.double() if table.labels.is_floating_point() else table.labels
    loss = total = share = torch.zeros((), dtype=torch.float64)
    for logits, weight in zip(table.logits.cpu(), weights, strict=True):
        total, share = total + weight * torch.log_softmax(logits.double(), -1), share + weight
        loss = loss + torch.nn.functional.cross_entropy(total / share + bias, labels.cpu(), reduction="sum")
    return loss
