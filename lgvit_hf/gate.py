"""The harm gate: how likely it is that exiting here loses an answer that the full model would give rightly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .exit_policy import (
    ExitPolicy,
    Memory,
    Numbers,
    check_count,
    check_exits,
    check_numbers,
    number_at,
    probabilities,
    register_policy,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OWN_FEATURES = ("top_probability", "margin", "entropy", "logsumexp", "largest_logit")
# of each of the evaluated exits before, the nearest first
EARLIER_FEATURES = ("top_probability", "agrees", "probability_of_this_label")
NUM_EARLIER = 3
# stands in the memory for an exit that was not evaluated
_UNKNOWN = -1.0
# rows: largest and second probability, sum of p log p, log of the largest, largest logit; columns: OWN_FEATURES
FEATURES_OF_NUMBERS = np.array(
    [[1, 1, 0, 0, 0], [0, -1, 0, 0, 0], [0, 0, -1, 0, 0], [0, 0, 0, -1, 0], [0, 0, 0, 1, 1]]
)
_TINY = float(np.finfo(np.float32).tiny)


@register_policy("gate")
@dataclass(frozen=True)
class GatePolicy(ExitPolicy):
    """Exit where it is likely enough that nothing is lost: not (wrong here and right at the end).

    At each evaluated exit a logistic regression reads a few numbers of its logits and of those of up to three exits
    evaluated before; where fewer were evaluated, as under `min_depth`, the mean of the samples it was fitted on stands
    in. `fit_gate` fits it on a table, twice, each time on one half of the samples; the score is the mean of both.

    Args:
        threshold (`float` or list): In [0, 1]; one for all exits or one per exit.
        models (`list[dict]`):
            Of each of `exits`: `mean` and `scale` of its features, and `weights` and `bias` of both regressions.
        num_labels (`int`): Classes `C` of the model.
        exits (`list[int]`): Which exits are evaluated, by index from 0: those that the models were fitted with.
        temperature (`float` or list, *optional*, defaults to 1.0): Divides the logits.

    Example:

        >>> import torch
        >>> model = {"mean": [0.0] * 5, "scale": [1.0] * 5, "weights": [[0.0, 4.0, 0.0, 0.0, 0.0]] * 2}
        >>> gate = GatePolicy(0.9, exits=[0], models=[{**model, "bias": [0.0, 0.0]}], num_labels=2)
        >>> exits, memory = gate(torch.tensor([[0.0, 0.1], [9.0, 0.0]]), gate.start(2, "cpu"), 0)
        >>> exits.tolist(), round(memory["score"][1].item(), 3)
        ([False, True], 0.982)
    """

    threshold: Numbers
    models: Sequence[Mapping[str, Any]]
    num_labels: int
    exits: Sequence[int] = field(kw_only=True)
    temperature: Numbers = field(default=1.0, kw_only=True)

    problem_type = "single_label_classification"
    differs_by_exit = True
    # of features that are NaN the score is NaN, which is above no threshold
    nan_never_exits = True

    def __post_init__(self) -> None:
        check_numbers("threshold", self.threshold)
        check_numbers("temperature", self.temperature, positive=True)
        check_exits(self.exits)
        check_count("num_labels", self.num_labels, at_least=2)
        if not self.exits or list(self.exits) != sorted(self.exits):
            raise ValueError(f"exit_policy: exits={self.exits!r} must be at least one index, in ascending order")
        if not isinstance(self.models, Sequence) or len(self.models) != len(self.exits):
            raise ValueError(f"exit_policy: models must be one for each of the {len(self.exits)} exits")
        kept = self._kept()
        regressions = [_regression(place, model, kept) for place, model in enumerate(self.models)]
        object.__setattr__(self, "_regressions", regressions)

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """No exit evaluated: probabilities `[B, K, C]` of the last `K` exits, all unknown."""
        import torch

        kept = self._kept()
        shape = (batch_size, kept, self.num_labels)
        return {"probabilities": torch.full(shape, _UNKNOWN, device=device)} if kept else {}

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        """See `ExitPolicy`; the score is the probability that nothing is lost."""
        import torch

        if exit_index not in self.exits:
            # the final classifier loses nothing; of an exit that only `max_depth` makes answer nothing is known
            score = torch.full_like(logits[:, 0], float(self._is_final(exit_index)), dtype=torch.float32)
            return score > 2, {**memory, "score": score}
        if logits.shape[-1] != self.num_labels:
            raise ValueError(f"exit_policy: the gate is of {self.num_labels} labels, the logits of {logits.shape[-1]}")
        place = list(self.exits).index(exit_index)
        temperature = number_at(self.temperature, exit_index, 1.0)
        scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
        probs, earlier = probabilities(scaled), memory.get("probabilities")
        # of lists, which a trace takes as constants
        lists: list[list[Any]] = vars(self)["_regressions"][place]
        weights, bias, mean = (torch.tensor(each, dtype=torch.float32, device=logits.device) for each in lists)
        numbers = own_numbers(scaled, probs)
        if earlier is not None and place:
            numbers.append(earlier_features(probs, earlier, mean))
        # no matrix product, whose rounding may depend on the other samples of the batch
        # summed over the middle: OpenVINO 2026.4 adds another bias to sums over the last dimension
        score = torch.sigmoid((torch.cat(numbers, 1)[..., None] * weights).sum(1) + bias).mean(-1)
        after = {"score": score}
        if earlier is not None:
            after["probabilities"] = torch.cat([probs[:, None], earlier[:, :-1]], 1)
        return score > number_at(self.threshold, exit_index, math.inf), after

    def _kept(self) -> int:
        return min(NUM_EARLIER, len(self.exits) - 1)

    def _is_final(self, exit_index: int) -> bool:
        num_exits = len(self.threshold) if isinstance(self.threshold, Sequence) else max(self.exits) + 1
        return exit_index >= num_exits


def own_numbers(logits: Tensor, probs: Tensor) -> list[Tensor]:
    """What `OWN_FEATURES` are sums of, `[B, 5]` side by side, of logits `[B, C]` and their softmax.

    The features are these numbers times `FEATURES_OF_NUMBERS`, which the weights of a regression take in beforehand.
    """
    best = probs.topk(2, dim=-1).values
    # the smallest normal number stands in for a probability of 0, whose logarithm times 0 is NaN
    entropy = (probs * probs.clamp(min=_TINY).log()).sum(-1, keepdim=True)
    return [best, entropy, best[:, :1].log(), logits.amax(-1, keepdim=True)]


def earlier_features(probs: Tensor, earlier: Tensor, mean: Tensor) -> Tensor:
    """`EARLIER_FEATURES` of the `K` exits before, the nearest first, `[B, K * 3]`; `mean` where an exit is unknown.

    Args:
        probs (`Tensor`): `[B, C]`, of the exit that is judged.
        earlier (`Tensor`): `[B, K, C]`, below 0 where an exit was not evaluated, NaN where its logits were.
        mean (`Tensor`): `[K, 3]`.
    """
    import torch

    label = probs.argmax(-1, keepdim=True)[..., None].expand(-1, earlier.shape[1], 1)
    top, of_label = earlier.amax(-1, keepdim=True), earlier.gather(2, label)
    # an exit agrees where this label is its own: no other probability there is larger
    features = torch.cat([top, (of_label == top).float(), of_label], 2)
    return torch.where(top >= 0, features, mean).flatten(1)


def num_features(place: int) -> int:
    """Features of the regression of the exit that is evaluated as number `place`, from 0."""
    return len(OWN_FEATURES) + len(EARLIER_FEATURES) * min(NUM_EARLIER, place)


def _regression(place: int, model: Mapping[str, Any], kept: int) -> list[list[Any]]:
    """For `own_numbers` and the features of `kept` earlier exits: weights `[F, 2]`, bias `[2]`, mean `[kept, 3]`."""
    length, names = num_features(place), ("mean", "scale", "weights", "bias")
    wanted = [(length,), (length,), (2, length), (2,)]
    try:
        mean, scale, weights, bias = (np.array(model[name], dtype=np.float64) for name in names)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"exit_policy: models[{place}] must hold numbers: {', '.join(names)} ({error})") from error
    shapes = [each.shape for each in (mean, scale, weights, bias)]
    if shapes != wanted:
        raise ValueError(
            f"exit_policy: models[{place}]: shapes {shapes} of {', '.join(names)} must be {wanted} for exit number "
            f"{place} of those that are evaluated"
        )
    if not all(np.isfinite(each).all() for each in (mean, scale, weights, bias)) or (scale <= 0).any():
        raise ValueError(f"exit_policy: models[{place}] must hold finite numbers, and a scale above 0")
    folded = weights / scale
    bias, own = bias - folded @ mean, len(OWN_FEATURES)
    parts = [folded[:, :own] @ FEATURES_OF_NUMBERS.T, folded[:, own:]]
    # of the first exits fewer were evaluated before than are kept: those have no weight
    width = len(EARLIER_FEATURES) * kept if place else 0
    unused = own + width - length
    padded = np.pad(np.concatenate(parts, 1), [(0, 0), (0, unused)])
    means = np.pad(mean[own:], (0, unused)).reshape(-1, len(EARLIER_FEATURES))
    return [each.tolist() for each in (padded.T, bias, means)]
