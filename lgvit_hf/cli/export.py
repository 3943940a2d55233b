"""`lgvit export`: a checkpoint as ONNX, run against PyTorch before it is kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import real, whole
from .options import add_data, add_policy, add_processor

if TYPE_CHECKING:
    from ..runtimes.manifest import Manifest

HELP = "write ONNX that really skips, and run it against the model"
EXAMPLE = (
    "lgvit export runs/stage2 onnx/\n"
    "  lgvit export runs/stage2 small/ --quantize int8 --data photos/ --max-accuracy-drop 0.005"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit export`."""
    add = parser.add_argument
    add_data(parser, "test", "samples on which the files are judged, where --data is given")
    add("output", help="folder to write")
    layouts = "one file with real branches, one per segment, or all exits' logits (default: single)"
    add("--layout", choices=("single", "segments", "all_exits"), default="single", help=layouts)
    add("--quantize", choices=("int8", "float16"), help="smaller and less exact; give --data to know how much")
    kinds = "of one file: inputs with a default, required inputs, or fixed numbers (default: optional)"
    add("--thresholds", choices=("optional", "input", "fixed"), default="optional", help=kinds)
    add("--limit", type=whole(), help="judge on that many of them, drawn at random")
    add("--max-accuracy-drop", type=real(), default=0.005, help="on these; more fails the export (default: 0.005)")
    add_processor(parser)
    add_policy(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    import torch
    from torch.utils.data import Subset

    from ..data.held_out import load_known, read_training_data, write_training_data
    from ..data.processing import ProcessedImages
    from ..export.onnx_export import export_onnx
    from ..hub.loading import check_class_names
    from ..runtimes.manifest import is_exported
    from .inputs import open_checkpoint

    if is_exported(options.checkpoint):
        raise ValueError(f"{options.checkpoint} is exported already; give the checkpoint that it came from")
    model, processor = open_checkpoint(options)
    images: Any = None
    if options.data is not None:
        splitting = {"validation_share": options.validation_share, "seed": options.seed}
        splits = load_known(options.data, options.checkpoint, **splitting).splits
        check_class_names(options.checkpoint, model.config, splits.label_names)
        images = every = ProcessedImages(getattr(splits, options.split), processor)
        if options.limit is not None:
            order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
            images = Subset(every, order[: options.limit].tolist())
    manifest = export_onnx(
        model,
        options.output,
        options.layout,
        precision=options.quantize or "float32",
        thresholds=options.thresholds,
        processor=processor,
        images=images,
        max_accuracy_drop=options.max_accuracy_drop,
    )
    write_training_data(options.output, read_training_data(options.checkpoint))
    print(export_as_text(manifest, options.output))


def export_as_text(manifest: Manifest, folder: str | Path) -> str:
    """What `lgvit export` wrote and how it was checked, for a terminal."""
    from ..evaluation.report_text import policy_in_words

    size = sum((Path(folder) / name).stat().st_size for name in manifest.files)
    checks, sizes = manifest.checks, ", ".join(map(str, manifest.checks["batch_sizes"]))
    lines = [
        f"{', '.join(manifest.files)} in {folder}: {manifest.precision}, {size / 1e6:.1f} MB; policy "
        f"{policy_in_words(manifest.policy)}",
        f"run in ONNX Runtime on batches of {sizes} with every exit taken: "
        + ("answers as the model does, " if manifest.precision == "float32" else "")
        + f"logits within {checks['largest_difference']:.1e}",
    ]
    if "images" in checks:
        found = checks["images"]
        lines.append(
            f"on {found['rows']} images {found['accuracy']:.2%} right, the model {found['accuracy_of_model']:.2%}; "
            f"the same answer on {found['agreement']:.2%}; mean depth {found['mean_depth']:.2f}, the model "
            f"{found['mean_depth_of_model']:.2f}"
        )
    elif manifest.precision != "float32":
        lines.append(f"what {manifest.precision} costs in accuracy was not measured; --data says on which images to")
    return "\n".join(lines)
