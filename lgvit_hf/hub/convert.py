"""Converters by the name of the project whose checkpoints they read or write."""

from __future__ import annotations

from .from_avit import convert_avit
from .from_dinov2 import convert_dinov2
from .from_eevit import convert_eevit, eevit_config
from .from_lgvit import convert_lgvit, lgvit_config, parse_positions
from .from_timm import convert_timm
from .from_torchvision import convert_torchvision
from .to_lgvit import export_lgvit, lgvit_settings

__all__ = [
    "convert_avit",
    "convert_dinov2",
    "convert_eevit",
    "convert_lgvit",
    "convert_timm",
    "convert_torchvision",
    "eevit_config",
    "export_lgvit",
    "lgvit_config",
    "lgvit_settings",
    "parse_positions",
]

READERS = {
    "lgvit": convert_lgvit,
    "eevit": convert_eevit,
    "avit": convert_avit,
    "timm": convert_timm,
    "dinov2": convert_dinov2,
    "torchvision": convert_torchvision,
}
