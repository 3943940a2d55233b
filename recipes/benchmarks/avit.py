"""What removing halted tokens gains by the clock: DeiT-tiny at A-ViT's published operating point, against itself.

    OMP_NUM_THREADS=1 python recipes/benchmarks/avit.py --batch-sizes 1 8 32 --output avit.json
    OMP_NUM_THREADS=1 python recipes/benchmarks/avit.py --trained AVIT --plain VIT_OR_DEIT --data DATA

A trained model is timed on images of the test split. The random one halts by its own code too: no block changes
channel 0 of the residual stream, so that a token's score is the same behind each, and its patch says how deep it
goes. Depths are drawn around a mean of each image, as wide as the curve of A-ViT's target (`--spread 1`) or wider;
that mean is drawn around one at which the mean image takes A-ViT-T's 0.8 of DeiT-tiny's 1.25 GMACs. The class token
runs all blocks, so that no image stops early. The plain model of transformers and ours take turns, and ratios are
taken within a turn. `share` is how much of the MACs' ratio the clock shows. Peaks of memory are each of a process of
its own, weights and pictures included.
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from lgvit_hf import AViT, token_macs
from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, stack
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.files import write_json

DEIT_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000}
PUBLISHED_SHARE = 0.8 / 1.25
NUM_IMAGES = 32
NUM_TRAINED_IMAGES = 256


def channel_for(depth):
    """What channel 0 must hold for a token to halt after block `depth` at a gate of scale 1 and centre 0."""
    return torch.logit(1 / depth.double(), eps=1e-4).float()


@torch.no_grad()
def deit_tiny():
    """A random DeiT-tiny whose blocks leave channel 0 to the embeddings, where a patch's first pixel stands."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**DEIT_TINY)).eval()
    into_stream = ("attention.output.dense", "output.dense", "o_proj", "mlp.fc2")
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(into_stream):
            parameter[0] = 0
    embeddings = model.vit.embeddings
    embeddings.position_embeddings[..., 0] = 0
    embeddings.cls_token[..., 0] = channel_for(torch.tensor(model.config.num_hidden_layers))
    projection = embeddings.patch_embeddings.projection
    projection.weight[0], projection.bias[0], projection.weight[0, 0, 0, 0] = 0, 0, 1
    return model


def draw_depths(config, mean, spread, num_patches=196):
    """`[NUM_IMAGES, N]` depths: of each image's patches around its own mean; the class token first."""
    generator = torch.Generator().manual_seed(0)
    of_image = mean + torch.randn(NUM_IMAGES, 1, generator=generator)
    depths = (of_image + spread * torch.randn(NUM_IMAGES, num_patches, generator=generator)).round()
    depths = depths.clamp(1, config.num_hidden_layers)
    return torch.cat([torch.full((NUM_IMAGES, 1), config.num_hidden_layers), depths.long()], dim=1)


def depths_at(config, share, spread):
    """Depths at which the mean image takes `share` of all MACs."""
    full = token_macs(config, torch.full((1, 197), config.num_hidden_layers)).item()
    low, high = 0.0, 2.0 * config.num_hidden_layers
    for _ in range(40):
        middle = (low + high) / 2
        cheap = token_macs(config, draw_depths(config, middle, spread)).mean() < share * full
        low, high = (middle, high) if cheap else (low, middle)
    return draw_depths(config, low, spread)


def pictures(config, depths):
    """Random pixels in which every patch's first says how deep it goes."""
    size, patch = config.image_size, config.patch_size
    pixels = torch.randn(len(depths), 3, size, size, generator=torch.Generator().manual_seed(1))
    pixels[:, 0, ::patch, ::patch] = channel_for(depths[:, 1:]).unflatten(1, (size // patch, -1))
    return pixels


def random_models(share, spread):
    """The plain model, ours, and pictures whose tokens halt where they were drawn to."""
    plain = deit_tiny()
    adaptive = AViT.from_backbone(plain, gate_scale=1.0, gate_center=0.0)
    return plain, adaptive, pictures(plain.config, depths_at(plain.config, share, spread))


def trained_models(plain, adaptive, data):
    """Transformers' own model, ours, and images of the test split."""
    plain = AutoModelForImageClassification.from_pretrained(plain).eval()
    adaptive = AViT.from_pretrained(adaptive).eval()
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size"):
        of_plain, of_ours = getattr(plain.config, field, None), getattr(adaptive.config, field)
        if of_plain != of_ours:
            raise ValueError(f"{field}: {of_plain} of --plain, {of_ours} of --trained; both must be of the same sizes")
    dataset = ProcessedImages(load_images(data).test, AutoImageProcessor.from_pretrained(adaptive.name_or_path))
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:NUM_TRAINED_IMAGES]
    pixels = stack([dataset[row] for row in rows.tolist()])["pixel_values"]
    return plain, adaptive, pixels


def prepare(options):
    if options.trained:
        return trained_models(options.plain, options.trained, options.data)
    return random_models(options.macs_share, options.spread)


def batches(pixels, size):
    """A few batches, since what a single image takes differs."""
    return list(pixels[: max(size, len(pixels) // 2)].split(size))


@torch.no_grad()
def measure(size, models, options):
    plain, adaptive, pixels = models
    rows = batches(pixels, size)
    images = sum(map(len, rows))
    depths = adaptive(torch.cat(rows)).token_depth
    all_blocks = torch.full_like(depths[:1], plain.config.num_hidden_layers)
    ideal = (token_macs(plain.config, all_blocks) / token_macs(plain.config, depths).mean()).item()

    def run(model, **settings):
        for batch in rows:
            model(batch, **settings)

    runs = {
        "plain": partial(run, plain),
        "removed": partial(run, adaptive),
        "masked": partial(run, adaptive, remove_tokens=False),
    }
    times = time_interleaved(runs, repeats=options.repeats)
    gain = statistics.median(a / b for a, b in zip(times["plain"], times["removed"], strict=True))
    return {
        "batch_size": size,
        "threads": torch.get_num_threads(),
        "spread": None if options.trained else options.spread,
        "mean_depth": depths.double().mean().item(),
        "macs_speed_up": ideal,
        "speed_up": gain,
        "share": gain / ideal,
        "images_per_second": {name: images / statistics.median(values) for name, values in times.items()},
        "peak_mb": {name: peak_memory(name, size) for name in runs},
    }


def peak_memory(name, size):
    """Peak resident memory in MB of a process that answers one batch."""
    command = [sys.executable, *sys.argv, "--peak-of", name, "--batch-sizes", str(size)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@torch.no_grad()
def answer_once(name, size, models):
    plain, adaptive, pixels = models
    settings = {"plain": {}, "removed": {}, "masked": {"remove_tokens": False}}[name]
    (plain if name == "plain" else adaptive)(pixels[:size], **settings)
    # Linux's own count of this program: that of `resource` begins with what the parent had
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--macs-share", type=float, default=PUBLISHED_SHARE, help="of the random model's MACs")
    parser.add_argument("--spread", type=float, default=1.0, help="of its depths within an image, in blocks")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--trained", metavar="CHECKPOINT", help="an AViT; not the random one")
    parser.add_argument("--plain", metavar="CHECKPOINT", help="transformers' own model of the same sizes")
    parser.add_argument("--data", help="digits, a folder of images, parquet files or a Hub id")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if len({bool(options.trained), bool(options.plain), bool(options.data)}) > 1:
        parser.error("--trained, --plain and --data go together")
    models = prepare(options)
    if options.peak_of:
        answer_once(options.peak_of, options.batch_sizes[0], models)
        return
    results = []
    print("batch  MACs   clock  share  images/s plain  removed  masked  peak MB plain  removed  masked")
    for size in options.batch_sizes:
        row = measure(size, models, options)
        results.append(row)
        speed, peak = row["images_per_second"], row["peak_mb"]
        print(
            f"{size:5}  {row['macs_speed_up']:.2f}x  {row['speed_up']:.2f}x  {row['share']:5.2f}  "
            f"{speed['plain']:14.1f}  {speed['removed']:7.1f}  {speed['masked']:6.1f}  "
            f"{peak['plain']:13.0f}  {peak['removed']:7.0f}  {peak['masked']:6.0f}",
            flush=True,
        )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
