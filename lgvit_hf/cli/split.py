"""`lgvit split`: a checkpoint in parts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..data.settings import whole
from .options import add_policy, add_processor, policy_of

HELP = "cut a highway at exits into parts for machines in a row"
EXAMPLE = "lgvit split runs/stage2 parts/ --at 4 8 --format onnx"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit split`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a highway")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--at", type=whole(), nargs="+", metavar="BLOCK", help="blocks run before each cut, at exits")
    parser.add_argument(
        "--format", choices=("safetensors", "onnx"), default="safetensors", help="onnx needs no PyTorch (safetensors)"
    )
    add_processor(parser)
    add_policy(parser)
    parser.set_defaults(required=("at",))


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    settings = (options.at, options.format, policy_of(options), options.processor)
    print(run_split(options.checkpoint, options.output, *settings))


def run_split(
    checkpoint: str,
    output: str,
    positions: Sequence[int],
    format: str,
    policy: dict[str, Any] | None = None,
    processor: str | None = None,
) -> str:
    """Write a checkpoint as parts, and say what they are.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway.
        output (`str`): Folder to make.
        positions (`Sequence[int]`), format (`str`): See `split`.
        policy (`dict`, *optional*): Instead of the saved one.
        processor (`str`, *optional*): See `processor_for`.
    """
    from ..hub.loading import load_highway
    from ..serving.split import split
    from .export import processor_for

    opened, model = processor_for(checkpoint, processor), load_highway(checkpoint)
    if policy is not None:
        model.set_exit_policy(policy)
    parts = split(model, positions, output, format, processor=opened)
    lines = []
    for part in parts:
        depths = ", ".join(str(part.depths[exit["index"]]) for exit in part.exits)
        sent = " and ".join(f"{name} {array['shape']}" for name, array in part.gives.items())
        lines.append(f"{output}/part{part.index}: answers after {depths} blocks" + (f", gives {sent}" if sent else ""))
    lines.append(
        f"run as a chain on batches of {', '.join(map(str, parts[0].checks['batch_sizes']))} with every exit taken: "
        f"answers as the model does, logits within {parts[0].checks['largest_difference']:.1e}"
    )
    return "\n".join(lines)
