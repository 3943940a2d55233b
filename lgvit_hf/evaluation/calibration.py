"""A threshold chosen on a table."""

from __future__ import annotations

from ..policies import probabilities
from .table import ExitTable


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
