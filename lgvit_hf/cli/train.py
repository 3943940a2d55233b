"""`lgvit train`: one stage of one method."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..training.recipe import REQUIRED, Recipe, add_options
from ..training.recipe import run as train

__all__ = ["EXAMPLE", "HELP", "REQUIRED", "add_options", "run"]

HELP = "train the backbone, its classifier (head), stage 1 (backbone and exits) or stage 2 (exits, distilled)"
EXAMPLE = (
    "lgvit train --config recipes/configs/vit_small/stage1.yaml --data photos/ --epochs 3\n"
    "  lgvit train --backbone vit --data digits --stage backbone --epochs 12 --output runs/backbone\n"
    "  lgvit train --model runs/backbone --data digits --stage 1 --epochs 8 --output runs/stage1 --resume auto\n"
    "  lgvit train --model google/vit-base-patch16-224-in21k --data photos/ --stage head --output runs/head\n"
    "any other option is one of HighwayTrainingArguments, such as --bf16 true or --gradient-checkpointing true;\n"
    "--debug at the end shows where an error comes from"
)


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    import torch.distributed

    train(Recipe(**{each.name: getattr(options, each.name) for each in fields(Recipe) if each.name in options}))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # a group that is still held when the interpreter ends now and then aborts it
        torch.distributed.destroy_process_group()
