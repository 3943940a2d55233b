"""`lgvit convert`: other projects' checkpoints as ours, and ours as LGViT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..hub.convert import (
    convert_avit,
    convert_eevit,
    convert_lgvit,
    convert_timm,
    convert_torchvision,
    export_lgvit,
)

READERS = {
    "lgvit": convert_lgvit,
    "eevit": convert_eevit,
    "avit": convert_avit,
    "timm": convert_timm,
    "torchvision": convert_torchvision,
}
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
        options: As of the format's converter; `None` is as good as not given.

    Returns:
        What was written, for a terminal.

    Raises:
        ValueError: An option that the format does not have; a tensor without a place, or missing.
    """
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
    if config.model_type == "avit":
        return f"avit on {config.backbone}, gate {config.gate_scale:g} and {config.gate_center:g}"
    if config.model_type.endswith("_highway"):
        exits = ", ".join(f"{exit.after} {exit.head}" for exit in config.exits)
        return f"{config.model_type}, exits after {exits}" if exits else f"{config.model_type} without exits"
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
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
