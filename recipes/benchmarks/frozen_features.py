"""A frozen backbone run once: pooled vectors of every block, from which `frozen_exits.py` trains heads in seconds.

    python recipes/benchmarks/frozen_features.py CHECKPOINT --data DATA --cache FOLDER --train 16384 --flip
    python recipes/benchmarks/frozen_features.py CHECKPOINT --data DATA --cache OTHER --head conv1_1 --positions 4 8

Parts of 2,048 samples, each a cache of its own: a stopped run goes on, and a later one may take more samples. Heads
are trained on samples of the data's training split, with `--flip` on their mirror images too; policies are fitted on
the validation split that `load_images` holds out, and all is reported on the test split. For a head that reads all
tokens (`--head`), these are kept, 28 kB an exit and sample of a ViT-S at 84 px.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import layer_norm

from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, open_processor
from lgvit_hf.hub.loading import BY_BACKBONE, load_highway, read_config, with_exits
from lgvit_hf.segments import State
from lgvit_hf.training.cached_states import StateCache, TokenShape, fill_cache, open_cache, token_shapes

PART = 2048


@dataclass(frozen=True)
class Pooled(TokenShape):
    """Prefix tokens, mean patch, mean and maximum of the normalised patches: what heads without a map read."""

    @property
    def of_sample(self):
        return self.prefix + 3, self.width

    def pack(self, head, tokens):
        normed = layer_norm(tokens.patches, (self.width,), eps=1e-6)
        pooled = torch.stack([tokens.patches.mean(1), normed.mean(1), normed.amax(1)], 1)
        return torch.cat([tokens.prefix, pooled], 1).clamp(-65504, 65504).half()


class Mirrored:
    """The same samples, left and right swapped."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        item = self.samples[index]
        return {**item, "pixel_values": torch.as_tensor(item["pixel_values"]).flip(-1)}


def open_frozen(checkpoint, heads, positions=None):
    """A plain checkpoint, or what `lgvit train --stage backbone` saves, with new exits; by default all it may have."""
    config = read_config(checkpoint)
    depth = sum(config.depths) if "swin" in config.model_type else config.num_hidden_layers
    exits = {"exit_positions": positions or list(range(1, depth)), "exit_types": heads, "exit_policy": "never"}
    if config.model_type in BY_BACKBONE:
        return BY_BACKBONE[config.model_type].from_backbone(checkpoint, **exits).float().eval()
    return with_exits(checkpoint, load_highway(checkpoint), exits).float().eval()


@torch.no_grad()
def pooled_shapes(model, pixels):
    """A `Pooled` for each exit, seen on images `[B, C, H, W]`."""
    state, shapes = State({"pixel_values": pixels}), []
    for segment in model.segments()[:-1]:
        state = segment.advance(state)
        tokens = model.tokens(state)
        shapes.append(Pooled(tokens.prefix.shape[1], tokens.grid, tokens.patches.shape[2]))
    return shapes


def samples_of(checkpoint, data):
    """What is prepared for the checkpoint: `train` in a random order, `held_out` and `test`."""
    splits, processor = load_images(data), open_processor(checkpoint)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0)).tolist()
    parts = {"train": splits.train, "held_out": splits.validation, "test": splits.test}
    orders = {"train": order, "held_out": range(len(splits.validation)), "test": range(len(splits.test))}
    return {name: (ProcessedImages(part, processor), orders[name]) for name, part in parts.items()}


def cache_features(checkpoint, data, folder, num_train, flip, head=None, positions=None):
    """Fill what is not there yet, and say where each part's caches are."""
    model, samples = open_frozen(checkpoint, head or "concat", positions), samples_of(checkpoint, data)
    shapes_of = token_shapes if head else pooled_shapes
    shapes = shapes_of(model, torch.as_tensor(samples["test"][0][0]["pixel_values"])[None])
    wanted = [(name, items, order) for name, (items, order) in samples.items() if name != "train"]
    items, order = samples["train"]
    wanted.append(("train", items, order[:num_train]))
    if flip:
        wanted.append(("mirrored", Mirrored(items), order[:num_train]))
    for name, items, order in wanted:
        for start in range(0, len(order), PART):
            indices = order[start : start + PART]
            place = Path(folder) / name / f"{start:06d}"
            if not (place / "full").exists():
                made_from = {"checkpoint": str(checkpoint), "data": str(data)}
                cache = open_cache(place, shapes, len(indices), model.config.num_labels, made_from)
                fill_cache(cache, model, items, indices)
                (place / "full").touch()
                print(f"{place}: {len(indices)} samples", flush=True)


def open_caches(folder, parts, num_classes, kind=Pooled):
    """The caches of full parts; their exits hold states of a kind, `TokenShape` for all tokens."""
    caches = []
    for name in parts:
        for place in sorted((Path(folder) / name).iterdir()):
            if (place / "full").exists():
                kept = json.loads((place / "made_from.json").read_text())
                caches.append(
                    StateCache(place, [kind(**shape) for shape in kept["shapes"]], kept["rows"], num_classes)
                )
    return caches


def read_states(caches, exit_index):
    """The states of one exit in all caches, `[N, V, D]` float16."""
    return torch.cat([cache.states(exit_index) for cache in caches])


def read_answers(caches):
    """Logits `[N, C]` of the full model, and labels `[N]`."""
    labels = torch.cat([torch.from_numpy(cache.open("labels")) for cache in caches])
    return torch.cat([cache.logits for cache in caches]), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a plain checkpoint, or of `lgvit train --stage backbone`")
    parser.add_argument("--data", required=True, help="as of `lgvit train`")
    parser.add_argument("--cache", required=True, help="folder for the features")
    parser.add_argument("--train", type=int, default=16384, help="samples to train heads on")
    parser.add_argument("--flip", action="store_true", help="their mirror images too")
    parser.add_argument("--head", help="one that reads all tokens, such as conv1_1: keep these")
    parser.add_argument("--positions", type=int, nargs="+", help="blocks before its exits, from 1 (default: all)")
    options = parser.parse_args()
    cache_features(
        *(options.checkpoint, options.data, options.cache, options.train, options.flip),
        *(options.head, options.positions),
    )


if __name__ == "__main__":
    main()
