"""The report of `lgvit grow` on its candidates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..evaluation.choice import Choice
from ..evaluation.costs import Costs
from ..evaluation.report import evaluate_as_text
from ..modeling_highway import HighwayMixin


def candidate_rows(
    model: HighwayMixin, logits: Tensor, labels: Tensor | None, costs: Costs, choice: Choice
) -> list[dict[str, Any]]:
    """Every candidate exit: its answers on the held-out images, its cost, and whether it is kept."""
    answers = logits.argmax(-1)
    right = (answers == (answers[-1] if labels is None else labels)).float().mean(-1)
    return [
        {
            "exit_layer": exit.after,
            "head": exit.head,
            "agreement" if labels is None else "accuracy": share,
            "cost": costs.of_exit(index, ()),
            "head_cost": costs.heads[index],
            "kept": index in choice.exits,
        }
        for index, (exit, share) in enumerate(zip(model.config.exits, right.tolist(), strict=False))
    ]


def grow_as_text(report: dict[str, Any]) -> str:
    """The report of `grow` for a terminal."""
    images, choice = report["images"], report["choice"]
    measure = "accuracy" if images["labels"] else "agreement"
    lines = [f"candidate  head            {measure:>9}   cost until there   of the head   (full model: 100 %)"]
    for row in report["candidates"]:
        lines.append(
            f"{row['exit_layer']:9}  {row['head']:14}  {row[measure]:9.1%}   {row['cost']:16.1%}   "
            f"{row['head_cost']:11.1%}   {'kept' if row['kept'] else ''}"
        )
    of_what = "counted with the labels" if images["labels"] else "expected by the full model's own probabilities"
    lines += [
        "",
        f"threshold {choice['threshold']:.3f}: {choice['cost']:.1%} of the full model's cost for an accuracy drop of "
        f"{100 * choice['drop']:.2f} points, {of_what}",
        "",
        f"on the {images['held_out']} images held out"
        + ("" if images["labels"] else ', where "right" means: as the full model answers'),
        "",
        evaluate_as_text(report),
    ]
    return "\n".join(lines)
