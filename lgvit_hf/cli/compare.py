"""`lgvit compare`: a sweep beside published figures, at the same layer speed-up."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json

HELP = "a sweep beside published figures, at the same layer speed-up"
EXAMPLE = "lgvit compare sweep/ --paper lgvit"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit compare`."""
    parser.add_argument("sweep", help="folder of `lgvit sweep`")
    parser.add_argument("--paper", default="lgvit", help="whose figures (default: lgvit)")
    parser.add_argument("--output", help="JSON file for the figures")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    rows = compare(options.sweep, options.paper)
    print(compare_as_text(rows))
    if options.output:
        write_json(options.output, rows)


@dataclass(frozen=True)
class Published:
    """Figures of a paper or of who measured its checkpoints.

    Args:
        what (`str`): Model, data set and how samples exit.
        source (`str`): Where they stand.
        full_accuracy (`float`): Of the model when no sample exits early.
        points (`tuple`): Accuracy and layer speed-up, pairs.
    """

    what: str
    source: str
    full_accuracy: float
    points: tuple[tuple[float, float], ...]


LGVIT = "LGViT, https://arxiv.org/abs/2308.00255, as quoted by its readers"
EEVIT = "EEVIT, https://github.com/ionymikler/early_exit_vit"
PAPERS = {
    "lgvit": (
        Published("ViT-B/16, CIFAR-100", LGVIT, 0.908, ((0.885, 1.87),)),
        Published(
            "ViT-B/16, CIFAR-100, LGViT's checkpoint at confidence 0.8, 0.9 and 0.99",
            EEVIT,
            0.908,
            ((0.8731, 2.08), (0.8941, 1.86), (0.9036, 1.48)),
        ),
    ),
}


def compare(folder: str, paper: str) -> list[dict[str, Any]]:
    """Published accuracies, and those of a sweep at the same layer speed-up.

    Args:
        folder (`str`): Of `lgvit sweep`.
        paper (`str`): A key of `PAPERS`.

    Returns:
        A dict per published figure: `what`, `source`, `layer_speed_up`, the `published` accuracy and `ours`, the drop
        of either against its full model, and the `difference` of the drops, above 0 where ours loses more. `ours` is
        `None` where the sweep does not reach that speed-up.

    Raises:
        ValueError: An unknown paper.
        OSError: There is no sweep.
    """
    from ..evaluation.exit_table import ExitTable

    if paper not in PAPERS:
        raise ValueError(f"paper: {paper!r} must be one of {', '.join(PAPERS)}")
    file = Path(folder) / "sweep.jsonl"
    if not file.is_file():
        raise OSError(f"{folder}: no sweep.jsonl there; `lgvit sweep ... --output {folder}` writes it")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    curve = [(row["layer_speed_up"], row["accuracy"]) for row in rows]
    full = ExitTable.load(Path(folder) / "table.safetensors").accuracies()[-1]
    found: list[dict[str, Any]] = []
    for published in PAPERS[paper]:
        for accuracy, speed_up in published.points:
            ours, their_drop = accuracy_at(curve, speed_up), published.full_accuracy - accuracy
            drop = None if ours is None else full - ours
            row = {"what": published.what, "source": published.source, "layer_speed_up": speed_up}
            row |= {"published": accuracy, "published_drop": their_drop, "ours": ours, "drop": drop}
            found.append({**row, "difference": None if drop is None else drop - their_drop})
    return found


def accuracy_at(curve: list[tuple[float, float]], speed_up: float) -> float | None:
    """The accuracy at a speed-up, on the straight line between a sweep's two nearest points; `None` beyond its ends.

    Args:
        curve (`list`): Pairs of speed-up and accuracy; of several with one speed-up the best counts.
        speed_up (`float`): Where to look.

    Example:

        >>> accuracy_at([(1.0, 0.9), (2.0, 0.8)], 1.5)
        0.85...
    """
    import numpy as np

    best: dict[float, float] = {}
    for speed, accuracy in curve:
        best[speed] = max(accuracy, best.get(speed, 0.0))
    speeds = sorted(best)
    if not speeds or not speeds[0] <= speed_up <= speeds[-1]:
        return None
    return float(np.interp(speed_up, speeds, [best[speed] for speed in speeds]))


def compare_as_text(rows: list[dict[str, Any]]) -> str:
    """A line per published figure."""
    lines = ["layers   published    drop      ours    drop   difference"]
    for row in rows:
        ours = (
            "the sweep does not reach that speed-up"
            if row["ours"] is None
            else f"{row['ours']:7.2%}  {100 * row['drop']:5.2f}   {100 * row['difference']:+9.2f}"
        )
        lines.append(
            f"{row['layer_speed_up']:5.2f}x     {row['published']:7.2%}   {100 * row['published_drop']:5.2f}   {ours}"
        )
    lines += ["", "drops are points below either's own full model; published:"]
    lines += [f"  {what} ({source})" for what, source in dict.fromkeys((row["what"], row["source"]) for row in rows)]
    lines.append("other data and backbones do not compare; layers are not wall-clock (`lgvit benchmark`)")
    return "\n".join(lines)
