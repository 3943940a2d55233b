"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from ..data.settings import real, whole


def add_processor(command: argparse.ArgumentParser) -> None:
    """An image processor of one's own."""
    command.add_argument(
        "--processor", metavar="FOLDER|NAME", help="folder or Hub id with the image processor, instead of checkpoint's"
    )


def add_policy(command: argparse.ArgumentParser) -> None:
    """An exit policy instead of the saved one; `policy_of` reads it."""
    command.add_argument("--policy", help="exit policy instead of the saved one")
    command.add_argument("--threshold", type=real(), nargs="+", help="of the policy: one number, or one per exit")
    command.add_argument("--patience", type=whole(), help="of the patience policies")
    command.add_argument("--exit-index", type=whole(0), help="of fixed, from 0")
    command.add_argument("--entropy-threshold", type=real(), help="of confidence_entropy")


def policy_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """Settings of the exit policy that was typed, `None` for the saved one.

    Raises:
        ValueError: A setting without `--policy`.

    Example:

        >>> parser = argparse.ArgumentParser()
        >>> add_policy(parser)
        >>> policy_of(parser.parse_args(["--policy", "confidence", "--threshold", "0.8"]))
        {'name': 'confidence', 'threshold': 0.8}
    """
    given = {name: getattr(options, name) for name in ("threshold", "patience", "exit_index", "entropy_threshold")}
    given = {name: value for name, value in given.items() if value is not None}
    if "threshold" in given and len(given["threshold"]) == 1:
        given["threshold"] = given["threshold"][0]
    if given and not options.policy:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with --policy")
    return {"name": options.policy, **given} if options.policy else None


def add_data(command: argparse.ArgumentParser, which: str, why: str) -> None:
    """A dataset, which of its splits, and how it is split."""
    command.add_argument("--data", help="digits, a folder of images, parquet files or a Hub id")
    command.add_argument(
        "--split", choices=("train", "validation", "test"), default=which, help=f"{why} (default: {which})"
    )
    command.add_argument(
        "--validation-share",
        type=real(),
        default=0.15,
        help="of the training rows, where the data have no such split; as in training (default: 0.15)",
    )
    command.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="by which rows are split; as in training (default: 0)"
    )
