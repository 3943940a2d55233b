"""`lgvit demo`: a Vision Transformer with exits, trained in two stages on real images, from nothing in minutes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.settings import whole
from ..files import replace_folder, write_json

HELP = "train a ViT with exits on handwritten digits, from nothing, and measure it"
EXAMPLE = "lgvit demo --output demo_output"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit demo`."""
    parser.add_argument("--output", default="demo_output", help="folder for the model, the figures and a plot")
    parser.add_argument("--quick", action="store_true", help="one epoch per stage, to see that everything works")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of weights, splits and batches")


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    run_demo(options.output, quick=options.quick, seed=options.seed)


IMAGE_SIZE = 24
MODEL = {
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    # digits are easy: many are sure long before LGViT's first exit, which stands behind block 4
    "exit_positions": [1, 2, 3, 4, 5, 6, 8, 10],
}
# stage, epochs, learning rate
STAGES = (("backbone", 12, 1e-3), ("1", 8, 5e-4), ("2", 6, 1e-3))
# marks a folder that a later demo may replace
WHAT = "lgvit demo"


def run_demo(
    output: str | Path, *, quick: bool = False, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train, choose a threshold, evaluate and save a 12-block ViT with LGViT's eight exits on handwritten digits.

    Args:
        output (`str` or `Path`): Folder for `model/`, `results.json` and `highway.png`; an earlier demo's is replaced.
        quick (`bool`, *optional*, defaults to `False`): A single epoch per stage, to see that everything works.
        seed (`int`, *optional*, defaults to 0): Of weights, splits and batches.
        say (callable, *optional*): Takes the lines to show.

    Returns:
        What `results.json` holds.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the demo draws a figure: pip install "lgvit-hf[train,plots]"')
    output = Path(output)
    earlier = _is_demo_output(output)
    with replace_folder(output, overwrite=earlier) as folder:
        results = _run(folder, quick, seed, say)
    say(f"\nsaved in {output}: model/ (load it with AutoModelForImageClassification), results.json, highway.png")
    return results


def _is_demo_output(output: Path) -> bool:
    """Whether nothing is there but what a demo wrote."""
    try:
        what = json.loads((output / "results.json").read_text()).get("what")
        return what == WHAT and {file.name for file in output.iterdir()} <= {"model", "results.json", "highway.png"}
    except (OSError, ValueError, AttributeError):
        return False


def _run(folder: Path, quick: bool, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from ..configuration import ViTHighwayConfig
    from ..data.datasets import load_images
    from ..data.processing import ProcessedImages, make_processor
    from ..evaluation.calibration import calibrate
    from ..evaluation.exit_table import collect
    from ..evaluation.plots import plot_report
    from ..evaluation.report import evaluate, evaluate_as_text
    from ..evaluation.sweep import threshold_curve
    from ..modeling_vit import ViTHighway
    from ..training.run import train

    set_seed(seed)
    splits, processor = load_images("digits", seed=seed), make_processor(IMAGE_SIZE)
    train_set, validation_set, test_set = (
        ProcessedImages(images, processor, keep=True) for images in (splits.train, splits.validation, splits.test)
    )
    config = ViTHighwayConfig(
        **MODEL,
        id2label=dict(enumerate(splits.label_names)),
        label2id={name: index for index, name in enumerate(splits.label_names)},
    )
    model = ViTHighway(config)
    exits = ", ".join(f"{exit.after} {exit.head}" for exit in config.exits)
    say(f"{len(train_set)} digits to train on, {len(validation_set)} to choose on, {len(test_set)} to report on")
    say(f"ViT of {config.num_blocks} blocks, {model.num_parameters() / 1e6:.1f} M parameters; exits after: {exits}")

    stages = []
    for stage, epochs, learning_rate in STAGES:
        what = {"backbone": "backbone", "1": "stage 1: backbone and exits", "2": "stage 2: exits, backbone frozen"}[
            stage
        ]
        say(f"\n{what}")
        run = train(
            model,
            processor,
            train_set,
            folder / "model",
            stage=stage,
            num_train_epochs=1 if quick else epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=32,
            weight_decay=0.05,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_strategy="epoch",
            report_to=[],
            seed=seed,
        )
        accuracies = collect(model, validation_set).accuracies()
        say(f"{run['steps']} steps, {run['seconds']:.0f} s; % right in validation, by exit: {_percent(accuracies)}")
        stages.append({"stage": stage, **run, "validation_accuracies": accuracies})

    chosen = calibrate(collect(model, validation_set), max_accuracy_drop=0.01)
    model.set_exit_policy(chosen.policy)
    model.save_pretrained(folder / "model")
    say(f"\nchosen in validation, for an accuracy drop of at most one point\n\n{chosen.as_text()}")
    report = evaluate(model, test_set, progress=_progress)
    curve = threshold_curve(collect(model, test_set))
    plot_report(report, curve, folder / "highway.png")
    results = {
        "what": WHAT,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "stages": stages,
        **report,
        "curve": curve,
    }
    write_json(folder / "results.json", results)
    say("\non the test rows\n")
    say(evaluate_as_text(report))
    return results


def _percent(shares: list[float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares)


def _progress(batches):
    from transformers.utils import logging

    return logging.tqdm(batches, desc="timing", leave=False)
