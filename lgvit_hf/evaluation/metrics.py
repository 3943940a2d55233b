"""What a policy does to a table: accuracy, where rows leave, depth and cost. Plain numbers in plain dicts."""

from __future__ import annotations

from typing import Any

from ..engine import Answers
from ..policies import ExitPolicy
from .costs import Costs
from .table import ExitTable


def layer_speed_up(answers: Answers, num_blocks: int) -> float:
    """Blocks of the full model over blocks really run, `L * N / sum(depth)`; heads and overheads are not counted."""
    return num_blocks * len(answers.exit_layer) / answers.exit_layer.sum().item()


def summarise(
    table: ExitTable, answers: Answers, costs: Costs, head_names: list[str], policy: ExitPolicy | None = None
) -> dict[str, Any]:
    """Per exit and overall figures of a policy.

    Args:
        table (`ExitTable`): Logits and labels.
        answers (`Answers`): Of a policy, on the same rows, from `table.replay` or from the model.
        costs (`Costs`): In MACs.
        head_names (`list[str]`): Of each classifier, the last included.
        policy (`ExitPolicy`, *optional*): Which heads it skips; all are counted by default.

    Returns:
        `{"exits": [...], "overall": {...}}`; accuracies are shares in [0, 1], `None` where no row leaves.

    Example:

        >>> import torch
        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 0.1]], [[0.0, 9.0], [0.0, 9.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 1]), depths=[1, 2])
        >>> answers = table.replay({"name": "confidence", "threshold": 0.9})
        >>> summary = summarise(table, answers, Costs([4.0, 4.0], [1.0, 1.0]), ["linear", "final"])
        >>> summary["overall"]["accuracy"], summary["overall"]["mean_macs"]
        (1.0, 7.5)
    """
    right = answers.logits.argmax(-1) == table.labels
    exits, total = [], len(table)
    asked = [index for index in range(len(table.depths)) if policy is None or not policy.skips(index)]
    for index, (depth, accuracy, head) in enumerate(zip(table.depths, table.accuracies(), head_names, strict=True)):
        here = answers.exit_index == index
        rows = int(here.sum())
        exits.append(
            {
                "position": depth,
                "head": head,
                "rows": rows,
                "share": rows / total,
                "accuracy_leaving": right[here].float().mean().item() if rows else None,
                "accuracy_all": accuracy,
                "macs": costs.of_exit(index, asked),
                "head_macs": costs.heads[index],
            }
        )
    mean_macs = sum(exit["share"] * exit["macs"] for exit in exits)
    overall = {
        "rows": total,
        "accuracy": right.float().mean().item(),
        "accuracy_full_model": table.accuracies()[-1],
        "mean_depth": answers.exit_layer.float().mean().item(),
        "layer_speed_up": layer_speed_up(answers, table.depths[-1]),
        "mean_macs": mean_macs,
        "backbone_macs": costs.backbone,
        "macs_speed_up": costs.backbone / mean_macs,
    }
    return {"exits": exits, "overall": overall}
