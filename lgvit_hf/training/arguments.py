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
    "mixed",
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
            (exits also learn from the final classifier), `single_exit`, `backbone` (no exits), `mixed` (the backbone
            alone, then exits on the frozen backbone, then both, the final classifier distilled from what it was
            before; each phase has the learning-rate schedule for itself). For
            `DistillationTrainer` `distillation_lgvit` (the default) or `distillation` (predictions only).
        train_exit (`int`, *optional*): Which exit, from 0, `single_exit` trains.
        backbone_share (`float`, *optional*, defaults to 0):
            This first share of the steps trains the final classifier alone, the rest by `strategy`.
        backbone_epochs (`float`, *optional*):
            Of `mixed`, which needs it: epochs of the backbone alone; 0 where the model is fine-tuned already.
        head_epochs (`float`, *optional*, defaults to 2): Of `mixed`: epochs of the exits on the frozen backbone.
        head_learning_rate (`float`, *optional*): Of the exits, by default `learning_rate`.
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
    backbone_epochs: float | None = field(default=None, metadata={"help": "Epochs of `mixed` for the backbone alone."})
    head_epochs: float = field(default=2.0, metadata={"help": "Epochs of `mixed` for exits on the frozen backbone."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Of the exits, if not `learning_rate`."})
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
        if self.head_learning_rate is not None and not 0 < self.head_learning_rate < float("inf"):
            raise ValueError(f"head_learning_rate: {self.head_learning_rate!r} must be above 0, and finite")
        self._check_mixed()
        if self.backbone_share and self.strategy in ("single_exit", "backbone", "mixed", *STAGE_TWO[:1]):
            raise ValueError(f"backbone_share: {self.backbone_share!r} means nothing to strategy {self.strategy!r}")
        if smoothing := self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor: {smoothing!r} is not used by any strategy; set 0")
        self.finds_unused_by_strategy = self.ddp_find_unused_parameters is None
        if self.finds_unused_by_strategy:
            # what a strategy leaves out of a step has no gradient there
            leaves_out = self.strategy in ("alternating", "alternating_weighted", "backbone", "mixed")
            self.ddp_find_unused_parameters = leaves_out or self.backbone_share > 0
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature!r} must be above 0")

    def _check_mixed(self) -> None:
        epochs = self.backbone_epochs
        if self.strategy != "mixed":
            if epochs is not None:
                raise ValueError(
                    f"backbone_epochs: {epochs!r} means nothing to strategy {self.strategy!r}, only to 'mixed'"
                )
            return
        if epochs is None or not epochs >= 0:
            raise ValueError(
                f"backbone_epochs: {epochs!r} must be the epochs of the backbone alone, with which strategy 'mixed' "
                "begins; 0 where the model is fine-tuned already"
            )
        if not self.head_epochs > 0:
            raise ValueError(f"head_epochs: {self.head_epochs!r} must be above 0: exits are fitted before they join")
        if not epochs + self.head_epochs < self.num_train_epochs:
            raise ValueError(
                f"backbone_epochs: {epochs:g} and head_epochs: {self.head_epochs:g} leave nothing for backbone and "
                f"exits together of num_train_epochs: {self.num_train_epochs:g}; train for more epochs"
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end (and early stopping): the best model of a 'mixed' run may be one whose exits "
                "were not trained yet; leave it out"
            )
