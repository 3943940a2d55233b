"""HighwayTrainingArguments: how exits are trained. Never in the model's config."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

STAGE_ONE = (
    "uniform",
    "weighted",
    "alternating",
    "alternating_weighted",
    "distillation",
    "single_exit",
    "backbone",
)
STAGE_TWO = ("distillation_lgvit", "distillation")
LEGACY_ALIASES = {"normal": "uniform"}


@dataclass
class HighwayTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` and the share of each exit in the loss.

    Args:
        strategy (`str`, *optional*):
            For `HighwayTrainer` one of `uniform`, `weighted` (the default: an exit's weight is its depth, or what a
            list in the config's `exit_loss_weights` says),
            `alternating` and `alternating_weighted` (even steps train the final classifier alone), `distillation`
            (exits also learn from the final classifier), `single_exit`, `backbone` (no exits). For
            `DistillationTrainer` `distillation_lgvit` (the default) or `distillation` (predictions only).
        train_exit (`int`, *optional*): Which exit, from 0, `single_exit` trains.
        backbone_share (`float`, *optional*, defaults to 0):
            The mixed regime: this first share of the steps trains the final classifier alone, the rest by `strategy`.
        distillation_weight (`float`, *optional*, defaults to 0.3): Share of the distilled predictions in the loss.
        heterogeneous_weight (`float`, *optional*, defaults to 0.01): Of the exits' maps against the last patches.
        homogeneous_weight (`float`, *optional*, defaults to 0.01): Of the exits' maps among themselves.
        temperature (`float`, *optional*, defaults to 2.0): Softens predictions in distillation.

    Raises:
        ValueError: Naming the field, its value and what it may be.
    """

    strategy: str | None = field(default=None, metadata={"help": f"One of {', '.join((*STAGE_ONE, STAGE_TWO[0]))}."})
    train_exit: int | None = field(default=None, metadata={"help": "The exit, from 0, that `single_exit` trains."})
    backbone_share: float = field(default=0.0, metadata={"help": "First share of the steps without exits."})
    distillation_weight: float = field(default=0.3, metadata={"help": "Share of distilled predictions in the loss."})
    heterogeneous_weight: float = field(default=0.01, metadata={"help": "Weight of maps against the last patches."})
    homogeneous_weight: float = field(default=0.01, metadata={"help": "Weight of maps among the exits."})
    temperature: float = field(default=2.0, metadata={"help": "Softens predictions in distillation."})
    # images reach the model under names that its forward does not list until they are processed
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not take."})

    def __post_init__(self) -> None:
        super().__post_init__()
        known = dict.fromkeys((*STAGE_ONE, *STAGE_TWO))
        if self.strategy is not None:
            name = str(self.strategy).lower()
            self.strategy = LEGACY_ALIASES.get(name, name)
            if self.strategy not in known:
                raise ValueError(f"strategy: unknown {self.strategy!r}; choices: {', '.join(known)}")
        if self.strategy == "single_exit" and (self.train_exit is None or self.train_exit < 0):
            raise ValueError(f"train_exit: {self.train_exit!r} must be the exit, from 0, that 'single_exit' trains")
        bounds = dict.fromkeys(("distillation_weight", "backbone_share"), (1.0, "from 0 to 1"))
        bounds |= dict.fromkeys(("heterogeneous_weight", "homogeneous_weight"), (float("inf"), "at least 0"))
        for name, (most, what) in bounds.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be {what}")
        if self.backbone_share and self.strategy in ("single_exit", "backbone", *STAGE_TWO[:1]):
            raise ValueError(f"backbone_share: {self.backbone_share!r} means nothing to strategy {self.strategy!r}")
        if smoothing := self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor: {smoothing!r} is not used by any strategy; set 0")
        self.finds_unused_by_strategy = self.ddp_find_unused_parameters is None
        if self.finds_unused_by_strategy:
            # what a strategy leaves out of a step has no gradient there
            leaves_out = self.strategy in ("alternating", "alternating_weighted", "backbone")
            self.ddp_find_unused_parameters = leaves_out or self.backbone_share > 0
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature!r} must be above 0")
