"""AViTTrainer: transformers' Trainer that says how deep the tokens go, in training and in evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, TrainingArguments

from ..configuration_avit import AViTConfig
from ..evaluation.metrics import macro_f1
from ..token_halting import token_macs
from .checkpoints import ResumableTrainer
from .images import TakesImages, with_pixels

# of the model's output, beside the loss
LOGGED = ("mean_token_depth", "ponder_loss", "distribution_loss")


class AViTTrainer(TakesImages, ResumableTrainer):
    """Trains an `AViT` by the loss it gives, as the plain `Trainer` does, and says what becomes of the tokens.

    Each log holds the means of `mean_token_depth` (blocks), `ponder_loss` and `distribution_loss` over the batches
    since the last. Evaluation gives the figures of `AViTMetrics`, unless there is a `compute_metrics` of one's own.

    Args:
        model (`AViT`): Trained in place; `None` where `model_init` makes one for each run.
        args (`TrainingArguments`): Any.
        kwargs: See `transformers.Trainer`; datasets of images as of `HighwayTrainer`.

    Example:

        >>> import tempfile, torch
        >>> from lgvit_hf import AViT, AViTConfig
        >>> small = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)
        >>> model = AViT(AViTConfig(**small, image_size=16, patch_size=4, gate_scale=1.0, gate_center=1.0))
        >>> images = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(8)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
        ...     trainer = AViTTrainer(model, args, train_dataset=images, eval_dataset=images)
        ...     result = trainer.train()
        ...     figures = trainer.evaluate()
        {'train_runtime': ...}
        >>> sorted(name for name in figures if "depth" in name)
        ['eval_mean_token_depth']
    """

    def __init__(self, model: PreTrainedModel | None, args: TrainingArguments, **kwargs: Any):
        model, model_init = self._first_model(model, args, kwargs)
        super().__init__(model, args, **with_pixels(model, kwargs))
        self.model_init = model_init or self.model_init
        self._measure(model)
        self._sums, self._batches = dict.fromkeys(LOGGED, 0.0), 0

    def _take(self, model: PreTrainedModel) -> None:
        if getattr(model.config, "model_type", None) != AViTConfig.model_type:
            raise ValueError(f"model: {type(model).__name__} has no tokens that halt; an AViT is needed")

    def _measure(self, model: PreTrainedModel) -> None:
        self._own_metrics = self.compute_metrics is None or isinstance(self.compute_metrics, AViTMetrics)
        if self._own_metrics:
            self._own_metrics = model.config.num_labels > 1
            self.compute_metrics = AViTMetrics(model.config) if self._own_metrics else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; what it says of its tokens is kept for the next log."""
        outputs = model(**inputs)
        if model.training:
            said = {name: outputs[name].detach() for name in LOGGED[1:]}
            said["mean_token_depth"] = outputs["token_depth"].float().mean()
            self._sums = {name: self._sums[name] + value for name, value in said.items()}
            self._batches += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As upstream's; a log of the loss also holds how deep the tokens went since the last."""
        if "loss" in logs and self._batches:
            logs |= {name: float(value) / self._batches for name, value in self._sums.items()}
            self._sums, self._batches = dict.fromkeys(LOGGED, 0.0), 0
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As upstream's; our own metrics see the depths of the tokens beside the answers."""
        if self._own_metrics and ignore_keys is None:
            model: Any = self.model
            ignore_keys = [name for name in model.config.keys_to_ignore_at_inference if name != "token_depth"]
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As upstream's; depths are gathered in one byte a token."""
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._own_metrics and isinstance(outputs, tuple):
            outputs = tuple(_small(tensor) for tensor in outputs)
        return loss, outputs, labels


class AViTMetrics:
    """`compute_metrics` for a `Trainer` whose predictions are logits and token depths.

    Args:
        config (`PretrainedConfig`): Of the model.

    Returns:
        `accuracy`, `macro_f1`, `mean_token_depth` and `mean_exit_layer` in blocks, and the mean `macs` of an image.
        Of logits alone, the first two.

    Example:

        >>> from lgvit_hf import AViTConfig
        >>> metrics = AViTMetrics(AViTConfig(num_labels=2))
        >>> logits, depths = np.array([[2.0, 0.0], [1.0, 0.0]]), np.array([[12, 6], [9, 9]])
        >>> figures = metrics(EvalPrediction((logits, depths), np.array([0, 1])))
        >>> figures["accuracy"], figures["mean_token_depth"], figures["mean_exit_layer"]
        (0.5, 9.0, 10.5)
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Of all rows at once."""
        predicted: Any = prediction.predictions
        logits, depths = predicted if isinstance(predicted, tuple) else (predicted, None)
        labels: Any = prediction.label_ids
        classes = logits.argmax(-1)
        figures = {"accuracy": float((classes == labels).mean()), "macro_f1": macro_f1(classes, labels)}
        if depths is not None:
            figures["mean_token_depth"] = float(depths.mean())
            figures["mean_exit_layer"] = float(depths.max(1).mean())
            figures["macs"] = token_macs(self.config, torch.from_numpy(depths)).mean().item()
        return figures


def _small(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.to(torch.uint8)
