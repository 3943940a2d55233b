"""The figures of evaluation during training: accuracy of every exit, and accuracy and depth under the exit policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..engine import Answers


def sample_answers(exit_logits: Sequence[Tensor], answers: Answers) -> Tensor:
    """What the metrics need of each sample, instead of its logits: the class of every exit, and where it exits.

    Args:
        exit_logits (`Sequence[Tensor]`): `[B, C]` of each of the `E` exits, the final classifier last.
        answers (`Answers`): Of the same samples, under the exit policy.

    Returns:
        `[B, E + 1]` int64, the exit's index last.
    """
    return torch.stack([*(logits.argmax(-1) for logits in exit_logits), answers.exit_index], dim=1)


class ExitMetrics:
    """`compute_metrics` for `Trainer`, from `sample_answers`.

    Takes predictions in one piece, as a list of batches (`eval_do_concat_batches=False`) or batch by batch
    (`batch_eval_metrics=True`). Only counts are kept, and every sample counts once, however many processes there are.

    Args:
        depths (`Sequence[int]`): Blocks run before each exit that is evaluated.
        num_blocks (`int`): Of the full model.

    Returns:
        `accuracy` and `mean_depth` under the policy, `layer_speed_up` (`num_blocks / mean_depth`), and
        `exit_{depth}_accuracy` of all samples for each exit. Of logits (`Trainer.predict`), the accuracy alone;
        of labels that are no class numbers, nothing.

    Example:

        >>> metrics = ExitMetrics([1, 2], num_blocks=2)
        >>> answers = np.array([[0, 1, 0], [0, 1, 1]])
        >>> figures = metrics(EvalPrediction(predictions=answers, label_ids=np.array([0, 1])))
        >>> figures["accuracy"], figures["mean_depth"], figures["exit_1_accuracy"]
        (1.0, 1.5, 0.5)
    """

    def __init__(self, depths: Sequence[int], num_blocks: int):
        self.depths = np.asarray(depths)
        self.num_blocks = num_blocks
        self._counts: np.ndarray | float = 0.0

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Count these samples; the figures of all so far when `compute_result`, after which counting starts anew."""
        pairs = list(zip(_batches(prediction.predictions), _batches(prediction.label_ids), strict=True))
        if any(np.issubdtype(labels.dtype, np.floating) for _, labels in pairs):
            return {}
        self._counts = self._counts + sum(_count(answers, labels, self.depths) for answers, labels in pairs)
        if not compute_result:
            return {}
        samples, right, depth, *exits_right = np.asarray(self._counts).tolist()
        samples, self._counts = max(samples, 1.0), 0.0
        figures = {"accuracy": right / samples}
        if exits_right:
            figures["mean_depth"] = depth / samples
            figures["layer_speed_up"] = self.num_blocks * samples / depth if depth else 1.0
            per_exit = zip(self.depths, exits_right, strict=True)
            figures |= {f"exit_{exit_depth}_accuracy": count / samples for exit_depth, count in per_exit}
        return figures


def _batches(values: np.ndarray | Tensor | Sequence) -> list[np.ndarray]:
    return [np.asarray(part) for part in (values if isinstance(values, (list, tuple)) else [values])]


def _count(answers: np.ndarray, labels: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Samples; right answers and summed depth under the policy; right answers of each exit, where they are known."""
    known = labels != -100
    answers, labels = answers[known], labels[known]
    if np.issubdtype(answers.dtype, np.floating):
        return np.array([len(labels), (answers.argmax(-1) == labels).sum(), 0.0])
    classes, exit_index = answers[:, :-1], answers[:, -1]
    right = classes == labels[:, None]
    policy_right = np.take_along_axis(right, exit_index[:, None], axis=1)
    return np.array([len(labels), policy_right.sum(), depths[exit_index].sum(), *right.sum(0)], dtype=float)
