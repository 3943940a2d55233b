"""HighwayTrainer (stage one) and DistillationTrainer (stage two): transformers' Trainer with another loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..configuration import HighwayConfig
from ..engine import replay
from ..losses import task_loss
from ..wrapper import NO_DATA_PARALLEL, HighwayWrapper
from .arguments import STAGE_ONE, STAGE_TWO, HighwayTrainingArguments
from .checkpoints import ResumableTrainer
from .images import TakesImages, with_pixels
from .metrics import ExitMetrics, sample_answers
from .mixed import TEACHER_FILE, MixedTraining, phase_borders, phase_of, phase_schedule
from .strategies import only_depth, stage_one_loss, stage_two_loss

logger = logging.getLogger(__name__)


class HighwayTrainer(TakesImages, ResumableTrainer):
    """Trains backbone and exits together, by `args.strategy`; `backbone` and `single_exit` train a part.

    `mixed` trains the backbone, then the exits on the frozen backbone, then both. Its evaluation answers with what the
    phase trains, and its checkpoints hold the model before exits joined too.

    Args:
        model (`PreTrainedModel`): A highway; `None` where `model_init` makes one for each run.
        args (`HighwayTrainingArguments`): See there for the strategies.
        kwargs:
            See `transformers.Trainer`. Datasets, also those of `evaluate` and `predict`, may be as `datasets` loads
            or streams images, with columns as `load_images` finds them (`img`, `fine_label`, ...): they go through
            `processing_class`, or the image processor that stands beside the model's checkpoint.

    Example:

        >>> import tempfile, torch
        >>> from lgvit_hf import HighwayTrainer, HighwayTrainingArguments, ViTHighway, ViTHighwayConfig
        >>> small = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)
        >>> model = ViTHighway(ViTHighwayConfig(**small, image_size=16, patch_size=4))
        >>> images = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(8)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = HighwayTrainingArguments(
        ...         folder, strategy="alternating_weighted", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        ...     )
        ...     result = HighwayTrainer(model, args, train_dataset=images).train()
        {'train_runtime': ...}
        >>> result.global_step
        2
    """

    args: HighwayTrainingArguments
    strategies: tuple[str, ...] = STAGE_ONE

    def __init__(self, model: PreTrainedModel | None, args: HighwayTrainingArguments, **kwargs: Any):
        if not isinstance(args, HighwayTrainingArguments):
            raise ValueError(f"args: {type(args).__name__} must be HighwayTrainingArguments")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: the strategy is the loss; use transformers.Trainer for your own")
        if args.head_learning_rate is not None and any(each is not None for each in kwargs.get("optimizers") or ()):
            raise ValueError("head_learning_rate: the optimizers that were given have their own; leave it out")
        model, model_init = self._first_model(model, args, kwargs)
        super().__init__(model, args, **with_pixels(model, kwargs))
        if self._mixed and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("strategy: 'mixed' copies the whole model; train it without FSDP and DeepSpeed")
        self.model_init = model_init or self.model_init
        self._counting = False
        self._measure(model)

    def _take(self, model: PreTrainedModel) -> None:
        args, num_exits = self.args, len(getattr(model, "exits", ()))
        if args.strategy is not None and args.strategy not in self.strategies:
            raise ValueError(
                f"strategy: {args.strategy!r} is not for {type(self).__name__}; choices: {', '.join(self.strategies)}"
            )
        truncated = getattr(model.config, "truncated", True)
        if truncated or (num_exits == 0 and args.strategy != "backbone"):
            raise ValueError(f"{type(self).__name__} trains exits, and this model has none; use transformers.Trainer")
        if args.strategy == "single_exit" and (args.train_exit or 0) >= num_exits:
            raise ValueError(f"train_exit: {args.train_exit} is outside 0..{num_exits - 1} ({num_exits} exits)")
        if isinstance(model, HighwayWrapper):
            if args.n_gpu > 1:
                raise ValueError(NO_DATA_PARALLEL)
            # which parameters a module of any kind does not use is not known
            args.ddp_find_unused_parameters = args.ddp_find_unused_parameters or args.finds_unused_by_strategy
        trained = self._trained(model, args)
        if trained is not None:
            model.requires_grad_(False)
            for module in trained:
                module.requires_grad_(True)
        elif not any(parameter.requires_grad for parameter in model.base_model.parameters()):
            logger.warning("the backbone is frozen, only exits are trained; model.requires_grad_(True) thaws it")
        self._mixed = MixedTraining(model) if args.strategy == "mixed" else None

    def train(self, *args: Any, **kwargs: Any):
        """See `ResumableTrainer.train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._mixed:
                self._mixed.thaw()

    def create_optimizer(self, *args: Any, **kwargs: Any):
        """As upstream's, the exits with their `head_learning_rate`."""
        is_new, optimizer = self.optimizer is None, super().create_optimizer(*args, **kwargs)
        if is_new and self.args.head_learning_rate is not None:
            exits = {id(parameter) for parameter in self.accelerator.unwrap_model(self.model).exits.parameters()}
            for group in list(optimizer.param_groups):
                of_exits = [each for each in group["params"] if id(each) in exits]
                others = [each for each in group["params"] if id(each) not in exits]
                if of_exits and others:
                    group["params"] = others
                    optimizer.add_param_group({**group, "params": of_exits, "lr": self.args.head_learning_rate})
                elif of_exits:
                    group["lr"] = self.args.head_learning_rate
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None):
        """As upstream's; of `mixed` one schedule for each phase."""
        if not self._mixed or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = phase_schedule(optimizer, self.args, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._mixed and self.args.should_save:
            self._mixed.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._mixed:
            self._mixed.has_teacher = False
            if checkpoint is not None:
                self._mixed.load(checkpoint)

    def _phase(self, step: int) -> str | None:
        """What a mixed run trains at a step; `None` of other strategies."""
        return phase_of(step, phase_borders(self.args, self.state.max_steps)) if self._mixed else None

    def _depth(self, config: HighwayConfig) -> int | None:
        """Where the one classifier stands that is trained, by now; `None` where several are."""
        was_backbone = (
            self._phase(max(self.state.global_step - 1, 0)) == "backbone" if hasattr(self, "state") else False
        )
        return config.num_blocks if was_backbone else only_depth(self.args, config)

    def _measure(self, model: Any) -> None:
        if self.compute_metrics is not None and type(self.compute_metrics) is not ExitMetrics:
            return
        config: HighwayConfig = model.config
        depth = self._depth(config)
        depths = [*config.exit_positions, config.num_blocks] if depth is None else [depth]
        names_one_class = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
        self.compute_metrics = ExitMetrics(depths, config.num_blocks) if names_one_class else None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As upstream's; without a `compute_metrics` of one's own, the figures of `ExitMetrics` for every exit."""
        # a mixed run counts what its phase trains
        self._measure(self.accelerator.unwrap_model(self.model))
        before, self._counting = self._counting, isinstance(self.compute_metrics, ExitMetrics)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._counting = before

    @staticmethod
    def _trained(model: Any, args: HighwayTrainingArguments, phase: str | None = None) -> Iterable[nn.Module] | None:
        """The modules that are trained while all others are frozen; `None` where nothing is frozen."""
        if phase == "heads":
            return [model.exits]
        return [model.exits[args.train_exit]] if args.strategy == "single_exit" else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The strategy's loss in training, the model's own in evaluation."""
        highway = self.accelerator.unwrap_model(model)
        if not model.training:
            outputs = self._evaluated(model, highway, inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        if return_outputs:
            raise ValueError("return_outputs: a training step has no single output")
        phase = self._phase(self.state.global_step)
        if self._mixed and phase:
            self._mixed.enter(phase, highway)
        trained = self._trained(highway, self.args, phase)
        if trained is not None:
            # frozen modules answer as they will in use: no dropout, no new batch statistics
            for module in highway.children():
                module.eval()
            for module in trained:
                module.train()
        return self._training_loss(model, highway.config, **inputs)

    def _evaluated(self, model: nn.Module, highway: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's output, or what `ExitMetrics` counts in its place."""
        # what a strategy trains is what its evaluation answers with
        depth = self._depth(highway.config)
        bounds = {} if depth is None else {"early_exit": True, "min_depth": depth, "max_depth": depth}
        metrics = self.compute_metrics if self._counting else None
        if not isinstance(metrics, ExitMetrics) or inputs["labels"].is_floating_point():
            return model(**inputs, **bounds)
        outputs = model(**inputs, **(bounds or {"early_exit": False}))
        exit_logits = outputs.exit_logits or (outputs.logits,)
        answers = replay(exit_logits, metrics.depths.tolist(), highway.answering_policy)
        loss = task_loss(answers.logits, inputs["labels"], highway.config.problem_type)
        return {"loss": loss, "answers": sample_answers(exit_logits, answers)}

    def _training_loss(self, model, config, pixel_values, labels, **inputs):
        step = self.state.global_step
        phase = self._phase(step)
        if phase == "heads":
            return stage_two_loss(model, config, pixel_values, labels, self.args, **inputs)
        if self._mixed and phase == "joint":
            inputs["teacher_logits"] = self._teacher_logits(self._mixed, model, pixel_values, **inputs)
        backbone_only = phase == "backbone" or step < round(self.args.backbone_share * self.state.max_steps)
        return stage_one_loss(model, config, pixel_values, labels, self.args, step, backbone_only, **inputs)

    def _teacher_logits(self, mixed: MixedTraining, model: nn.Module, pixel_values: Tensor, **inputs: Any) -> Tensor:
        if not mixed.has_teacher:
            border = phase_borders(self.args, self.state.max_steps)[1]
            if self.state.global_step != border:
                raise ValueError(
                    f"{TEACHER_FILE}: the checkpoint of step {self.state.global_step} has none, but exits joined at "
                    f"step {border}; go on from a checkpoint of a 'mixed' run with the same epochs"
                )
            mixed.take_teacher(self.accelerator.unwrap_model(model))
        return mixed.teacher_logits(pixel_values, **inputs)


class DistillationTrainer(HighwayTrainer):
    """Second stage: exits learn from the labels and from the final classifier, on a frozen backbone.

    Backbone and final classifier have `requires_grad=False` and stay in `eval()` mode, so that the teacher is the
    model as it answers. Works for ViT, DeiT and Swin with any number and kinds of exits.
    """

    strategies: tuple[str, ...] = STAGE_TWO

    @staticmethod
    def _trained(model: Any, args: HighwayTrainingArguments, phase: str | None = None) -> Iterable[nn.Module]:
        return [model.exits]

    def _training_loss(self, model, config, pixel_values, labels, **inputs):
        return stage_two_loss(model, config, pixel_values, labels, self.args, **inputs)
