"""What a user gains in all: early exit, other runtimes and int8 against the plain Hugging Face model, part by part.

    lgvit calibrate runs/stage2 --data photos/ --max-accuracy-drop 0.01 --output calibrated
    python recipes/benchmarks/delivered.py calibrated --plain runs/backbone --data photos/ --threads 1 2

The plain model is transformers' own class with the base's weights; the highway exits by its own policy. Both run in
PyTorch (eager), ONNX Runtime and OpenVINO, in the latter two also in int8. Accuracies are of all samples of the split,
or of its first `--limit`; times are of the same random images, all ten in turn, medians summed over the batches.
"""

import argparse
import copy
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForImageClassification

from lgvit_hf.cli.inputs import open_highway
from lgvit_hf.data.processing import stack
from lgvit_hf.evaluation.environment import processor_name
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.export.onnx_export import export_onnx
from lgvit_hf.files import write_json
from lgvit_hf.hub.loading import HIGHWAYS
from lgvit_hf.runtimes.onnxruntime import ORTHighway
from lgvit_hf.runtimes.openvino import OVHighway

PRECISIONS = ("float32", "int8")
EXPORTED: dict[str, tuple[Any, str]] = {
    "ONNX Runtime": (ORTHighway, "float32"),
    "ONNX Runtime, int8": (ORTHighway, "int8"),
    "OpenVINO": (OVHighway, "float32"),
    "OpenVINO, int8": (OVHighway, "int8"),
}
RUNTIMES = ("PyTorch", *EXPORTED)


def plain_model(checkpoint):
    """The checkpoint's base as transformers' own class, such as `SwinForImageClassification`."""
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type not in HIGHWAYS:
        return AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    highway = HIGHWAYS[config.model_type].from_pretrained(checkpoint)
    kind = config.model_type.removesuffix("_highway")
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    plain_config, weights = AutoConfig.for_model(kind, **settings), highway.state_dict()
    classes: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(plain_config)]
    # DeiT has a class with a teacher's head and one without
    models = (model(plain_config) for model in (classes if isinstance(classes, tuple) else (classes,)))
    plain = next(model for model in models if model.state_dict().keys() <= weights.keys())
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain.eval()


def export(model, folder):
    """The model as files of both precisions, as it exits and without early exit."""
    never = copy.deepcopy(model)
    never.set_exit_policy("never")
    for precision in PRECISIONS:
        for early, source in ((False, never), (True, model)):
            export_onnx(source, folder_of(folder, precision, early), precision=precision, thresholds="input")


def folder_of(folder, precision, early):
    return folder / f"{precision}_{'early' if early else 'full'}"


def variants(model, plain, folder, threads):
    """What is compared, by runtime and whether samples exit early."""
    torch.set_num_threads(threads)
    found = {("PyTorch", False): plain, ("PyTorch", True): model}
    for runtime, (opened, precision) in EXPORTED.items():
        for early in (False, True):
            found[runtime, early] = opened.from_pretrained(folder_of(folder, precision, early), threads=threads)
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


def rows_of(right, times, folder):
    """What was found, of each variant: accuracy, bytes of the file, seconds by threads and batch size."""
    for runtime in RUNTIMES:
        for early in (False, True):
            size = None
            if runtime in EXPORTED:
                size = (folder_of(folder, EXPORTED[runtime][1], early) / "model.onnx").stat().st_size
            yield {
                "runtime": runtime,
                "early_exit": early,
                "accuracy": right[runtime, early],
                "bytes": size,
                "seconds": {key: total[runtime, early] for key, total in times.items()},
            }


def print_table(rows, images):
    """A line per variant, with speed-ups over its first."""
    base = rows[0]["seconds"]
    columns = "".join(f"{f'{key}, ms':>26}{'':>10}" for key in base)
    print(f"{'runtime':20}{'samples exit':14}{'accuracy':>9}{'MB':>7}{columns}")
    for row in rows:
        megabytes = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        where = "early" if row["early_exit"] else "at the end"
        cells = "".join(
            f"{1e3 * seconds / images:>26.3f}{base[key] / seconds:>9.2f}x" for key, seconds in row["seconds"].items()
        )
        print(f"{row['runtime']:20}{where:14}{row['accuracy']:>9.2%}{megabytes:>7}{cells}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a calibrated highway")
    parser.add_argument("--plain", required=True, help="the base that it was made from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--limit", type=int, help="samples whose accuracy is measured (default: all of the split)")
    parser.add_argument("--images", type=int, default=256, help="timed, drawn at random")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    model, _, dataset, _ = open_highway(options.checkpoint, options.data, options.split)
    plain = plain_model(options.plain)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: options.images].tolist()
    pixels, times = stack([dataset[index] for index in chosen])["pixel_values"], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(model, folder)
        for threads in options.threads:
            models = variants(model, plain, folder, threads)
            for size in options.batch_sizes:
                key = f"batch {size}, {threads} thread{'s' * (threads > 1)}"
                times[key] = seconds(models, pixels, size, options.repeats)
        judged = Subset(dataset, range(min(options.limit or len(dataset), len(dataset))))
        rows = list(rows_of(accuracies(models, judged), times, folder))
    print(f"{processor_name()}; {type(plain).__name__}; {len(judged)} samples; {len(pixels)} images timed")
    print_table(rows, len(pixels))
    if options.output:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
