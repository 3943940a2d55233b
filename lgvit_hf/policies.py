"""Exit policies: when does a sample exit? Small, per sample, with their memory passed in and out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .exit_policy import (
    LEGACY_ALIASES,
    POLICIES,
    CustomPolicy,
    ExitPolicy,
    Memory,
    Numbers,
    _is_count,
    build_policy,
    check_count,
    check_exits,
    check_numbers,
    check_problem,
    default_policy,
    entropy,
    following_default,
    margin,
    number_at,
    probabilities,
    problem_of,
    register_policy,
)
from .gate import GatePolicy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# the contract is imported from here, so that what this file registers is there
__all__ = [
    "build_policy",
    "CalibratedConfidencePolicy",
    "check_problem",
    "ConfidenceEntropyPolicy",
    "ConfidencePolicy",
    "CustomPolicy",
    "default_policy",
    "entropy",
    "EntropyPolicy",
    "ExitPolicy",
    "FixedPolicy",
    "following_default",
    "GatePolicy",
    "LabelConfidencePolicy",
    "margin",
    "MarginPolicy",
    "Memory",
    "NeverPolicy",
    "number_at",
    "Numbers",
    "PatienceConfidencePolicy",
    "PatiencePolicy",
    "POLICIES",
    "probabilities",
    "problem_of",
    "register_policy",
    "LEGACY_ALIASES",
]


@dataclass(frozen=True)
class _ThresholdPolicy(ExitPolicy):
    """Shared by the policies that compare one score of the softmax with a threshold."""

    threshold: Numbers
    temperature: Numbers = field(default=1.0, kw_only=True)

    # no comparison with NaN is true
    nan_never_exits = True
    problem_type = "single_label_classification"

    def __post_init__(self) -> None:
        check_numbers("threshold", self.threshold)
        check_numbers("temperature", self.temperature, positive=True)

    def probabilities(self, logits: Tensor, exit_index: int) -> Tensor:
        return probabilities(logits, number_at(self.temperature, exit_index, 1.0))


@register_policy("confidence")
@dataclass(frozen=True)
class ConfidencePolicy(_ThresholdPolicy):
    """Exit where the largest probability is above `threshold`.

    Args:
        threshold (`float` or list): In [0, 1]; one for all exits or one per exit.
        temperature (`float` or list, *optional*, defaults to 1.0): Divides the logits.

    Example:

        >>> import torch
        >>> policy = ConfidencePolicy(threshold=[0.9, 0.6])
        >>> logits = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
        >>> policy(logits, {}, exit_index=0)[0].tolist(), policy(logits, {}, exit_index=1)[0].tolist()
        ([False, True], [True, True])
    """

    def skips(self, exit_index: int) -> bool:
        """No probability is above 1."""
        return number_at(self.threshold, exit_index, math.inf) >= 1

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        score = self.probabilities(logits, exit_index).amax(-1)
        return score > number_at(self.threshold, exit_index, math.inf), {"score": score}


@register_policy("entropy")
@dataclass(frozen=True)
class EntropyPolicy(_ThresholdPolicy):
    """Exit where the entropy of the prediction is below `threshold` nats (DeeBERT, https://arxiv.org/abs/2004.12993).

    Example:

        >>> import torch
        >>> EntropyPolicy(threshold=0.5)(torch.tensor([[0.0, 0.0], [5.0, 0.0]]), {})[0].tolist()
        [False, True]
    """

    out_of_reach = -math.inf

    def skips(self, exit_index: int) -> bool:
        """No entropy is below 0."""
        return number_at(self.threshold, exit_index, -math.inf) <= 0

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        score = entropy(self.probabilities(logits, exit_index))
        return score < number_at(self.threshold, exit_index, -math.inf), {"score": score}


@register_policy("margin")
@dataclass(frozen=True)
class MarginPolicy(_ThresholdPolicy):
    """Exit where the two largest probabilities lie further apart than `threshold`.

    Example:

        >>> import torch
        >>> MarginPolicy(threshold=0.5)(torch.tensor([[0.0, 0.0], [5.0, 0.0]]), {})[0].tolist()
        [False, True]
    """

    def skips(self, exit_index: int) -> bool:
        """No probability is above 1."""
        return number_at(self.threshold, exit_index, math.inf) >= 1

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        score = margin(self.probabilities(logits, exit_index))
        return score > number_at(self.threshold, exit_index, math.inf), {"score": score}


@register_policy("confidence_entropy")
@dataclass(frozen=True)
class ConfidenceEntropyPolicy(_ThresholdPolicy):
    """Exit where the largest probability is above `threshold` and the entropy below `entropy_threshold` nats.

    The score of a sample is its largest probability.

    Example:

        >>> import torch
        >>> policy = ConfidenceEntropyPolicy(threshold=0.5, entropy_threshold=0.1)
        >>> policy(torch.tensor([[2.0, 0.0], [5.0, 0.0]]), {})[0].tolist()
        [False, True]
    """

    entropy_threshold: Numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("entropy_threshold", self.entropy_threshold)

    def skips(self, exit_index: int) -> bool:
        """No probability is above 1, no entropy below 0."""
        never_confident = number_at(self.threshold, exit_index, math.inf) >= 1
        return never_confident or number_at(self.entropy_threshold, exit_index, -math.inf) <= 0

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        probs = self.probabilities(logits, exit_index)
        score = probs.amax(-1)
        confident = score > number_at(self.threshold, exit_index, math.inf)
        return confident & (entropy(probs) < number_at(self.entropy_threshold, exit_index, -math.inf)), {
            "score": score
        }


@register_policy("calibrated_confidence")
@dataclass(frozen=True)
class CalibratedConfidencePolicy(_ThresholdPolicy):
    """Exit where samples of this confidence were answered rightly more often than `threshold` (PCEE).

    Performance Control in Early Exiting (https://arxiv.org/abs/2412.19325): one accuracy for all exits, which each
    exit's reliability diagram turns into confidences. The score of a sample is the accuracy of its bin.

    Args:
        threshold (`float` or list): Accuracy, in [0, 1]; one for all exits or one per exit.
        edges (`list[list[float]]`): Of each exit, the confidences between `K` bins, ascending, `K - 1` numbers.
        accuracies (`list[list[float]]`): Of each exit, the accuracy of its `K` bins.
        temperature (`float` or list, *optional*, defaults to 1.0): Divides the logits.

    Example:

        >>> import torch
        >>> policy = CalibratedConfidencePolicy(0.9, edges=[[0.8]], accuracies=[[0.6, 0.95]])
        >>> policy(torch.tensor([[1.0, 0.0], [5.0, 0.0]]), {})[0].tolist()
        [False, True]
    """

    edges: Sequence[Sequence[float]]
    accuracies: Sequence[Sequence[float]]

    differs_by_exit = True
    per_exit = ("threshold", "temperature", "edges", "accuracies")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.edges) != len(self.accuracies):
            raise ValueError(f"exit_policy: edges of {len(self.edges)} exits, accuracies of {len(self.accuracies)}")
        for index, (edges, accuracies) in enumerate(zip(self.edges, self.accuracies, strict=True)):
            check_numbers(f"edges[{index}]", edges)
            check_numbers(f"accuracies[{index}]", accuracies)
            if len(accuracies) != len(edges) + 1 or sorted(edges) != list(edges):
                raise ValueError(
                    f"exit_policy: edges[{index}] must be {len(accuracies) - 1} ascending numbers between the "
                    f"{len(accuracies)} bins of accuracies[{index}]"
                )

    def check(self, num_exits: int) -> None:
        """There must be bins for each exit."""
        if len(self.edges) != num_exits:
            raise ValueError(f"exit_policy: edges of {len(self.edges)} exits, but the model has {num_exits}")
        super().check(num_exits)

    def skips(self, exit_index: int) -> bool:
        """No bin of this exit is more accurate; the final classifier has none."""
        bins = self.accuracies[exit_index] if exit_index < len(self.accuracies) else []
        return number_at(self.threshold, exit_index, math.inf) >= max(bins, default=-math.inf)

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        confidence = self.probabilities(logits, exit_index).amax(-1)
        if exit_index >= len(self.edges):
            return confidence > math.inf, {"score": confidence}  # the final classifier has no bins
        edges, accuracies = (confidence.new_tensor(numbers[exit_index]) for numbers in (self.edges, self.accuracies))
        # a sum of steps: a quantizer would turn a table that is looked up into integers
        score = accuracies[:1] + ((confidence[:, None] > edges) * accuracies.diff()).sum(-1)
        return (score > number_at(self.threshold, exit_index, math.inf)) & ~confidence.isnan(), {"score": score}


@register_policy("label_confidence")
@dataclass(frozen=True)
class LabelConfidencePolicy(_ThresholdPolicy):
    """For several labels at once: exit where the confidence of each is above `threshold`.

    The confidence of a label is the larger of its sigmoid probability and one minus it; the score of a sample is that
    of its least confident label.

    Args:
        threshold (`float` or list): In [0.5, 1]; one for all exits or one per exit.
        temperature (`float` or list, *optional*, defaults to 1.0): Divides the logits.

    Example:

        >>> import torch
        >>> policy = LabelConfidencePolicy(threshold=0.9)
        >>> policy(torch.tensor([[5.0, 5.0, -5.0], [5.0, 0.0, -5.0]]), {})[0].tolist()
        [True, False]
    """

    problem_type = "multi_label_classification"

    def skips(self, exit_index: int) -> bool:
        """No probability is above 1."""
        return number_at(self.threshold, exit_index, math.inf) >= 1

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        scaled = logits.float() / number_at(self.temperature, exit_index, 1.0)
        score = scaled.abs().sigmoid().amin(-1)
        confident = score > number_at(self.threshold, exit_index, math.inf)
        # not every runtime's minimum passes NaN on
        return confident & ~logits.isnan().any(-1), {"score": score}


@register_policy("patience")
@dataclass(frozen=True)
class PatiencePolicy(ExitPolicy):
    """Exit once `patience` exits in a row agree on the label (PABEE, https://arxiv.org/abs/2006.04152).

    The first exit counts 1; a sample with NaN agrees with nothing. The score of a sample is its count.

    Args:
        patience (`int`): How many agreeing exits in a row are enough.
        exits (`list[int]`, *optional*): Which exits are evaluated, by index from 0; all by default.

    Example:

        >>> import torch
        >>> policy = PatiencePolicy(patience=2)
        >>> memory = policy.start(batch_size=2, device="cpu")
        >>> exits, memory = policy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), memory)
        >>> exits, memory = policy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), memory)
        >>> exits.tolist()
        [True, False]
    """

    patience: int
    exits: Sequence[int] | None = field(default=None, kw_only=True)

    nan_never_exits = True
    problem_type = "single_label_classification"

    def __post_init__(self) -> None:
        check_count("patience", self.patience)
        check_exits(self.exits)

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """No label seen, nothing counted."""
        import torch

        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return {"label": zeros - 1, "score": zeros.float()}

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        label = logits.argmax(-1)
        streak = (memory["score"] + 1).masked_fill(label != memory["label"], 1.0)
        unknown = logits.isnan().any(-1)
        memory = {"label": label.masked_fill(unknown, -1), "score": streak.masked_fill(unknown, 0.0)}
        return memory["score"] >= self.patience, memory


@register_policy("patience_confidence")
@dataclass(frozen=True)
class PatienceConfidencePolicy(_ThresholdPolicy):
    """Exit once the entropy was below `threshold` nats at `patience` exits in a row (PCEE).

    The score of a sample is the number of such exits.

    Args:
        threshold (`float` or list): In nats; one for all exits or one per exit.
        patience (`int`): How many such exits in a row are enough.
        exits (`list[int]`, *optional*): Which exits are evaluated, by index from 0; all by default.
        temperature (`float` or list, *optional*, defaults to 1.0): Divides the logits.

    Example:

        >>> import torch
        >>> policy = PatienceConfidencePolicy(threshold=0.5, patience=2)
        >>> memory = policy.start(batch_size=1, device="cpu")
        >>> exits, memory = policy(torch.tensor([[5.0, 0.0]]), memory)
        >>> policy(torch.tensor([[5.0, 0.0]]), memory)[0].tolist()
        [True]
    """

    patience: int
    exits: Sequence[int] | None = field(default=None, kw_only=True)
    out_of_reach = -math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("patience", self.patience)
        check_exits(self.exits)

    def start(self, batch_size: int, device: torch.device | str) -> Memory:
        """Nothing counted."""
        import torch

        return {"score": torch.zeros(batch_size, device=device)}

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        # the final classifier has no threshold of its own, and counts by the last one
        last = [-math.inf, *self.threshold][-1] if isinstance(self.threshold, Sequence) else self.threshold
        confident = entropy(self.probabilities(logits, exit_index)) < number_at(self.threshold, exit_index, last)
        score = (memory["score"] + 1).masked_fill(~confident, 0.0)
        return score >= self.patience, {"score": score}


@register_policy("fixed")
@dataclass(frozen=True)
class FixedPolicy(ExitPolicy):
    """Every sample exits at one exit; no other head is run.

    Args:
        exit_index (`int`): Which exit, from 0; the number of exits stands for the final classifier.

    Example:

        >>> import torch
        >>> FixedPolicy(exit_index=1)(torch.zeros(2, 3), {}, exit_index=1)[0].tolist()
        [True, True]
    """

    exit_index: int

    def __post_init__(self) -> None:
        if not _is_count(self.exit_index, 0):
            raise ValueError(f"exit_policy: exit_index={self.exit_index!r} must be an integer, from 0")

    def check(self, num_exits: int) -> None:
        """The exit must exist."""
        if self.exit_index > num_exits:
            raise ValueError(
                f"exit_policy: exit_index={self.exit_index} is outside 0..{num_exits} (the final is {num_exits})"
            )

    def skips(self, exit_index: int) -> bool:
        """Shallower exits are not run."""
        return exit_index < self.exit_index

    def with_exits(self, exits: Sequence[int], num_exits: int) -> FixedPolicy:
        """See `ExitPolicy`; deeper exits may go too."""
        if self.exit_index not in [*exits, num_exits]:
            raise ValueError(f"exits={list(exits)}: the policy 'fixed' evaluates exit {self.exit_index}; leave it in")
        return FixedPolicy([*exits, num_exits].index(self.exit_index))

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        import torch

        # at a deeper one where `min_depth` forbids this
        exits = torch.full((logits.shape[0],), exit_index >= self.exit_index, device=logits.device)
        return exits, {"score": probabilities(logits).amax(-1)}


@register_policy("never")
@dataclass(frozen=True)
class NeverPolicy(ExitPolicy):
    """No sample exits early: the plain backbone, without a head being run.

    Example:

        >>> import torch
        >>> NeverPolicy()(torch.zeros(2, 3), {})[0].tolist()
        [False, False]
    """

    def skips(self, exit_index: int) -> bool:
        """No exit is run."""
        return True

    def __call__(self, logits: Tensor, memory: Memory, exit_index: int = 0) -> tuple[Tensor, Memory]:
        import torch

        exits = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
        return exits, {"score": probabilities(logits).amax(-1)}
