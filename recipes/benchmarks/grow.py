"""What an epoch of `lgvit grow` costs beside the least it could: its heads' own forward and backward.

    python recipes/benchmarks/grow.py --models deit-tiny swin-tiny --heads concat conv1_1 mlp

The epoch reads cached states from memory-mapped files, makes them single precision, runs the exits and the
distillation loss and goes back. The least it could cost is the same exits' forward and backward on tokens that are in
memory already, with gradients that are there already. Both take turns; ratios are taken within a round and their
median is printed. The optimizer is in neither. Random weights and images, every exit of `lgvit grow` by default.
"""

import argparse
import statistics
import tempfile

import torch
from engine import MODELS

from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.files import write_json
from lgvit_hf.training.cached_states import fill_cache, open_cache, run_epoch, shuffled_slices, token_shapes
from lgvit_hf.training.distill_exits import early_positions


def measure(name, head_name, batch_size, num_images, repeats, folder):
    torch.manual_seed(0)
    config = MODELS[name]().config.to_dict()
    model_class, config_class = type(MODELS[name]()), type(MODELS[name]().config)
    for key in ("model_type", "exit_policy"):
        config.pop(key)
    positions = early_positions(config_class(**config).num_blocks)
    config.update(exit_positions=positions, exit_types=head_name, exit_loss_weights="depth")
    model = model_class(config_class(**config)).eval()
    size = model.config.image_size
    images = [{"pixel_values": torch.randn(model.config.num_channels, size, size)} for _ in range(num_images)]
    shapes = token_shapes(model, images[0]["pixel_values"][None])
    cache = open_cache(folder, shapes, num_images, model.config.num_labels, {})
    fill_cache(cache, model, images, range(num_images))
    model.train()
    states, teacher = [cache.states(index) for index in range(len(shapes))], cache.logits
    in_memory = [
        (head, shape, [part.float() for part in kept.split(batch_size)])
        for head, kept, shape in zip(model.exits, states, shapes, strict=True)
    ]
    gradient = torch.randn(batch_size, model.config.num_labels) / batch_size

    def epoch():
        for head, kept, shape in zip(model.exits, states, shapes, strict=True):
            run_epoch(head, kept, teacher, shape, batch_size, 1.0, head.zero_grad)

    def least():
        for head, shape, batches in in_memory:
            # as many batches as the epoch has
            for number, _ in enumerate(shuffled_slices(num_images, batch_size)):
                shape.answer(head, batches[number]).backward(gradient)
                head.zero_grad()

    times = time_interleaved({"epoch": epoch, "least": least}, repeats=repeats)
    ratio = statistics.median(a / b for a, b in zip(times["epoch"], times["least"], strict=True))
    seconds = {f"{key}_ms": 1e3 * statistics.median(values) for key, values in times.items()}
    about = {"model": name, "head": head_name, "exits": len(shapes), "images": num_images, "batch_size": batch_size}
    return {**about, "threads": torch.get_num_threads(), "ratio": ratio, **seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deit-tiny", "swin-tiny"])
    parser.add_argument("--heads", nargs="+", default=["concat", "conv1_1", "mlp"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for head_name in options.heads:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(name, head_name, options.batch_size, options.images, options.repeats, folder)
            rows.append(row)
            print(
                f"{row['model']:10} {row['head']:10} {row['exits']} exits, {row['images']} images, batch "
                f"{row['batch_size']}, {row['threads']} threads: epoch {row['epoch_ms']:.0f} ms, least "
                f"{row['least_ms']:.0f} ms, ratio {row['ratio']:.3f}",
                flush=True,
            )
    if options.output:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
