"""The report of `lgvit grow` on its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.calibration_report import Calibration
from ..evaluation.exit_table import ExitTable
from ..evaluation.report import evaluate_as_text
from ..evaluation.report_text import policy_in_words
from ..exit_settings import Exit
from ..policies import build_policy


def candidate_rows(
    exits: Sequence[Exit], table: ExitTable, is_labelled: bool, kept: Sequence[int]
) -> list[dict[str, Any]]:
    """Every candidate exit: its answers on the held-out images, its cost, and whether it is kept."""
    costs = table.known_costs
    return [
        {
            "exit_layer": exit.after,
            "head": exit.head,
            "accuracy" if is_labelled else "agreement": share,
            "cost": costs.of_exit(index, ()),
            "head_cost": costs.heads[index],
            "kept": index in kept,
        }
        for index, (exit, share) in enumerate(zip(exits, table.accuracies(), strict=False))
    ]


def choice_of(found: Calibration, num_exits: int) -> dict[str, Any]:
    """What was calibrated on all of `num_exits` candidates, as policies of a model with the exits that stay.

    Costs are shares of the plain model's, as those of the table were.
    """

    def restricted(policy: dict[str, Any]) -> dict[str, Any]:
        return build_policy(policy, num_exits).with_exits(found.exits, num_exits).to_dict()

    return {
        "exits": list(found.exits),
        "policy": restricted(found.policy),
        "accuracy": found.accuracy,
        "drop": found.full_accuracy - found.accuracy,
        "cost": found.mean_macs,
        "samples_tested": found.samples_tested,
        "ladder": [
            {"policy": restricted(rung["policy"]), "accuracy": rung["accuracy"], "cost": rung["mean_macs"]}
            for rung in found.ladder
        ],
    }


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
        f"{policy_in_words(choice['policy'])}",
        f"{choice['cost']:.1%} of the full model's cost for an accuracy drop of {100 * choice['drop']:.2f} points, "
        f"{of_what}, on the {choice['samples_tested']} images held out that the search has not seen",
        "",
        f"on the {images['held_out']} images held out"
        + ("" if images["labels"] else ', where "right" means: as the full model answers'),
        "",
        evaluate_as_text(report),
    ]
    return "\n".join(lines)
