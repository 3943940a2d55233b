"""The figures of a highway as an `evaluate.Metric`. The only file that imports evaluate."""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError('HighwayMetric is a metric of the evaluate library: pip install "lgvit-hf[train]"') from error

from .metrics import macro_f1

_DESCRIPTION = "Accuracy and macro-F1 of a classifier and, where its depths are given, how early it answers."

_INPUTS = """
Args:
    predictions (`list[int]`): The class that was answered, from 0.
    references (`list[int]`): The class that is right, from 0.
    exit_layer (`list[int]`):
        Blocks run before each answer, from 1, as the model's output says. Only with `HighwayMetric(num_blocks=...)`.

Returns:
    `accuracy`, and `macro_f1` over the classes that occur; with `exit_layer` also `mean_depth` in blocks and
    `layer_speed_up`, `num_blocks / mean_depth`. All are `None` where there are no samples.
"""


class HighwayMetric(evaluate.Metric):  # type: ignore[misc]  # a package without types
    """Accuracy, macro-F1 and, if asked for, depth, for `evaluate.evaluator`, `evaluate.combine` or one's own loop.

    It comes with this package and not from `evaluate.load`, so that it needs no network. On transformers 5, evaluate
    0.4.6 evaluates a model or its folder, but no `pipeline`.

    Args:
        num_blocks (`int`, *optional*):
            Of the full model. When given, every answer comes with its `exit_layer`. `evaluate.evaluator` only knows
            answers: leave it out there.
        settings (*optional*): Of every `evaluate.Metric`: `keep_in_memory`, `cache_dir`, `num_process`, ...

    Raises:
        ValueError: `num_blocks` is no positive integer; later, an `exit_layer` is not one of its blocks.

    Example:

        >>> metric = HighwayMetric()
        >>> metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        {'accuracy': 0.75, 'macro_f1': 0.733...}

        >>> metric = HighwayMetric(num_blocks=12)
        >>> metric.add_batch(predictions=[0, 1], references=[0, 1], exit_layer=[4, 8])
        >>> metric.add_batch(predictions=[2, 0], references=[2, 1], exit_layer=[12, 8])
        >>> metric.compute()
        {'accuracy': 0.75, 'macro_f1': 0.777..., 'mean_depth': 8.0, 'layer_speed_up': 1.5}
    """

    def __init__(self, num_blocks: int | None = None, **settings: Any):
        if num_blocks is not None and (type(num_blocks) is not int or num_blocks < 1):
            raise ValueError(f"num_blocks={num_blocks!r} must be an integer of at least 1, the full model's blocks")
        self.num_blocks = num_blocks
        super().__init__(**settings)

    def _info(self) -> evaluate.MetricInfo:
        inputs = ["predictions", "references", *([] if self.num_blocks is None else ["exit_layer"])]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Value("int64") for name in inputs}),
            format="numpy",
        )

    def _compute(
        self, *, predictions: np.ndarray, references: np.ndarray, exit_layer: np.ndarray | None = None
    ) -> dict[str, float | None]:
        figures = {
            "accuracy": _mean(predictions == references),
            "macro_f1": macro_f1(predictions, references) if len(references) else None,
        }
        if exit_layer is None:
            return figures
        if self.num_blocks is None:
            raise ValueError(
                "exit_layer: depths are of a model with so many blocks; make HighwayMetric(num_blocks=...)"
            )
        strange = exit_layer[(exit_layer < 1) | (exit_layer > self.num_blocks)]
        if len(strange):
            raise ValueError(
                f"exit_layer: {strange[0]} is no number of blocks from 1 to num_blocks={self.num_blocks}; give the "
                "model's exit_layer, not its exit_index"
            )
        depth = _mean(exit_layer)
        return {**figures, "mean_depth": depth, "layer_speed_up": self.num_blocks / depth if depth else None}


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
