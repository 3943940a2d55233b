"""A threshold chosen on a table: the fastest one that keeps the accuracy asked for."""

from __future__ import annotations

from ..policies import probabilities
from .table import ExitTable


def choose_threshold(table: ExitTable, max_accuracy_drop: float = 0.01) -> float:
    """The lowest confidence threshold, one for all exits, whose accuracy on the table stays near the full model's.

    A point estimate on the table's rows, without a guarantee: report on other rows.

    Args:
        table (`ExitTable`): Of rows that were not trained on.
        max_accuracy_drop (`float`, *optional*, defaults to 0.01): Below the final classifier's accuracy, as a share.

    Returns:
        A threshold from 0 to 1; at 1 no row leaves early.

    Example:

        >>> import torch
        >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[5.0, 0.0], [5.0, 0.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 0]), depths=[1, 2])
        >>> 0.52 < choose_threshold(table) < 0.96
        True
    """
    wanted = table.accuracies()[-1] - max_accuracy_drop
    scores = probabilities(table.logits[:-1].flatten(0, 1)).amax(-1).unique()
    # between the scores, thinned to at most a few hundred candidates, so that no score lies on a threshold
    candidates = ((scores[1:] + scores[:-1]) / 2)[:: max(1, len(scores) // 500)].tolist()
    best = 1.0
    for threshold in [0.0, *candidates]:
        answers = table.replay({"name": "confidence", "threshold": threshold})
        accuracy = (answers.logits.argmax(-1) == table.labels).float().mean().item()
        if accuracy >= wanted:
            best = threshold
            break
    return best
