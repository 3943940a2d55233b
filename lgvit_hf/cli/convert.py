"""`lgvit convert`: other projects' checkpoints as ours, and ours as LGViT's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import real, whole
from .options import one_or_all

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HELP = "turn another project's checkpoint into one of ours, or ours into LGViT's"
EXAMPLE = (
    "lgvit convert --from lgvit LGViT-ViT-Cifar100/ converted/\n"
    "  lgvit convert --from eevit eevit/ converted/    (a state dict and EEVIT's one .yaml)\n"
    "  lgvit convert --from avit small-10-75.pth avit_small/\n"
    "  lgvit convert --from timm vit_small_patch16_224/model.safetensors plain/\n"
    "  lgvit convert --from dinov2 dinov2-small/ plain/ --image-size 112 112\n"
    "  lgvit convert --from torchvision swin_t-704ceda3.pth highway/ --exit-positions 4 8 --exit-types conv1_1\n"
    "  lgvit convert --to lgvit runs/stage2 original/"
)


_PLAIN = ("timm", "torchvision")
# which option goes with which formats
OPTIONS = {
    "gate_scale": ("avit",),
    "gate_center": ("avit",),
    "num_attention_heads": ("avit", *_PLAIN),
    "image_size": ("dinov2", *_PLAIN),
    "exit_positions": _PLAIN,
    "exit_types": _PLAIN,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit convert`."""
    add = parser.add_argument
    formats = ("lgvit", "eevit", "avit", "dinov2", *_PLAIN)
    add("--from", dest="source_format", choices=formats, help="whose checkpoint (default: lgvit)")
    add("--to", dest="target_format", choices=("lgvit",), help="the way back, for a highway of ours")
    add("source", help="folder with weights and what belongs to them, or the file of weights")
    add("output", help="folder to write")
    add("--gate-scale", type=real(), help="of avit, where the file's name does not say it")
    add("--gate-center", type=real(), help="likewise")
    add("--num-attention-heads", type=whole(), help="of avit, timm, torchvision (one for 64 channels)")
    add("--image-size", type=whole(), nargs=2, metavar=("HEIGHT", "WIDTH"), help="of dinov2, timm, torchvision")
    add("--exit-positions", type=whole(), nargs="+", metavar="BLOCK", help="of these: new exits, from 1")
    add("--exit-types", nargs="+", metavar="HEAD", help="one head for all, or one each (LGViT's)")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..hub.convert import READERS, export_lgvit

    source, target, output = options.source_format, options.target_format, options.output
    if source and target:
        raise ValueError("give either --from, for another project's checkpoint, or --to, for one of ours")
    source = None if target else source or "lgvit"
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    for name in given:
        if source not in OPTIONS[name]:
            raise ValueError(f"--{name.replace('_', '-')} goes with --from {' or '.join(OPTIONS[name])}")
    if "exit_types" in given and "exit_positions" not in given:
        raise ValueError("--exit-types goes with --exit-positions")
    if "exit_types" in given:
        given["exit_types"] = one_or_all(given["exit_types"])
    if "image_size" in given:
        given["image_size"] = tuple(given["image_size"])
    if source is None:
        settings = export_lgvit(options.source, output)
        what = f"{settings['highway_type']} heads after {settings['position_exits']}, as LGViT's code reads them"
        steps = ""
    else:
        read: Any = READERS[source]
        config = read(options.source, output, **given)
        what, steps = _in_words(config), _next_steps(source, config, output)
    print(f"all tensors matched: {what}; written to {output}{steps}")


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
    if source_format == "dinov2":
        new = f"lgvit grow {output} photos/ OUT --new-classifier"
        return f"\nthe classifier is new, and there are no exits: {new} fits a classifier, then exits"
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
