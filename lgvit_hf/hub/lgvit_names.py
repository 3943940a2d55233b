"""What LGViT calls the tensors of an exit, and what we do: one table, read both ways."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..configuration import HighwayConfig
from ..configuration_sequence import DeiTHighwayConfig
from ..configuration_swin import SwinHighwayConfig
from .strict import Rename, by_module

POOLER = "deit.pooler."
# our module inside an exit, and LGViT's
_ATTENTION = ("query", "key", "value")
_POINTWISE = {
    "body.expand": "mlp.conv1.0",
    "body.expand_bn": "mlp.conv1.2",
    "body.project": "mlp.conv2.0",
    "body.project_bn": "mlp.conv2.1",
}
BODIES = {
    "linear": {},
    "conv_normal": {"body.conv": "mlp.conv.0", "body.bn": "mlp.conv.2"},
    "conv1_1": {**_POINTWISE, "body.depthwise": "mlp.proj", "body.depthwise_bn": "mlp.proj_bn"},
    "conv2_1": _POINTWISE,
    "attention": {"body.qkv": "mlp.qkv", "body.proj": "mlp.proj"},
    "self_attention": {
        **{f"body.{part}": f"mlp.attention.{part}" for part in _ATTENTION},
        "body.proj": "mlp.output.dense",
    },
    "vit": {
        **{f"block.mix.{part}": f"layer.attention.attention.{part}" for part in _ATTENTION},
        "block.mix.proj": "layer.attention.output.dense",
        "block.widen": "layer.intermediate.dense",
        "block.narrow": "layer.output.dense",
        "block.norm_before": "layer.layernorm_before",
        "block.norm_after": "layer.layernorm_after",
    },
}


def kind_of(config: HighwayConfig) -> str:
    """`"vit"`, `"deit"` or `"swin"`."""
    return config.model_type.removesuffix("_highway")


def exit_modules(kind: str, head: str) -> dict[str, str]:
    """Our name of each module of an exit that has weights, and LGViT's; empty for a head that LGViT does not have.

    Example:

        >>> exit_modules("swin", "attention_r2")["classifiers.0"]
        'classifier.classifier'
    """
    body = BODIES.get("attention" if head.startswith("attention_r") else head)
    if body is None:
        return {}
    readers = {"classifiers.0": "classifier"}
    if kind == "deit":
        readers = {"classifiers.0": "cls_classifier", "classifiers.1": "distillation_classifier"}
    if kind == "swin":
        readers["norm"] = "layernorm"
    elif head in ("linear", "vit"):
        readers |= {"dense": "pooler.dense"} if kind == "vit" else {"norm": "layernorm"}
    # the linear head stands inside those that do something before
    inside = "classifier." if head == "vit" or (kind == "swin" and head != "linear") else ""
    return {**body, **{ours: inside + theirs for ours, theirs in readers.items()}}


def exit_prefixes(config: HighwayConfig) -> list[str]:
    """What LGViT's names of each exit begin with; Swin's exits stand in their stage."""
    if not isinstance(config, SwinHighwayConfig):
        return [f"deit.encoder.highway.{index}." for index in range(len(config.exits))]
    stages = [config.stage_of(exit.after) for exit in config.exits]
    return [
        f"swin.encoder.layers.{stage}.highway.{stages[:index].count(stage)}." for index, stage in enumerate(stages)
    ]


def from_lgvit(config: HighwayConfig) -> Rename:
    """LGViT's name of a tensor -> ours, or `None` for those that LGViT has and never uses."""
    backbone = "deit" if isinstance(config, DeiTHighwayConfig) else "vit"
    # the pooler was built and never used, the norm beside Swin was added in its stage two by mistake
    unused = "layernorm." if isinstance(config, SwinHighwayConfig) else POOLER
    return by_module(
        {theirs: ours for ours, theirs in _modules(config).items()},
        lambda name: None if name.startswith(unused) else re.sub(r"^deit\.", f"{backbone}.", name),
    )


def to_lgvit(config: HighwayConfig) -> Callable[[str], str]:
    """Our name of a tensor -> LGViT's."""
    return by_module(_modules(config), lambda name: re.sub(r"^vit\.", "deit.", name))


def _modules(config: HighwayConfig) -> dict[str, str]:
    """Our full name of every module of the exits, and LGViT's."""
    return {
        f"exits.{index}.{ours}": prefix + theirs
        for index, (exit, prefix) in enumerate(zip(config.exits, exit_prefixes(config), strict=True))
        for ours, theirs in exit_modules(kind_of(config), exit.head).items()
    }
