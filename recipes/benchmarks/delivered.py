"""What a user gains in all: early exit, ONNX Runtime and int8 against the plain Hugging Face model, part by part.

    lgvit calibrate runs/stage2 --data photos/ --max-accuracy-drop 0.01 --output calibrated
    python recipes/benchmarks/delivered.py calibrated --plain runs/backbone --data photos/

The plain model is transformers' own class with the base's weights; the highway leaves by its own policy. Both run in
PyTorch (eager), in ONNX Runtime, and there with int8 weights. Accuracies are of all rows of the split; times are of
the same random images, all six in turn, one thread, medians summed over the batches.
"""

import argparse
import copy
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForImageClassification

from lgvit_hf.cli.inputs import open_highway
from lgvit_hf.data.processing import stack
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.export.onnx_export import export_onnx
from lgvit_hf.files import write_json
from lgvit_hf.hub.loading import HIGHWAYS
from lgvit_hf.runtimes.onnxruntime import ORTHighway

RUNTIMES = ("PyTorch", "ONNX Runtime", "ONNX Runtime, int8")


def plain_model(checkpoint):
    """The checkpoint's base as transformers' own class, such as `SwinForImageClassification`."""
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type not in HIGHWAYS:
        return AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    highway = HIGHWAYS[config.model_type].from_pretrained(checkpoint)
    kind = config.model_type.removesuffix("_highway")
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    plain_config, weights = AutoConfig.for_model(kind, **settings), highway.state_dict()
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(plain_config)]
    # DeiT has a class with a teacher's head and one without
    models = (plain(plain_config) for plain in (classes if isinstance(classes, tuple) else (classes,)))
    model = next(model for model in models if model.state_dict().keys() <= weights.keys())
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


def variants(model, plain, folder):
    """What is compared, by name: runtime, and whether samples exit early."""
    never = copy.deepcopy(model)
    never.set_exit_policy("never")
    found = {("PyTorch", False): plain, ("PyTorch", True): model}
    for runtime, precision in zip(RUNTIMES[1:], ("float32", "int8"), strict=True):
        for early, source in ((False, never), (True, model)):
            target = folder / f"{precision}_{early}"
            export_onnx(source, target, precision=precision)
            found[runtime, early] = ORTHighway.from_pretrained(target, threads=1)
    return found


@torch.no_grad()
def accuracies(models, dataset):
    right = dict.fromkeys(models, 0)
    for batch in DataLoader(dataset, batch_size=64, collate_fn=stack):
        for name, model in models.items():
            right[name] += int((model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum())
    return {name: count / len(dataset) for name, count in right.items()}


@torch.no_grad()
def seconds(models, pixels, size, repeats):
    total = dict.fromkeys(models, 0.0)
    for batch in pixels.split(size):
        runs = {name: partial(model, pixel_values=batch) for name, model in models.items()}
        for name, times in time_interleaved(runs, repeats=repeats, warm_up=1).items():
            total[name] += statistics.median(times)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a calibrated highway")
    parser.add_argument("--plain", required=True, help="the base that it was made from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--images", type=int, default=256, help="timed, drawn at random")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _, dataset = open_highway(options.checkpoint, options.data, options.split)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: options.images].tolist()
    pixels = stack([dataset[row] for row in rows])["pixel_values"]
    with tempfile.TemporaryDirectory() as folder:
        models = variants(model, plain_model(options.plain), Path(folder))
        sizes = {
            (runtime, early): (Path(folder) / f"{precision}_{early}" / "model.onnx").stat().st_size
            for runtime, precision in zip(RUNTIMES[1:], ("float32", "int8"), strict=True)
            for early in (False, True)
        }
        right = accuracies(models, dataset)
        times = {size: seconds(models, pixels, size, options.repeats) for size in options.batch_sizes}
    print(f"{type(models['PyTorch', False]).__name__}; {len(dataset)} rows; {len(pixels)} images timed, one thread")
    heading = "".join(f"   ms, batch {size:2}   speed-up" for size in times)
    print(f"{'runtime':20}early exit   accuracy      MB{heading}")
    results = []
    for runtime in RUNTIMES:
        for early in (False, True):
            cells = ""
            for total in times.values():
                cells += f"{1e3 * total[runtime, early] / len(pixels):15.3f}"
                cells += f"{total['PyTorch', False] / total[runtime, early]:10.2f}x"
            megabytes = f"{sizes[runtime, early] / 1e6:.1f}" if (runtime, early) in sizes else "-"
            where = "early" if early else "at the end"
            print(f"{runtime:20}{where:10}{right[runtime, early]:11.2%}{megabytes:>8}{cells}")
            results.append(
                {
                    "runtime": runtime,
                    "early_exit": early,
                    "accuracy": right[runtime, early],
                    "bytes": sizes.get((runtime, early)),
                    "seconds": {size: total[runtime, early] for size, total in times.items()},
                }
            )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
