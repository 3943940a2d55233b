"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from ..data.settings import real, whole

SEED = whole(0, 2**32 - 1)


def add_processor(command: argparse.ArgumentParser) -> None:
    """An image processor of one's own."""
    text = "folder or Hub id with the image processor, instead of checkpoint's"
    command.add_argument("--processor", metavar="FOLDER|NAME", help=text)


def add_runtime(command: argparse.ArgumentParser) -> None:
    """What runs an exported folder."""
    names = ("onnxruntime", "openvino")
    command.add_argument("--runtime", choices=names, help="of an exported folder (default: onnxruntime)")


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
    names = ("threshold", "patience", "exit_index", "entropy_threshold")
    given = {name: one_or_all(value) for name, value in vars(options).items() if name in names and value is not None}
    if given and not options.policy:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with --policy")
    return {"name": options.policy, **given} if options.policy else None


def one_or_all(values: Any) -> Any:
    """The value of a list of one; what is no list, or holds several, as it is."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values


def add_data(command: argparse.ArgumentParser, which: str, why: str, checkpoint: str = "a highway") -> None:
    """A checkpoint, a dataset, which of its splits, and how it is split."""
    share = "of the training samples, where the data have no such split (default: as in training, or 0.15)"
    command.add_argument("checkpoint", help=f"folder or Hub id of {checkpoint}")
    command.add_argument("--data", help="digits, a folder of images, parquet files or a Hub id")
    splits = ("train", "validation", "test")
    command.add_argument("--split", choices=splits, default=which, help=f"{why} (default: {which})")
    command.add_argument("--validation-share", type=real(), help=share)
    command.add_argument("--seed", type=SEED, help="of the split (default: as in training, or 0)")
