"""`lgvit grow`: exits on a frozen checkpoint."""

from __future__ import annotations

import argparse

from ..data.settings import real, whole
from .options import SEED, one_or_all

HELP = "give a plain fine-tuned backbone early exits, from images alone"
EXAMPLE = (
    "lgvit grow google/vit-base-patch16-224 photos/ early_vit --max-accuracy-drop 0.01\n"
    "  lgvit grow facebook/dinov2-small flowers/ early_dinov2 --new-classifier    (flowers/ has labels)"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit grow`."""
    add = parser.add_argument
    add("checkpoint", help="folder or Hub id of a plain checkpoint of a backbone")
    add("images", help="digits, a folder of images, parquet files or a Hub id; labels are not needed")
    add("output", help="folder for the model; type the same command again to go on after a stop")
    add("--limit", type=whole(), default=5000, help="use at most that many random images (default: 5000)")
    add("--new-classifier", action="store_true", help="first fit a classifier to the labels, on the frozen backbone")
    add("--ignore-labels", action="store_true", help="do as if the images had none")
    add("--exit-positions", type=whole(), nargs="+", metavar="BLOCK", help="candidates, from 1")
    add("--exit-types", nargs="+", default=["conv1_1"], metavar="HEAD", help="one for all, or one each (conv1_1)")
    add("--max-accuracy-drop", type=real(), default=0.01, help="on images held out (default: 0.01)")
    add("--validation-share", type=real(), help="of the images, held out (default: as in training, or 0.2)")
    add("--epochs", type=whole(), help="of the exits' training (default: from 5 to 20, by the images)")
    add("--cost", choices=("time", "macs"), default="time", help="what to save (default: time)")
    add("--cache-limit", type=real(), default=20, help="GB of disk for cached states (default: 20)")
    add("--seed", type=SEED, default=0, help="default: 0")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..training.distill_exits import HeadTraining, grow

    names = ("exit_positions", "max_accuracy_drop", "limit", "ignore_labels", "validation_share", "cost", "seed")
    grow(
        options.checkpoint,
        options.images,
        options.output,
        new_classifier=options.new_classifier,
        exit_types=one_or_all(options.exit_types),
        training=HeadTraining(epochs=options.epochs),
        cache_limit=options.cache_limit,
        say=print,
        **{name: getattr(options, name) for name in names},
    )
    print(f"\nsaved in {options.output}: load it with AutoModelForImageClassification")
