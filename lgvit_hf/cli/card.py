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
    """What may be typed behind `lgvit card`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a highway or an AViT")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="JSON",
        help="reports of evaluate, calibrate, benchmark (default: evaluation.json, calibration.json and "
        "benchmark.json of the folder)",
    )
    parser.add_argument("--output", help="Markdown file (default: README.md of the folder)")
    parser.add_argument("--name", help="Hub id under which the model will be found (default: the folder's name)")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="HUB_ID", help="what it was trained on")
    parser.add_argument("--base-model", help="Hub id of the model that it was made from")
    parser.add_argument("--license", help="such as apache-2.0")
    parser.add_argument("--tags", nargs="+", default=[], help="beside the usual ones")


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    names = ("output", "name", "datasets", "base_model", "license", "tags")
    file, reports = run_card(
        options.checkpoint, options.evaluation, **{name: getattr(options, name) for name in names}
    )
    print(f"written to {file}" + (f", from {', '.join(reports)}" if reports else ", from the config alone"))


def run_card(
    checkpoint: str, reports: Sequence[str] = (), output: str | None = None, **settings: Any
) -> tuple[Path, list[str]]:
    """Write the card of a checkpoint, by default as the README of its folder.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway or an `AViT`.
        reports (`Sequence[str]`, *optional*):
            JSON files of `lgvit evaluate`, `lgvit calibrate` and `lgvit benchmark`; by default `evaluation.json`,
            `calibration.json` and `benchmark.json` of the folder, whichever are there.
        output (`str`, *optional*): The Markdown file; the picture goes beside it, where a report has one to draw.
        settings: `name`, `datasets`, `base_model`, `license`, `tags`, as of `card`.

    Returns:
        The file written, and the names of the reports that are in it.

    Raises:
        ValueError: See `card`; a README there that was not made here; a Hub id and no `output`.
    """
    from ..evaluation.plots import plot_pareto
    from ..hub.card import card, is_own, read_report, reports_beside, write_card
    from .drawing import UNIT

    folder = Path(checkpoint)
    if output is None and not folder.is_dir():
        raise ValueError(f"{checkpoint} is no folder to write a README into; give --output FILE.md")
    readme = folder / "README.md" if output is None else Path(output)
    if readme.is_dir():
        raise ValueError(f"{readme} is a folder; give the card's file name")
    if is_own(readme):
        raise ValueError(f"{readme} was not made by `lgvit card` and stays; give --output FILE.md, or move it away")
    files = list(reports) or reports_beside(checkpoint)
    contents = list(map(read_report, files))
    drawn = _drawing(contents) if importlib.util.find_spec("matplotlib") is not None else None
    # checked before anything is written
    figure = "pareto.png" if readme.name == "README.md" else f"{readme.stem}.png"
    made = card(checkpoint, files, figure=None if drawn is None else figure, **settings)
    if drawn is not None:
        with add_files(readme.parent) as new:
            plot_pareto(new / figure, *drawn, unit=UNIT)
    write_card(made, readme)
    return readme, list(map(str, files))


def _drawing(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Curves and points of the evaluation, or of the calibration where there is none."""
    from ..policies import build_policy
    from .drawing import points

    by_kind = {report["what"]: report for report in reversed(reports)}
    if "lgvit evaluate" in by_kind:
        report = by_kind["lgvit evaluate"]
        exits, overall = report["exits"], report["overall"]
        if overall["accuracy_full_model"] is None:
            return None
        policy = build_policy(dict(report["policy"]), len(exits) - 1)
        # an exit alone does not pay for the heads above it
        asked = [0.0 if policy.skips(index) else exit["head_macs"] for index, exit in enumerate(exits)]
        alone = [
            {"mean_macs": exit["macs"] - sum(asked[:index]), "accuracy": exit["accuracy_all"]}
            for index, exit in enumerate(exits)
        ]
        return (
            {"all images at one exit": points(alone)},
            {
                "leaving early": points([overall])[0],
                "full model": {"cost": overall["backbone_macs"] / 1e6, "accuracy": overall["accuracy_full_model"]},
            },
        )
    if "lgvit calibrate" in by_kind:
        report = by_kind["lgvit calibrate"]
        return (
            {"thresholds and exits searched": points(report["frontier"])},
            {
                "chosen": points([report])[0],
                "full model": {"cost": report["full_macs"] / 1e6, "accuracy": report["full_accuracy"]},
            },
        )
    return None
