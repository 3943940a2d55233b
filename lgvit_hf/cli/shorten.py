"""`lgvit shorten`: blocks of a trained model replaced by one linear map."""

from __future__ import annotations

import argparse

from ..data.settings import whole
from .options import SEED

HELP = "replace blocks of a trained ViT, DeiT or Swin by one linear map, fitted on a few images"
EXAMPLE = "lgvit shorten google/vit-base-patch16-224 photos/ shorter_vit --blocks 3 4"
REQUIRED = ("blocks",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit shorten`."""
    add = parser.add_argument
    add("checkpoint", help="folder or Hub id of a plain ViT, DeiT or Swin, or of a highway of these")
    add("images", help="digits, a folder of images, parquet files or a Hub id; labels are not needed")
    add("output", help="folder for the model")
    add("--blocks", type=whole(), nargs=2, metavar=("FIRST", "LAST"), help="to replace, from 1")
    add("--fit-images", type=whole(), default=500, help="to fit the map on (default: 500)")
    add("--limit", type=whole(), default=2500, help="use at most that many random images in all (default: 2500)")
    add("--ignore-labels", action="store_true", help="do as if the images had none")
    add("--seed", type=SEED, default=0, help="default: 0")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..training.shorten import shorten

    names = ("blocks", "fit_images", "limit", "ignore_labels", "seed")
    settings = {name: getattr(options, name) for name in names}
    shorten(options.checkpoint, options.images, options.output, say=print, **settings)
    print(f"\nsaved in {options.output}: load it with AutoModelForImageClassification")
