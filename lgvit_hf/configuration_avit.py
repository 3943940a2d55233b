"""AViTConfig: a plain ViT or DeiT and how its tokens halt. Everything is checked when built."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import ViTConfig

from .configuration import _offer_models
from .ensemble import Ensemble  # noqa: F401
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import HEADS  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .policies import POLICIES  # noqa: F401
from .safe_config import SafeConfig, check_num_labels
from .segments import State  # noqa: F401
from .token_halting import GATES

BACKBONES = ("vit", "deit")
# how tokens halt, and what that weighs in training
HALTING_FIELDS = (
    "gate",
    "gate_scale",
    "gate_center",
    "eps",
    "ponder_weight",
    "distribution_weight",
    "target_depth",
    "published_target",
)

if TYPE_CHECKING:
    from typing_extensions import Self


class AViTConfig(SafeConfig, ViTConfig):
    """A `ViTConfig`, whose fields are also those of `DeiTConfig`, with the settings of halting.

    Args:
        backbone (`str`, *optional*, defaults to `"vit"`): `"vit"`, or `"deit"`, which has a distillation token.
        distilled (`bool`, *optional*, defaults to `False`):
            Whether there is a classifier for that token too, as in `DeiTForImageClassificationWithTeacher`; the logits
            are then the mean of both.
        gate (`str`, *optional*):
            A published pair of `gate_scale` and `gate_center` instead of these: `"tiny"` 10 and 30, `"small"` 10 and
            75, `"student"` 5 and 10.
        gate_scale (`float`, *optional*, defaults to 10.0), gate_center (`float`, *optional*, defaults to 30.0):
            A block's halting score is `sigmoid(gate_scale * x[..., 0] - gate_center)`.
        eps (`float`, *optional*, defaults to 0.01): A token halts where its scores add up to `1 - eps`.
        ponder_weight (`float`, *optional*, defaults to 5e-4): Of the mean ponder cost in the loss.
        distribution_weight (`float`, *optional*, defaults to 1e-3): Of the distribution loss.
        target_depth (`float`, *optional*, defaults to two thirds of the blocks, 8 of 12):
            Blocks before the one whose halting scores should be the highest.
        published_target (`bool`, *optional*, defaults to `False`):
            Whether the target is that of the published code, whose values do not add up to 1.
        kwargs: Fields of `ViTConfig`.

    Raises:
        ValueError: Naming the field, its value and what it may be.

    Example:

        >>> config = AViTConfig(num_hidden_layers=6, gate="student")
        >>> config.gate_scale, config.gate_center, config.target_depth
        (5.0, 10.0, 4)
    """

    model_type = "avit"
    # predictions of a plain `Trainer` are then the answers alone, as for any other classifier
    keys_to_ignore_at_inference = [
        "token_depth",
        "ponder_cost",
        "exit_layer",
        "halting_scores",
        "ponder_loss",
        "distribution_loss",
    ]

    def __init__(
        self,
        backbone="vit",
        distilled=False,
        gate=None,
        gate_scale=None,
        gate_center=None,
        eps=0.01,
        ponder_weight=5e-4,
        distribution_weight=1e-3,
        target_depth=None,
        published_target=False,
        **kwargs,
    ):
        _refuse_exits(kwargs)
        check_num_labels(kwargs.get("num_labels"))
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        self.backbone = backbone
        self.distilled = distilled
        self.gate_scale, self.gate_center = _gate(gate, gate_scale, gate_center)
        self.eps = eps
        self.ponder_weight = ponder_weight
        self.distribution_weight = distribution_weight
        self.target_depth = round(self.num_hidden_layers * 2 / 3) if target_depth is None else target_depth
        self.published_target = published_target
        self.validate_halting()
        _offer_models()

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and DeiT's distillation token."""
        return 2 if self.backbone == "deit" else 1

    @property
    def num_read_tokens(self) -> int:
        """Tokens that have a classifier; they come first."""
        return 2 if self.distilled else 1

    def validate_halting(self) -> None:
        """Check the settings of halting.

        Raises:
            ValueError: Naming the field, its value and what it may be.
        """
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone: {self.backbone!r} must be one of {', '.join(BACKBONES)}")
        if self.distilled and self.backbone != "deit":
            raise ValueError("distilled: True needs the distillation token of backbone='deit'")
        _check_number("gate_scale", self.gate_scale, above=0)
        _check_number("gate_center", self.gate_center)
        _check_number("eps", self.eps, above=0, below=1)
        _check_number("ponder_weight", self.ponder_weight, at_least=0)
        _check_number("distribution_weight", self.distribution_weight, at_least=0)
        _check_number("target_depth", self.target_depth, above=0, below=self.num_hidden_layers)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As upstream's; halting settings among `kwargs` replace those of the dict and are checked with it."""
        settings = dict(config_dict)
        if "gate" in kwargs:
            settings = {key: value for key, value in settings.items() if key not in ("gate_scale", "gate_center")}
        settings.update((key, kwargs.pop(key)) for key in HALTING_FIELDS if key in kwargs)
        return super().from_dict(settings, **kwargs)


def _gate(name: str | None, scale: float | None, center: float | None) -> tuple[float, float]:
    """The gate's scale and centre; a preset's where one is named."""
    if name is None:
        return GATES["tiny"][0] if scale is None else scale, GATES["tiny"][1] if center is None else center
    if name not in GATES:
        raise ValueError(f"gate: {name!r} must be one of {', '.join(GATES)}, or give gate_scale and gate_center")
    if (scale, center) != (None, None):
        raise ValueError(f"gate: {name!r} says gate_scale and gate_center; give either")
    return GATES[name]


def _check_number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below or value < at_least:
        bounds = {"above": above, "at least": at_least, "below": below}
        limits = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
        raise ValueError(f"{name}: {value!r} must be a number {limits}".rstrip())


def _refuse_exits(settings: dict[str, Any]) -> None:
    exits = sorted(key for key in settings if key.startswith("exit_") or key == "exits")
    if exits:
        raise ValueError(
            f"{exits[0]}: {settings[exits[0]]!r} does not go with halting: an exit would read tokens that have "
            "halted, and an image whose tokens have all halted has its answer already; use ViTHighway or DeiTHighway "
            "for exits"
        )
