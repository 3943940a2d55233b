"""`lgvit demo`: a Vision Transformer with exits, trained in two stages on real images, from nothing in minutes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from ..files import replace_folder, write_json
from .options import SEED

HELP = "train a ViT with exits on handwritten digits, from nothing, and measure it"
EXAMPLE = "lgvit demo --output demo_output"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit demo`."""
    parser.add_argument("--output", default="demo_output", help="folder for the model, the figures and a plot")
    parser.add_argument("--quick", action="store_true", help="one epoch per stage, to see that everything works")
    parser.add_argument("--seed", type=SEED, default=0, help="of weights, splits and batches")


IMAGE_SIZE = 24
MODEL: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    # digits are easy: many can exit long before LGViT's first exit, after block 4
    "exit_positions": [1, 2, 3, 4, 5, 6, 8, 10],
    "exit_types": "concat",
}
# stage, what it trains, epochs, learning rate
STAGES = (
    ("backbone", "backbone", 15, 1e-3),
    ("1", "stage 1: backbone and exits", 10, 5e-4),
    ("2", "stage 2: exits, backbone frozen", 7, 1e-3),
)
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "weight_decay": 0.05,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "save_strategy": "no",
    "logging_strategy": "epoch",
    "report_to": [],
}
# marks a folder that a later demo may replace
# half of these samples are searched on and half are tested on, where one in a hundred may be lost
VALIDATION_SHARE = 0.3
WHAT = "lgvit demo"


def run(options: argparse.Namespace) -> None:
    """Train, choose a threshold, evaluate and save a 12-block ViT with eight exits on handwritten digits.

    The folder `options.output` gets `model/`, `results.json` and `highway.png`; an earlier demo's is replaced.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the demo draws a figure: pip install "lgvit-hf[train,plots]"')
    output = Path(options.output)
    with replace_folder(output, overwrite=_is_demo_output(output)) as folder:
        _run(folder, options.quick, options.seed)
    print(f"\nsaved in {output}: model/ (load it with AutoModelForImageClassification), results.json, highway.png")


def _is_demo_output(output: Path) -> bool:
    """Whether nothing is there but what a demo wrote."""
    try:
        what = json.loads((output / "results.json").read_text()).get("what")
        return what == WHAT and {file.name for file in output.iterdir()} <= {"model", "results.json", "highway.png"}
    except (OSError, ValueError, AttributeError):
        return False


def _run(folder: Path, quick: bool, seed: int) -> None:
    import torch
    from transformers import set_seed

    from ..configuration_sequence import ViTHighwayConfig
    from ..data.datasets import load_images
    from ..data.held_out import TrainingData, write_training_data
    from ..data.processing import ProcessedImages, make_processor
    from ..evaluation.calibration import calibrate
    from ..evaluation.exit_table import collect
    from ..evaluation.plots import plot_report
    from ..evaluation.report import evaluate, evaluate_as_text
    from ..evaluation.sweep import threshold_curve
    from ..modeling_vit import ViTHighway
    from ..training.run import train
    from .inputs import progress_bar

    set_seed(seed)
    splitting: dict[str, Any] = {"seed": seed, "validation_share": VALIDATION_SHARE}
    splits, processor = load_images("digits", **splitting), make_processor(IMAGE_SIZE)
    train_set, validation_set, test_set = (
        ProcessedImages(images, processor, keep=True) for images in (splits.train, splits.validation, splits.test)
    )
    names = dict(enumerate(splits.label_names))
    config = ViTHighwayConfig(**MODEL, id2label=names, label2id={name: index for index, name in names.items()})
    model = ViTHighway(config)
    exits = ", ".join(f"{exit.after} {exit.head}" for exit in config.exits)
    print(f"{len(train_set)} digits to train on, {len(validation_set)} to choose on, {len(test_set)} to report on")
    print(f"ViT of {config.num_blocks} blocks, {model.num_parameters() / 1e6:.1f} M parameters; exits after: {exits}")

    stages = []
    for stage, what, epochs, learning_rate in STAGES:
        print(f"\n{what}")
        result = train(
            model,
            processor,
            train_set,
            folder / "model",
            stage=stage,
            num_train_epochs=1 if quick else epochs,
            learning_rate=learning_rate,
            seed=seed,
            **TRAINING,
        )
        accuracies = collect(model, validation_set).accuracies()
        by_exit = " ".join(f"{100 * share:.0f}" for share in accuracies)
        print(f"{result['steps']} steps, {result['seconds']:.0f} s; % right in validation, by exit: {by_exit}")
        stages.append({"stage": stage, **result, "validation_accuracies": accuracies})

    chosen = calibrate(collect(model, validation_set), policy="auto", max_accuracy_drop=0.01)
    model.set_exit_policy(chosen.policy)
    model.save_pretrained(folder / "model")
    write_training_data(folder / "model", [TrainingData.of(splits, "digits", **splitting)])
    print(f"\nchosen in validation, for an accuracy drop of at most one point\n\n{chosen.as_text()}")
    report = evaluate(model, test_set, progress=progress_bar)
    curve = threshold_curve(collect(model, test_set))
    plot_report(report, curve, folder / "highway.png")
    settings = {"what": WHAT, "seed": seed, "threads": torch.get_num_threads(), "stages": stages}
    write_json(folder / "results.json", {**settings, **report, "curve": curve})
    print("\non the test samples\n")
    print(evaluate_as_text(report))
