"""`lgvit grow`: exits on a frozen checkpoint."""

from __future__ import annotations

import argparse

from ..data.settings import real, whole

HELP = "give a plain fine-tuned ViT, DeiT or Swin early exits, from images alone"
EXAMPLE = "lgvit grow google/vit-base-patch16-224 photos/ early_vit --max-accuracy-drop 0.01"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit grow`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a plain ViT, DeiT or Swin")
    parser.add_argument("images", help="digits, a folder of images, parquet files or a Hub id; labels are not needed")
    parser.add_argument("output", help="folder for the model; type the same command again to go on after a stop")
    parser.add_argument(
        "--limit", type=whole(), default=5000, help="use at most that many random images (default: 5000)"
    )
    parser.add_argument("--ignore-labels", action="store_true", help="do as if the images had none")
    parser.add_argument("--exit-positions", type=whole(), nargs="+", metavar="BLOCK", help="candidates, from 1")
    parser.add_argument("--exit-types", nargs="+", metavar="HEAD", help="one head for all, or one each (conv1_1)")
    parser.add_argument("--max-accuracy-drop", type=real(), default=0.01, help="on images held out (default: 0.01)")
    parser.add_argument("--validation-share", type=real(), default=0.2, help="of the images, held out (default: 0.2)")
    parser.add_argument("--epochs", type=whole(), help="of the exits' training (default: from 5 to 20, by the images)")
    parser.add_argument("--cost", choices=("time", "macs"), default="time", help="what to save (default: time)")
    parser.add_argument("--cache-limit", type=real(), default=20, help="GB of disk for cached states (default: 20)")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="default: 0")


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    from ..training.distill_exits import HeadTraining, grow

    names = ("exit_positions", "max_accuracy_drop", "limit", "ignore_labels", "validation_share", "cost")
    types = options.exit_types or ["conv1_1"]
    grow(
        options.checkpoint,
        options.images,
        options.output,
        **{name: getattr(options, name) for name in names},
        exit_types=types[0] if len(types) == 1 else types,
        training=HeadTraining(epochs=options.epochs),
        cache_limit=options.cache_limit,
        seed=options.seed,
        say=print,
    )
    print(f"\nsaved in {options.output}: load it with AutoModelForImageClassification")
