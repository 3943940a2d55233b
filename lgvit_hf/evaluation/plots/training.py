"""How each exit got better while it was trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import hide_frame, legend_below, need, new_figure, percent, save

MARKERS = "os^Dv<>PX*"


def plot_training(file: str | Path, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Draw the accuracy of each exit, and under the policy, over the epochs of a training run.

    Args:
        file (`str` or `Path`): The PNG to write.
        evaluations (`list[dict]`):
            `{"epoch", "eval_accuracy", "eval_exit_{depth}_accuracy", ...}` as a `Trainer` logs them. An exit that an
            evaluation left out, as the first ones of strategy `mixed` do, begins later.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no evaluation with an accuracy.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> first = {"epoch": 1.0, "eval_accuracy": 0.5, "eval_exit_2_accuracy": 0.4, "eval_exit_4_accuracy": 0.6}
        >>> with TemporaryDirectory() as folder:
        ...     plot_training(f"{folder}/training.png", [first])
    """
    from matplotlib import colormaps

    logs = [log for log in evaluations if "eval_accuracy" in log]
    need(logs, "evaluations", "evaluation with an accuracy")
    names = {name for log in logs for name in log if re.fullmatch(r"eval_exit_\d+_accuracy", name)}
    depths = sorted(int(name.split("_")[2]) for name in names)
    figure = new_figure(8, 5 + 0.2 * math.ceil(len(depths) / 4))
    axes = figure.subplots()
    epochs = [log["epoch"] for log in logs]
    for index, depth in enumerate(depths):
        values = [percent(log.get(f"eval_exit_{depth}_accuracy")) for log in logs]
        # light for shallow exits; the palest yellow is left out
        color = colormaps["viridis"](0.9 * (1 - index / max(1, len(depths) - 1)))
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(epochs, values, color=color, marker=marker, markersize=4, label=f"after block {depth}")
    if len(depths) != 1:
        values = [percent(log["eval_accuracy"]) for log in logs]
        axes.plot(epochs, values, color="black", linestyle="--", label="by the policy" if depths else "all samples")
    axes.set(xlabel="epoch", ylabel="accuracy in validation, %", title="Accuracy of each exit during training")
    axes.margins(y=0.1)
    hide_frame(axes)
    legend_below(figure, axes, columns=4)
    save(figure, file)
