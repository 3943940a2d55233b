"""Which exits are worth their cost, and one threshold for them: chosen on a table of exits that were trained alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.batches import to_model
from ..policies import ConfidencePolicy, probabilities
from .cost_table import cost_table, time_walks
from .costs import Costs, Highway
from .exit_table import is_right
from .search import without_one


@dataclass(frozen=True)
class Choice:
    """Which candidates stay, and when samples exit.

    Args:
        exits (`tuple[int, ...]`): Indices of the candidates that stay.
        threshold (`float`): Confidence above which a sample exits, at all of them.
        drop (`float`): Of the accuracy, on the samples chosen on.
        cost (`float`): Mean cost of a sample, the full model's being 1.
    """

    exits: tuple[int, ...]
    threshold: float
    drop: float
    cost: float


def answer_worth(logits: Tensor, labels: Tensor | None) -> Tensor:
    """What every exit's answer to every sample is worth, `[E + 1, N]`: 1 or 0 by the labels.

    Without labels, the probability that the full model gives to that answer. The mean difference to the full model's
    own answers is then the expected drop of accuracy, exact if the full model is calibrated.

    Args:
        logits (`Tensor`): `[E + 1, N, C]`, the full model last.
        labels (`Tensor`, *optional*): `[N]`.

    Example:

        >>> logits = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> answer_worth(logits, torch.tensor([1])).tolist(), answer_worth(logits, None).tolist()
        ([[0.0], [1.0]], [[0.119...], [0.880...]])
    """
    return is_right(logits, probabilities(logits[-1]) if labels is None else labels).float()


def choose_exits(logits: Tensor, worth: Tensor, costs: Costs, max_drop: float) -> Choice:
    """The exits and the threshold of least mean cost whose drop stays within `max_drop`.

    From all candidates, the one whose removal makes the best threshold's cost least is taken away, again and again
    down to the last; of the choices on the way, that with fewest exits within 1 % of the cheapest wins. Evaluating a
    head is paid for by every sample that gets there, so that an exit where few exit, or too close behind another,
    goes.

    Args:
        logits (`Tensor`): `[E + 1, N, C]`, the full model last.
        worth (`Tensor`): `[E + 1, N]`, of each answer, as of `answer_worth`.
        costs (`Costs`): Of one sample, the full model's being 1.
        max_drop (`float`): Largest mean difference of the full model's worth and the early answers'.

    Raises:
        ValueError: Nothing within that drop is cheaper than the full model.

    Example:

        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 1.0]], [[9.0, 0.0], [9.0, 0.0]]])
        >>> choice = choose_exits(logits, answer_worth(logits, None), Costs([0.2, 0.7], [0.1, 0.1]), 0.01)
        >>> choice.exits, 0.73 < choice.threshold < 1, round(choice.cost, 2)
        ((0,), True, 0.7)
    """
    scores = probabilities(logits[:-1]).amax(-1)
    path = [_best_threshold(tuple(range(len(scores))), scores, worth, costs, max_drop)]
    while len(path[-1].exits) > 1:
        smaller = without_one(path[-1].exits)
        choices = [_best_threshold(exits, scores, worth, costs, max_drop) for exits in smaller]
        path.append(min(choices, key=lambda choice: choice.cost))
    least = min(choice.cost for choice in path)
    if least >= 1:
        raise ValueError(
            f"no exit is cheaper than the full model within an accuracy drop of {max_drop:g}; allow more with "
            "max_accuracy_drop, or give more images"
        )
    # an exit that gains less than the costs are known to is one more to keep and to run
    return [choice for choice in path if choice.cost <= 1.01 * least][-1]


def _best_threshold(exits: tuple[int, ...], scores: Tensor, worth: Tensor, costs: Costs, max_drop: float) -> Choice:
    """The threshold of least cost within `max_drop` for some exits; of infinite cost if there is none."""
    # a sample exits at the first exit whose score, and so the highest score so far, is above the threshold
    highest = scores[list(exits)].cummax(0).values.T.contiguous()
    candidates: Tensor = torch.unique(highest)
    candidates = ((candidates[1:] + candidates[:-1]) / 2)[:: max(1, len(candidates) // 300)]
    candidates = torch.cat([candidates, candidates.new_ones(1)])
    exit_index = torch.searchsorted(highest, candidates.expand(len(highest), -1).contiguous(), right=True)
    cost = torch.tensor([costs.of_exit(index, exits) for index in (*exits, len(scores))])[exit_index].mean(0)
    drop = worth[-1].mean() - worth[[*exits, -1]].T.gather(1, exit_index).mean(0)
    cost = cost.masked_fill(drop > max_drop, torch.inf)
    best = int(cost.argmin())
    return Choice(exits, candidates[best].item(), drop[best].item(), cost[best].item())


def measured_costs(model: Highway, pixels: Tensor, *, repeats: int = 15) -> Costs:
    """Wall-clock of each segment's blocks, and of evaluating its head and the policy, the full model's being 1.

    The mean of two batch sizes: one image, where each operation of a head costs about as much as one of a block, and
    all of `pixels` `[B, C, H, W]`, where the arithmetic counts.
    """
    sizes, policy = sorted({1, len(pixels)}), ConfidencePolicy(threshold=1.0)
    table = cost_table(model, time_walks(model.segments(), policy, to_model(pixels, model), sizes, repeats))
    both = [relative(table.at(size)) for size in sizes]
    backbone_costs = np.mean([costs.backbone_costs for costs in both], axis=0).tolist()
    return Costs(backbone_costs, np.mean([costs.heads for costs in both], axis=0).tolist())


def relative(costs: Costs) -> Costs:
    """The same costs, the full model's being 1."""
    full = costs.backbone
    return Costs([cost / full for cost in costs.backbone_costs], [cost / full for cost in costs.heads])
