"""The running ensemble: every answer is the weighted mean of the log-probabilities of the exits evaluated so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exit_policy import ExitPolicy, Memory

# of a log-probability: a class that one exit calls impossible stays comparable, and nothing becomes NaN
_LOWEST = -1e30
_FIELDS = ("weights", "bias")
# in the memory of a policy: what the sums over the evaluated exits are called
_SUM, _WEIGHT = "ensemble_sum", "ensemble_weight"


@dataclass(frozen=True)
class Ensemble:
    """The geometric mean of the exits evaluated so far, one weight per exit and one bias per class.

    As in Zero Time Waste (https://arxiv.org/abs/2106.05409), but renormalised, so that exits may be skipped.
    At each exit the answer is `sum(w_j * log p_j) / sum(w_j) + bias` over the exits `j` evaluated so far, this one
    included: the weights are divided by their sum, the bias is added once, after that. An exit whose logits give no
    probabilities (NaN, or `+inf`) is left out, and no sample exits there; where nothing with a weight was evaluated,
    the exit's own logits stand.

    Args:
        weights (`list[float]`): Of each exit, the final classifier last; not negative, not all 0.
        bias (`list[float]`): Of each class.

    Raises:
        ValueError: Naming the field, its value and what it may be.

    Example:

        >>> ensemble = Ensemble(weights=[1.0, 3.0], bias=[0.0, 0.0])
        >>> memory = ensemble.start(1, "cpu")
        >>> for index, logits in enumerate([[2.0, 0.0], [0.0, 2.0]]):
        ...     answer, _, memory = ensemble.combine(torch.tensor([logits]), memory, index)
        >>> round((answer[0, 1] - answer[0, 0]).item(), 4)  # (-2 + 3 * 2) / 4
        1.0
    """

    weights: Sequence[float]
    bias: Sequence[float]

    def __post_init__(self) -> None:
        for name in _FIELDS:
            numbers = getattr(self, name)
            is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
            if not is_list or not numbers or not all(map(_is_finite, numbers)):
                raise ValueError(f"exit_ensemble: {name}={numbers!r} must be a list of finite numbers")
        if min(self.weights) < 0 or max(self.weights) == 0:
            raise ValueError(f"exit_ensemble: weights={list(self.weights)} must be 0 or more, and not all 0")
        # only their ratios count: sums of any number of them stay finite
        largest = max(self.weights)
        object.__setattr__(self, "_weights", [weight / largest for weight in self.weights])
        object.__setattr__(self, "_biases", {torch.device("cpu"): torch.tensor(self.bias, dtype=torch.float32)})

    def check(self, num_exits: int, num_labels: int) -> None:
        """Raise `ValueError` where it is of another number of exits, the final classifier counted, or of classes."""
        for name, wanted, what in (
            ("weights", num_exits, "exits, the final classifier counted"),
            ("bias", num_labels, "classes"),
        ):
            if len(getattr(self, name)) != wanted:
                raise ValueError(
                    f"exit_ensemble: {name} of {len(getattr(self, name))} {what}, but there are {wanted}; fit it anew "
                    "with fit_ensemble, or leave it out with exit_ensemble=None"
                )

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """No exit evaluated: the sums of the weighted log-probabilities `[B, C]` and of the weights `[B]`."""
        return {
            _SUM: torch.zeros(batch_size, len(self.bias), device=device),
            _WEIGHT: torch.zeros(batch_size, device=device),
        }

    def combine(self, logits: Tensor, memory: Memory, exit_index: int) -> tuple[Tensor, Tensor, Memory]:
        """Take one more exit in.

        Args:
            logits (`Tensor`): `[B, C]`, of the exit just run.
            memory (`dict[str, Tensor]`): As `start` or this gave it for these samples; other entries are ignored.
            exit_index (`int`): Which exit this is, from 0.

        Returns:
            The ensemble's logits `[B, C]` float32, which samples' logits gave probabilities `[B]`, and the new memory.
        """
        weight: float = vars(self)["_weights"][exit_index]
        log_probs = torch.log_softmax(logits.float(), -1)
        known = ~log_probs.isnan().any(-1)
        total, share = memory[_SUM], memory[_WEIGHT]
        total = total + torch.where(known[:, None], weight * log_probs.clamp_min(_LOWEST), 0.0)
        share = share + torch.where(known, weight, 0.0)
        is_some = share > 0
        mean = total / torch.where(is_some, share, 1.0)[:, None]
        answer = torch.where(is_some[:, None], mean + self._bias_on(logits.device), logits.float())
        return answer, known, {_SUM: total, _WEIGHT: share}

    def _bias_on(self, device: torch.device) -> Tensor:
        biases: dict[torch.device, Tensor] = vars(self)["_biases"]
        if device not in biases:
            biases[device] = biases[torch.device("cpu")].to(device)
        return biases[device]


@dataclass(frozen=True)
class EnsemblePolicy(ExitPolicy):
    """A policy that sees the ensemble's logits, with which samples that exit are answered.

    Args:
        policy (`ExitPolicy`): Decides which samples exit.
        ensemble (`Ensemble`): What it sees.
    """

    policy: ExitPolicy
    ensemble: Ensemble

    name = "ensemble"
    nan_never_exits = True
    differs_by_exit = True
    problem_type = "single_label_classification"

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """The memory of both."""
        return {**self.policy.start(batch_size, device), **self.ensemble.start(batch_size, device)}

    def skips(self, exit_index: int) -> bool:
        """As the policy: what is not evaluated is not in the ensemble."""
        return self.policy.skips(exit_index)

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        """See `ExitPolicy`; the entry `answer` of the memory is what samples that exit are answered with."""
        answer, known, sums = self.ensemble.combine(logits, memory, exit_index)
        own = {name: tensor for name, tensor in memory.items() if name not in (*sums, "answer")}
        exits, after = self.policy(answer, own, exit_index)
        return exits & known, {**after, **sums, "answer": answer}


def parts_of(policy: ExitPolicy) -> tuple[ExitPolicy, Ensemble | None]:
    """What decides, and the ensemble that it sees, if any."""
    return (policy.policy, policy.ensemble) if isinstance(policy, EnsemblePolicy) else (policy, None)


def build_ensemble(settings: Mapping[str, Any], num_exits: int, num_labels: int) -> Ensemble:
    """A checked ensemble from its JSON form `{"weights": [...], "bias": [...]}`.

    Args:
        settings (`dict`): As `fit_ensemble` gives it.
        num_exits (`int`): Of the highway, the final classifier counted.
        num_labels (`int`): Classes of the logits.

    Raises:
        ValueError: A field is missing, unknown or of another length, or a number that cannot be.

    Example:

        >>> build_ensemble({"weights": [1, 4, 9], "bias": [0, 0]}, num_exits=2, num_labels=2)
        Traceback (most recent call last):
        ...
        ValueError: exit_ensemble: weights of 3 exits, the final classifier counted, but there are 2; fit it anew ...
    """
    if not isinstance(settings, Mapping) or set(settings) != set(_FIELDS):
        raise ValueError(f"exit_ensemble: {settings!r} must be a dict with the lists {' and '.join(_FIELDS)}")
    ensemble = Ensemble(settings["weights"], settings["bias"])
    ensemble.check(num_exits, num_labels)
    return ensemble


def with_ensemble(
    policy: ExitPolicy, settings: Mapping[str, Any] | None, num_exits: int, num_labels: int
) -> ExitPolicy:
    """A policy that decides on, and answers with, the running ensemble; as it is where `settings` are `None`.

    Args:
        policy (`ExitPolicy`): Decides which samples exit.
        settings (`dict`, *optional*), num_exits (`int`), num_labels (`int`): See `build_ensemble`.
    """
    return policy if settings is None else EnsemblePolicy(policy, build_ensemble(settings, num_exits, num_labels))


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
