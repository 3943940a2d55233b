"""Configs of backbones with one sequence of tokens, with exits: upstream's fields and those of `HighwayConfig`."""

from __future__ import annotations

from transformers import DeiTConfig, ViTConfig

from .configuration import HighwayConfig
from .ensemble import Ensemble  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import HEADS  # noqa: F401
from .policies import ExitPolicy  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import State  # noqa: F401


class ViTHighwayConfig(HighwayConfig, ViTConfig):
    """A `ViTConfig` with exits; see `HighwayConfig` for the exit settings.

    Example:

        >>> config = ViTHighwayConfig(num_hidden_layers=6, exit_positions=[2, 4])
        >>> config.exits
        (Exit(after=2, head='conv1_1'), Exit(after=4, head='attention_r2'))
    """

    model_type = "vit_highway"


class DeiTHighwayConfig(HighwayConfig, DeiTConfig):
    """A `DeiTConfig` with exits; see `HighwayConfig` for the exit settings.

    Args:
        distilled (`bool`, *optional*, defaults to `True` unless `architectures` names `DeiTForImageClassification`):
            Whether there is a classifier for the distillation token, as in `DeiTForImageClassificationWithTeacher`.
            The exits then have two as well; otherwise the final classifier and the exits read the class token alone.

    Example:

        >>> DeiTHighwayConfig(exit_positions=[4, 8], exit_types="linear").exit_types
        ['linear', 'linear']
    """

    model_type = "deit_highway"

    def __init__(self, *settings, distilled=None, **kwargs):
        if distilled is None:
            distilled = "DeiTForImageClassification" not in (kwargs.get("architectures") or [])
        # before the rest, which asks for the pools
        self.distilled = distilled
        super().__init__(*settings, **kwargs)

    @property
    def pools(self) -> tuple[str, ...]:  # type: ignore[override]  # reading it is all there is
        """With two classifiers each must read its own token."""
        return ("cls",) if self.distilled else ("cls", "mean")
