"""HighwayTrainer (stage one) and DistillationTrainer (stage two): transformers' Trainer with another loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from .arguments import STAGE_ONE, STAGE_TWO, HighwayTrainingArguments
from .strategies import only_depth, stage_one_loss, stage_two_loss

logger = logging.getLogger(__name__)


class HighwayTrainer(Trainer):
    """Trains backbone and exits together, by `args.strategy`; `backbone` and `single_exit` train a part.

    Args:
        model (`PreTrainedModel`): A highway.
        args (`HighwayTrainingArguments`): See there for the strategies.
        kwargs: As of `transformers.Trainer`.

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

    strategies = STAGE_ONE

    def __init__(self, model: PreTrainedModel, args: HighwayTrainingArguments, **kwargs: Any):
        if not isinstance(args, HighwayTrainingArguments):
            raise ValueError(f"args: {type(args).__name__} must be HighwayTrainingArguments")
        if args.strategy is not None and args.strategy not in self.strategies:
            raise ValueError(
                f"strategy: {args.strategy!r} is not for {type(self).__name__}; choices: {', '.join(self.strategies)}"
            )
        num_exits = len(model.exits)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func: the strategy is the loss; use transformers.Trainer for one of your own"
            )
        if model.config.truncated or (num_exits == 0 and args.strategy != "backbone"):
            raise ValueError(
                f"{type(self).__name__} trains early exits, and this model has none; use transformers.Trainer"
            )
        if args.strategy == "single_exit" and args.train_exit >= num_exits:
            raise ValueError(f"train_exit: {args.train_exit} is outside 0..{num_exits - 1} ({num_exits} exits)")
        trained = self._trained(model, args)
        if trained is not None:
            model.requires_grad_(False)
            for module in trained:
                module.requires_grad_(True)
        elif not any(parameter.requires_grad for parameter in model.base_model.parameters()):
            logger.warning("the backbone is frozen, only exits are trained; model.requires_grad_(True) thaws it")
        super().__init__(model, args, **kwargs)

    @staticmethod
    def _trained(model: PreTrainedModel, args: HighwayTrainingArguments) -> Iterable[nn.Module] | None:
        """The modules that are trained while all others are frozen; `None` where nothing is frozen."""
        return [model.exits[args.train_exit]] if args.strategy == "single_exit" else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The strategy's loss in training, the model's own in evaluation."""
        if not model.training:
            # what a strategy trains is what its evaluation answers with
            depth = only_depth(self.args, self.accelerator.unwrap_model(model).config)
            bounds = {} if depth is None else {"early_exit": True, "min_depth": depth, "max_depth": depth}
            outputs = model(**inputs, **bounds)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        if return_outputs:
            raise ValueError("return_outputs: a training step has no single output")
        highway = self.accelerator.unwrap_model(model)
        trained = self._trained(highway, self.args)
        if trained is not None:
            _eval_all_but(highway, trained)
        return self._training_loss(model, highway.config, **inputs)

    def _training_loss(self, model, config, pixel_values, labels, **inputs):
        return stage_one_loss(model, config, pixel_values, labels, self.args, self.state.global_step, **inputs)


class DistillationTrainer(HighwayTrainer):
    """Second stage: exits learn from the labels and from the final classifier, on a frozen backbone.

    Backbone and final classifier have `requires_grad=False` and stay in `eval()` mode, so that the teacher is the
    model as it answers. Works for ViT, DeiT and Swin with any number and kinds of exits.
    """

    strategies = STAGE_TWO

    @staticmethod
    def _trained(model: PreTrainedModel, args: HighwayTrainingArguments) -> Iterable[nn.Module]:
        return [model.exits]

    def _training_loss(self, model, config, pixel_values, labels, **inputs):
        return stage_two_loss(model, config, pixel_values, labels, self.args, **inputs)


def _eval_all_but(model: nn.Module, trained: Iterable[nn.Module]) -> None:
    """Frozen modules answer as they will in use: no dropout, no new batch statistics."""
    for module in model.children():
        module.eval()
    for module in trained:
        module.train()
