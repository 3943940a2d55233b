"""`lgvit split`: a checkpoint in parts."""

from __future__ import annotations

import argparse

from ..data.settings import whole
from .options import add_policy, add_processor

HELP = "cut a highway at exits into parts for machines in a row"
EXAMPLE = "lgvit split runs/stage2 parts/ --at 4 8 --format onnx"
REQUIRED = ("at",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit split`."""
    add = parser.add_argument
    add("checkpoint", help="folder or Hub id of a highway")
    add("output", help="folder to write")
    add("--at", type=whole(), nargs="+", metavar="BLOCK", help="blocks run before each cut, at exits")
    add("--format", choices=("safetensors", "onnx"), default="safetensors", help="onnx needs no PyTorch (safetensors)")
    add_processor(parser)
    add_policy(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..serving.split import split
    from .inputs import open_checkpoint

    output, (model, processor) = options.output, open_checkpoint(options)
    parts = split(model, options.at, output, options.format, processor=processor)
    for part in parts:
        depths = ", ".join(str(part.depths[exit["index"]]) for exit in part.exits)
        sent = " and ".join(f"{name} {array['shape']}" for name, array in part.gives.items())
        print(f"{output}/part{part.index}: answers after {depths} blocks" + (f", gives {sent}" if sent else ""))
    print(
        f"run as a chain on batches of {', '.join(map(str, parts[0].checks['batch_sizes']))} with every exit taken: "
        f"answers as the model does, logits within {parts[0].checks['largest_difference']:.1e}"
    )
