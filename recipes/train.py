"""Train one stage of one recipe: the same as `lgvit train`, as a script for launchers.

    python recipes/train.py --config recipes/configs/vit_small/backbone.yaml
    python recipes/train.py --config recipes/configs/vit_small/stage1.yaml
    python recipes/train.py --config recipes/configs/vit_small/stage2.yaml --resume auto

    torchrun --nproc-per-node 3 recipes/train.py --config recipes/configs/vit_base/stage1.yaml --data photos/

Every key of a YAML file can be given, or overridden, by hand (`--epochs 3`); `--dry-run` says what would be trained.
"""

import sys

from lgvit_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
