"""`lgvit card`: the model card of a checkpoint, and its picture of accuracy against cost, from reports."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import add_files

HELP = "write the model card, from the config and the reports of other commands"
EXAMPLE = (
    "lgvit evaluate runs/stage2 --data photos/ --output runs/stage2/evaluation.json\n"
    "  lgvit card runs/stage2 --name me/my-highway --license apache-2.0 --base-model google/vit-base-patch16-224"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit card`."""
    add = parser.add_argument
    add("checkpoint", help="folder or Hub id of a highway or an AViT")
    reports = "of other commands (default: evaluation.json, calibration.json, benchmark.json of the folder)"
    add("--evaluation", nargs="+", default=[], metavar="JSON", help=reports)
    add("--output", help="Markdown file (default: README.md of the folder)")
    add("--name", help="Hub id under which the model will be found (default: the folder's name)")
    add("--datasets", nargs="+", default=[], metavar="HUB_ID", help="what it was trained on")
    add("--base-model", help="Hub id of the model that it was made from")
    add("--license", help="such as apache-2.0")
    add("--tags", nargs="+", default=[], help="beside the usual ones")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..evaluation.plots import plot_pareto
    from ..hub.card import card, is_own, pages_beside, read_report, reports_beside, write_card
    from .drawing import UNIT

    folder = Path(options.checkpoint)
    if options.output is None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder to write a README into; give --output FILE.md")
    readme = Path(options.output or folder / "README.md")
    if readme.is_dir():
        raise ValueError(f"{readme} is a folder; give the card's file name")
    if is_own(readme):
        raise ValueError(f"{readme} was not made by `lgvit card` and stays; give --output FILE.md, or move it away")
    files = options.evaluation or reports_beside(options.checkpoint)
    contents = list(map(read_report, files))
    drawn = _drawing(contents) if importlib.util.find_spec("matplotlib") is not None else None
    # checked before anything is written
    figure = "pareto.png" if readme.name == "README.md" else f"{readme.stem}.png"
    settings = {name: getattr(options, name) for name in ("name", "datasets", "base_model", "license", "tags")}
    settings |= {"figure": None if drawn is None else figure, "pages": pages_beside(readme.parent)}
    made = card(options.checkpoint, files, **settings)
    if drawn is not None:
        with add_files(readme.parent) as new:
            plot_pareto(new / figure, *drawn, unit=UNIT)
    write_card(made, readme)
    print(f"written to {readme}, from {', '.join(map(str, files)) or 'the config alone'}")


def _drawing(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Curves and points of the evaluation, or of the calibration where there is none."""
    from ..policies import build_policy
    from .drawing import evaluated, point, points

    by_kind = {report["what"]: report for report in reversed(reports)}
    if "lgvit evaluate" in by_kind:
        report = by_kind["lgvit evaluate"]
        exits, overall = report["exits"], report["overall"]
        if overall["accuracy_full_model"] is None:
            return None
        policy = build_policy(dict(report["policy"]), len(exits) - 1)
        # an exit alone does not pay for shallower heads
        heads = [0.0 if policy.skips(index) else exit["head_macs"] for index, exit in enumerate(exits)]
        alone = [point(exit["macs"] - sum(heads[:k]), exit["accuracy_all"]) for k, exit in enumerate(exits)]
        return {"all images at one exit": alone}, evaluated("early exit", overall)
    if "lgvit calibrate" in by_kind:
        report = by_kind["lgvit calibrate"]
        full = point(report["full_macs"], report["full_accuracy"])
        return (
            {"thresholds and exits searched": points(report["frontier"])},
            {"chosen": points([report])[0], "full model": full},
        )
    return None
