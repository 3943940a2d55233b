"""An exported folder against the model it comes from, in ONNX Runtime and PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Samples, in_batches
from ..engine import Answers, run_all, run_early
from ..evaluation.exit_table import ExitTable
from ..hub.loading import example_image
from ..modeling_highway import HighwayMixin
from ..policies import ExitPolicy, build_policy
from ..runtimes.exported import ExportedHighway
from ..runtimes.manifest import exits_that_run
from ..runtimes.onnxruntime import ORTHighway
from ..segments import State
from .segment_graphs import EXPORTABLE

BATCH_SIZES = (1, 2, 7, 32)
TOLERANCE = 1e-4
ROUNDING = 1e-5


def verify(model: HighwayMixin, folder: str | Path) -> dict[str, Any]:
    """Run an exported folder against its model, as `verify_answers` does.

    Files of less than float32 precision may differ by more, and only have to give numbers: `compare` says what they
    are worth.
    """
    exported = ORTHighway.from_pretrained(folder)

    def answer(policy: ExitPolicy, images: Tensor) -> Any:
        exported.set_exit_policy(policy)
        return exported(images)

    manifest = exported.manifest
    return verify_answers(
        model,
        manifest.exits,
        answer,
        "the export does not answer",
        is_exact=manifest.precision == "float32",
        is_adjustable=manifest.thresholds != "fixed",
    )


@torch.no_grad()
def verify_answers(
    model: HighwayMixin,
    exits: list[int],
    answer: Callable[[ExitPolicy, Tensor], Any],
    complaint: str,
    *,
    is_exact: bool = True,
    is_adjustable: bool = True,
) -> dict[str, Any]:
    """Run what was made of a model against it: every exit forced, mixed batches, and batches of 1, 2, 7 and 32.

    Samples with a score within 1e-5 of its threshold may exit elsewhere.

    Args:
        model (`HighwayMixin`): A highway, in `eval()` mode.
        exits (`list[int]`): Indices of the evaluated exits.
        answer (`Callable`): `logits`, `exit_index` and `exit_layer` under a policy for images `[B, C, H, W]`.
        complaint (`str`): Beginning of the error, up to "as the model does".
        is_exact (`bool`, *optional*, defaults to `True`): Otherwise the answers only have to be numbers.
        is_adjustable (`bool`, *optional*, defaults to `True`): Otherwise only the model's own policy is tried.

    Returns:
        `batch_sizes`, and the `largest_difference` of logits of samples with the same exit.

    Raises:
        ValueError: Logits differ by more than 1e-4 of the largest, or a sample exits elsewhere; with the numbers.
    """
    largest = 0.0
    for trial in trials(model, exits):
        if not is_adjustable and trial.policy is not model.exit_policy:
            continue
        found, expected = answer(trial.policy, trial.images), trial.expected
        elsewhere = (found.exit_index != expected.exit_index) | (found.exit_layer != expected.exit_layer)
        # not where rounding decides; and NaN is larger than any difference
        compared = ~trial.undecided if is_exact else ~elsewhere
        difference = torch.where(compared, (found.logits - expected.logits).abs().amax(-1), 0.0).max().item()
        wrong = bool((elsewhere & compared).any()) or not difference <= TOLERANCE * trial.scale
        if wrong if is_exact else not found.logits.isfinite().all():
            raise ValueError(
                f"{complaint} as the model does: of a batch of {len(elsewhere)} under {trial.policy}, "
                f"{int((elsewhere & compared).sum())} samples exit elsewhere, and logits differ by {difference:.2g} "
                f"(largest {trial.scale:.2g}); nothing was written"
            )
        largest = max(largest, difference)
    return {"batch_sizes": list(BATCH_SIZES), "largest_difference": largest}


@dataclass(frozen=True)
class Trial:
    """A batch, the policy under which it runs, and what comes of it in PyTorch.

    Args:
        policy (`ExitPolicy`): The model's own, or one of its name with other numbers.
        images (`Tensor`): `[B, C, H, W]`.
        expected (`Answers`): Of the model.
        undecided (`Tensor`): `[B]` bool: samples that exit elsewhere if rounding wants so.
        scale (`float`): The largest logit of any exit, and at least 1.
    """

    policy: ExitPolicy
    images: Tensor
    expected: Answers
    undecided: Tensor
    scale: float


def trials(model: HighwayMixin, exits: list[int]) -> Iterator[Trial]:
    """Every exit forced, mixed exits, no early exit, and the model's policy as it is, in batches of several sizes.

    Every exit of the model is run once, and policies are replayed on that; its own runs early in PyTorch too. Where
    all samples take one path, the largest batch is left out: a small one shows the same.

    Args:
        model (`HighwayMixin`): A highway, in `eval()` mode.
        exits (`list[int]`): Indices of the evaluated exits.
    """
    images = example_image(model, batch_size=max(BATCH_SIZES))
    segments, num_policy_exits = model.segments(), len(model.config.exit_positions)
    exit_logits = torch.stack(run_all(segments, State({"pixel_values": images})))
    depths = [segment.depth for segment in segments]
    scale = max(1.0, exit_logits.abs().max().item())
    table = ExitTable(exit_logits, exit_logits[-1].argmax(-1), depths, ensemble=model.config.exit_ensemble)
    for settings in policies_to_try(model, exits, table.policy_logits(exits)):
        policy, is_own = build_policy(settings, num_policy_exits), not isinstance(settings, dict)
        if table.ensemble is not None and not is_own and exits_that_run(policy, len(depths)) != exits:
            continue  # the files have the ensemble of these exits
        undecided = undecided_samples(policy, exit_logits, depths, num_policy_exits, table.ensemble)
        is_mixed = len(table.replay(policy).exit_index.unique()) > 1
        for size in BATCH_SIZES if is_own or is_mixed else BATCH_SIZES[:-1]:
            batch = images[:size]
            if is_own:
                expected = run_early(segments, State({"pixel_values": batch}), model.answering_policy)
            else:
                expected = table.select(torch.arange(size)).replay(policy)
            yield Trial(policy, batch, expected, undecided[:size], scale)


@torch.no_grad()
def compare(
    model: HighwayMixin, exported: ExportedHighway, images: Samples, max_accuracy_drop: float, *, batch_size: int = 64
) -> dict[str, float]:
    """What an export is worth on real images, both with early exits under their policies.

    Args:
        model (`HighwayMixin`): What was exported.
        exported (`ExportedHighway`): The export.
        images (`Dataset`): Items `pixel_values` and perhaps `labels`; otherwise the model's answers stand for them.
        max_accuracy_drop (`float`): Share of the samples by which the export may be right less often than the model.
        batch_size (`int`, *optional*, defaults to 64): Samples at a time.

    Returns:
        `rows`, `accuracy`, `accuracy_of_model`, `agreement` of the answers, `mean_depth`, `mean_depth_of_model`.

    Raises:
        ValueError: There is no image, or the accuracy drops by more.
    """
    sums: Counter[str] = Counter()
    for batch in in_batches(images, batch_size):
        ours, theirs = exported(batch["pixel_values"]), model(batch["pixel_values"].float())
        answers, expected = ours.logits.argmax(-1), theirs.logits.argmax(-1)
        labels = batch.get("labels", expected)
        sums.update(
            rows=len(answers),
            accuracy=int((answers == labels).sum()),
            accuracy_of_model=int((expected == labels).sum()),
            agreement=int((answers == expected).sum()),
            mean_depth=int(ours.exit_layer.sum()),
            mean_depth_of_model=int(theirs.exit_layer.sum()),
        )
    num_samples = sums.pop("rows", 0)
    if num_samples == 0:
        raise ValueError("there is no image to judge the export on: the dataset is empty")
    found = {"rows": num_samples, **{name: total / num_samples for name, total in sums.items()}}
    if found["accuracy_of_model"] - found["accuracy"] > max_accuracy_drop:
        raise ValueError(
            f"the {exported.manifest.precision} export is right on {found['accuracy']:.2%} of {num_samples} images, "
            f"the model on {found['accuracy_of_model']:.2%}: more than {max_accuracy_drop:.2%} lost; "
            "nothing was written"
        )
    return found


def policies_to_try(
    model: HighwayMixin, exits: list[int], exit_logits: Tensor
) -> Iterator[dict[str, Any] | ExitPolicy]:
    """The policy with which all samples exit at one exit, or at different ones; and as it is."""
    policy, num_policy_exits = model.exit_policy, len(model.config.exit_positions)
    indices, held = range(num_policy_exits), policy.to_dict() if policy.name in EXPORTABLE else {}
    if "patience" in held:
        for patience in range(1, num_policy_exits + 2):
            yield {**held, "patience": patience}
    if "threshold" in held:
        never, always = (-1.0, 1e6) if policy.name in ("entropy", "patience_confidence") else (2.0, -2.0)
        if model.config.exit_ensemble is not None:
            # evaluated, and so in the ensemble: 1 and 0 in float32, but not for `skips`
            never = {"entropy": 1e-300, "patience_confidence": -1.0}.get(policy.name, 1 - 1e-16)
        if "entropy_threshold" in held:
            held["entropy_threshold"] = [1e6] * num_policy_exits
        # with the last target, no sample exits early
        for target in exits:
            numbers = [always if index >= target and index in exits else never for index in indices]
            yield {**held, "threshold": numbers}
        if policy.name != "patience_confidence":
            judge = build_policy({**held, "threshold": 0.0}, num_policy_exits)
            size = exit_logits.shape[1]
            scores = [judge(exit_logits[index], judge.start(size, "cpu"), index)[1]["score"] for index in indices]
            yield {**held, "threshold": [between(scores[index]) if index in exits else never for index in indices]}
    yield policy


def undecided_samples(
    policy: ExitPolicy,
    exit_logits: Tensor,
    depths: list[int],
    num_policy_exits: int,
    ensemble: dict[str, Any] | None = None,
) -> Tensor:
    """Which samples exit elsewhere when every threshold, or a label that counts, moves by as much as rounding may.

    Args:
        policy (`ExitPolicy`): Any.
        exit_logits (`Tensor`): `[E, B, C]`.
        depths (`list[int]`): Blocks run before each exit.
        num_policy_exits (`int`): The final classifier not counted.
        ensemble (`dict`, *optional*): What the policy sees.

    Returns:
        `[B]` bool.

    Example:

        >>> from lgvit_hf.policies import PatiencePolicy
        >>> tie, clear = [1.0, 1.0], [2.0, 0.0]
        >>> exit_logits = torch.tensor([[tie, clear], [clear, clear], [clear, clear]])
        >>> undecided_samples(PatiencePolicy(patience=2), exit_logits, [1, 2, 3], 2).tolist()
        [True, False]
    """
    held = policy.to_dict() if policy.name in EXPORTABLE else {}
    table = ExitTable(exit_logits, exit_logits[-1].argmax(-1), depths, ensemble=ensemble)
    if policy.name == "patience":
        return _has_tie(policy, table.policy_logits(exits_that_run(policy, len(depths))))

    def exited(step: float) -> Tensor:
        moved = {
            name: [number + step for number in value] if isinstance(value, list) else value + step
            for name, value in held.items()
            if name in ("threshold", "entropy_threshold")
        }
        judge = build_policy({**held, **moved}, num_policy_exits) if moved else policy
        return table.replay(judge).exit_index

    return (exited(-ROUNDING) != exited(0.0)) | (exited(ROUNDING) != exited(0.0))


def _has_tie(policy: ExitPolicy, exit_logits: Tensor) -> Tensor:
    """Samples with two best labels at an evaluated exit, `[B]` bool; with one label there is no other."""
    if exit_logits.shape[-1] == 1:
        return torch.zeros(exit_logits.shape[1], dtype=torch.bool)
    evaluated = exit_logits[exits_that_run(policy, len(exit_logits))]
    best, second = evaluated.topk(2).values.unbind(-1)
    return (best - second <= ROUNDING * max(1.0, exit_logits.abs().max().item())).any(0)


def between(scores: Tensor) -> float:
    """A number in the widest gap of the middle half of some scores, so that rounding decides nothing."""
    ranked = np.sort(scores.numpy())
    middle = ranked[len(ranked) // 4 : 3 * len(ranked) // 4 + 1]
    widest = int(np.diff(middle).argmax())
    return float((middle[widest] + middle[widest + 1]) / 2)
