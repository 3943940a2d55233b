"""`lgvit convert`: other projects' checkpoints as ours, and ours as LGViT's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import real, whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HELP = "turn another project's checkpoint into one of ours, or ours into LGViT's"
EXAMPLE = (
    "lgvit convert --from lgvit LGViT-ViT-Cifar100/ converted/\n"
    "  lgvit convert --from eevit eevit/ converted/    (a state dict and EEVIT's one .yaml)\n"
    "  lgvit convert --from avit small-10-75.pth avit_small/\n"
    "  lgvit convert --from timm vit_small_patch16_224/model.safetensors plain/\n"
    "  lgvit convert --from torchvision swin_t-704ceda3.pth highway/ --exit-positions 4 8 --exit-types conv1_1\n"
    "  lgvit convert --to lgvit runs/stage2 original/"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit convert`."""
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=("lgvit", "eevit", "avit", "timm", "torchvision"),
        help="whose checkpoint (default: lgvit)",
    )
    parser.add_argument("--to", dest="target_format", choices=("lgvit",), help="the way back, for a highway of ours")
    parser.add_argument("source", help="folder with weights and what belongs to them, or the file of weights")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--gate-scale", type=real(), help="of avit, where the file's name does not say it")
    parser.add_argument("--gate-center", type=real(), help="likewise")
    parser.add_argument("--num-attention-heads", type=whole(), help="of avit, timm, torchvision (one for 64 channels)")
    parser.add_argument(
        "--image-size", type=whole(), nargs=2, metavar=("HEIGHT", "WIDTH"), help="of timm, torchvision"
    )
    parser.add_argument(
        "--exit-positions", type=whole(), nargs="+", metavar="BLOCK", help="of these: new exits, from 1"
    )
    parser.add_argument("--exit-types", nargs="+", metavar="HEAD", help="one head for all, or one each (LGViT's)")


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    given = {name: getattr(options, name) for name in OPTIONS}
    if given["exit_types"] is not None and len(given["exit_types"]) == 1:
        given["exit_types"] = given["exit_types"][0]
    if given["image_size"] is not None:
        given["image_size"] = tuple(given["image_size"])
    formats = {name: getattr(options, name) for name in ("source_format", "target_format")}
    print(run_convert(options.source, options.output, **formats, **given))


_PLAIN = ("timm", "torchvision")
# which option goes with which formats
OPTIONS = {
    "gate_scale": ("avit",),
    "gate_center": ("avit",),
    "num_attention_heads": ("avit", *_PLAIN),
    "image_size": _PLAIN,
    "exit_positions": _PLAIN,
    "exit_types": _PLAIN,
}


def run_convert(
    source: str, output: str, *, source_format: str | None = None, target_format: str | None = None, **options: Any
) -> str:
    """Convert a checkpoint.

    Args:
        source (`str`): File or folder of another project's checkpoint, or folder or Hub id of a highway.
        output (`str`): Folder to make.
        source_format (`str`, *optional*): One of `READERS`; `"lgvit"` where neither format is given.
        target_format (`str`, *optional*): `"lgvit"`, for the way back.
        options: See the format's converter; `None` is as good as not given.

    Returns:
        What was written, for a terminal.

    Raises:
        ValueError: An option that the format does not have; a tensor without a place, or missing.
    """
    from ..hub.convert import READERS, export_lgvit

    if source_format and target_format:
        raise ValueError("give either --from, for another project's checkpoint, or --to, for one of ours")
    source_format = None if target_format else source_format or "lgvit"
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if source_format not in OPTIONS[name]:
            raise ValueError(f"--{name.replace('_', '-')} goes with --from {' or '.join(OPTIONS[name])}")
    if "exit_types" in given and "exit_positions" not in given:
        raise ValueError("--exit-types goes with --exit-positions")
    if source_format is None:
        settings = export_lgvit(source, output)
        what = f"{settings['highway_type']} heads after {settings['position_exits']}, as LGViT's code reads them"
        return f"all tensors matched: {what}; written to {output}"
    config = READERS[source_format](source, output, **given)
    what = _in_words(config)
    return f"all tensors matched: {what}; written to {output}" + _next_steps(source_format, config, output)


def _in_words(config: PretrainedConfig) -> str:
    from ..segments import height_width

    if config.model_type == "avit":
        return f"avit on {config.backbone}, gate {config.gate_scale:g} and {config.gate_center:g}"
    if config.model_type.endswith("_highway"):
        exits = ", ".join(f"{exit.after} {exit.head}" for exit in config.exits)
        return f"{config.model_type}, exits after {exits}" if exits else f"{config.model_type} without exits"
    height, width = height_width(config.image_size)
    if config.model_type == "swin":
        blocks, heads = f"{sum(config.depths)} blocks", f"heads {config.num_heads}, windows of {config.window_size}"
    else:
        blocks, heads = f"{config.num_hidden_layers} blocks", f"{config.num_attention_heads} heads"
    return f"plain {config.model_type}, {blocks}, {heads}, {height} x {width} pixels, {config.num_labels} labels"


def _next_steps(source_format: str, config: PretrainedConfig, output: str) -> str:
    """What is still to be done with what comes without exits."""
    if source_format not in _PLAIN:
        return ""
    lines = []
    if not (Path(output) / "preprocessor_config.json").is_file():
        lines.append(
            "\nno image processor: nothing beside the weights says how pixels were normalised; other commands need a "
            f"preprocessor_config.json in {output}"
        )
    if config.model_type.endswith("_highway"):
        lines.append(f"\nthe exits are new: lgvit train --model {output} --stage 1 (or 2, for the exits alone)")
    else:
        lines.append(f"\nno exits yet: lgvit grow {output} photos/ OUT, or lgvit train --model {output} --stage 1")
    return "".join(lines)
