"""`lgvit predict`: folders, files or a dataset of images answered into one file, by one process or several."""

from __future__ import annotations

import argparse
from typing import Any

from ..data.settings import whole
from .options import add_policy, add_runtime, policy_of

HELP = "answer images into one file; goes on where it stopped"
EXAMPLE = (
    "lgvit predict runs/stage2 photos/ --output predictions.parquet --workers 4\n"
    "  lgvit predict onnx/ 'photos/**/*.jpg' --output predictions.csv --top-k 5\n"
    "  lgvit predict runs/stage2 digits --split test --output predictions.jsonl --policy confidence --threshold 0.8\n"
    "stopped or killed, the same command goes on where it was; an image that cannot be read has an error in its row,\n"
    "and the exit code is then 1"
)
REQUIRED = ("output",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit predict`."""
    add = parser.add_argument
    add("checkpoint", help="folder or Hub id of a highway, or folder of an exported one")
    paths = "files, folders, patterns; or one dataset: digits, parquet files or a Hub id"
    add("paths", nargs="+", metavar="images", help=paths)
    add("--output", help=".parquet, .csv or .jsonl file")
    add("--split", help="of a dataset that has several")
    add_policy(parser)
    add_runtime(parser)
    add("--batch-size", type=whole(), default=64, help="default: 64")
    add("--workers", type=whole(), default=1, help="processes; one thread each if several (default: 1)")
    engines = "ray: workers are actors of Ray Data, on the cluster of RAY_ADDRESS or on this machine (default: local)"
    add("--engine", choices=("local", "ray"), default="local", help=engines)
    add("--top-k", type=whole(), help="also write that many most probable labels")
    add("--probabilities", action="store_true", help="also write the probabilities of all labels")


def run(options: argparse.Namespace) -> int:
    """Run the command and print the result."""
    from ..serving.batch_predict import run_predict

    names = ("split", "batch_size", "workers", "top_k", "probabilities", "runtime", "engine")
    report = run_predict(
        options.checkpoint,
        options.paths,
        options.output,
        policy=policy_of(options),
        **{name: getattr(options, name) for name in names},
    )
    print(predict_as_text(report, options.output))
    return 1 if report["errors"] else 0


def predict_as_text(report: dict[str, Any], output: str) -> str:
    """What `run_predict` found, for a terminal."""
    now, before = report["answered_now"], report["images"] - report["answered_now"]
    text = f"{report['images']:,} images in {output}: "
    if report["errors"] < report["images"]:
        text += f"mean depth {report['mean_depth']:.2f} of {report['num_blocks']} blocks, "
    text += f"{report['images_per_second']:,.0f} images/s" if now else "all were answered before"
    if now and before:
        text += f" ({before:,} were answered before)"
    if report["errors"]:
        text += f"\n{report['errors']:,} could not be read: the column 'error' says why (exit code 1)"
    return text
