"""Loops over segments: `run_all` visits every exit, `run_early` drops the samples that exit. No model in sight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .policies import ExitPolicy, Memory, probabilities
from .segments import Segment, State


@dataclass(frozen=True)
class Answers:
    """One answer per sample, from the exit where the sample exited.

    Args:
        logits (`Tensor`): `[B, C]`.
        exit_index (`Tensor`): `[B]` int64, exits counted from 0, the final classifier last.
        exit_layer (`Tensor`): `[B]` int64, blocks run before the answer, from 1.
        exit_score (`Tensor`): `[B]` float32, what the policy saw when the sample exited.
    """

    logits: Tensor
    exit_index: Tensor
    exit_layer: Tensor
    exit_score: Tensor

    @classmethod
    def of(cls, logits: Tensor, index: int, depth: int, score: Tensor) -> Answers:
        """The answers of samples that are all at one exit."""
        full = partial(torch.full, (len(logits),), device=logits.device)
        return cls(logits, full(index), full(depth), score.float())


def run_all(segments: Sequence[Segment], state: State) -> list[Tensor]:
    """Run every block and every exit.

    Returns:
        Logits `[B, C]` of each exit, shallowest first, the final classifier last; on the device of `state`.
    """
    home, exit_logits = state.device, []
    for segment in segments:
        state = segment.advance(state)
        exit_logits.append(segment.answer(state).to(home))
    return exit_logits


def run_all_with_features(segments: Sequence[Segment], state: State) -> tuple[list[Tensor], list[Tensor]]:
    """As `run_all`, with the features of each exit, which distillation compares."""
    home, exit_logits, exit_features = state.device, [], []
    for segment in segments:
        state = segment.advance(state)
        assert segment.forward_with_features is not None, "the segments of a model have it"
        logits, features = segment.forward_with_features(state)
        exit_logits.append(logits.to(home))
        exit_features.append(features.to(home))
    return exit_logits, exit_features


def run_early(
    segments: Sequence[Segment],
    state: State,
    policy: ExitPolicy,
    *,
    min_depth: int | None = None,
    max_depth: int | None = None,
) -> Answers:
    """Run until every sample has exited; each block runs only on those that have not.

    A sample's answer, depth and score do not depend on the others in its batch. There is one host sync per evaluated
    exit, for the number of samples that exit. Where a model lies on several devices, answers are given on that of
    `state`; where exits differ in dtype, in one that holds the values of all that were evaluated.

    Args:
        segments (`Sequence[Segment]`): The highway, the final classifier's segment last.
        state (`State`): Before the stem.
        policy (`ExitPolicy`): Decides which samples exit; the last exit answers all that remain.
        min_depth (`int`, *optional*): Exits shallower than this are skipped.
        max_depth (`int`, *optional*): The deepest exit within this depth answers whatever the policy says.

    Raises:
        ValueError: `max_depth` is shallower than the first exit, or `min_depth` deeper than the deepest exit allowed.
    """
    last = _last_exit(segments, min_depth, max_depth)
    samples: Tensor | None = None  # numbers in the caller's batch of those that have not exited; None while none has
    answers: Answers | None = None
    home = state.device
    memory = policy.start(state.batch_size, home)
    for index, segment in enumerate(segments[: last + 1]):
        state = segment.advance(state)
        if index < last and (policy.skips(index) or segment.depth < (min_depth or 0)):
            continue
        logits, exits, num_exiting, memory = evaluate_exit(segment, state, policy, memory, index, home, index == last)
        if num_exiting == 0 and index < last:
            continue
        # all samples here are written; those that go on are overwritten later
        answers = _written(answers, samples, answers_of_exit(segment, logits, memory, index))
        if num_exiting == len(logits):
            break
        state, memory, stay = drop_exited_samples(state, memory, exits, num_exiting)
        samples = stay if samples is None else samples.index_select(0, stay)
    assert answers is not None, "at the last exit all samples exit"
    return answers


# -- an exit, in three steps, which cost tables time -----------------------------------------------------------


def evaluate_exit(
    segment: Segment, state: State, policy: ExitPolicy, memory: Memory, index: int, home: torch.device, last: bool
) -> tuple[Tensor, Tensor, int, Memory]:
    """Run an exit head and the policy: logits `[B, C]`, which samples exit `[B]`, how many, and the policy's memory.

    At the last exit all do, whatever the policy says.
    """
    logits = segment.answer(state).to(home)
    exits, memory = policy(logits, memory, index)
    if last:
        return logits, exits, len(logits), memory
    if not policy.nan_never_exits:
        exits = exits & ~logits.isnan().any(-1)
    return logits, exits, sum(exits.tolist()), memory  # the one host sync


def answers_of_exit(segment: Segment, logits: Tensor, memory: Memory, index: int) -> Answers:
    """What all samples at an exit would be answered there: its logits, or what the policy puts in their place."""
    logits = memory.get("answer", logits)
    score = memory["score"] if "score" in memory else probabilities(logits).amax(-1)
    return Answers.of(logits, index, segment.depth, score)


def drop_exited_samples(state: State, memory: Memory, exits: Tensor, num_exiting: int) -> tuple[State, Memory, Tensor]:
    """State and memory of the samples that go on, and their numbers among those that came."""
    stay = exits.argsort(stable=True)[: len(exits) - num_exiting]
    return state.select(stay), {name: tensor.index_select(0, stay) for name, tensor in memory.items()}, stay


def replay(
    exit_logits: Sequence[Tensor],
    depths: Sequence[int],
    policy: ExitPolicy,
    *,
    min_depth: int | None = None,
    max_depth: int | None = None,
) -> Answers:
    """What `run_early` would answer, from logits that `run_all` gave: the same loop, without the model.

    Args:
        exit_logits (`Sequence[Tensor]`): `[B, C]` of each exit, the final classifier last; or one tensor `[E, B, C]`.
        depths (`Sequence[int]`): Blocks run before each exit, from 1.
        policy (`ExitPolicy`): Decides which samples exit.
        min_depth (`int`, *optional*), max_depth (`int`, *optional*): See `run_early`.

    Example:

        >>> from lgvit_hf.policies import ConfidencePolicy
        >>> exit_logits = torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[0.0, 5.0], [0.0, 5.0]]])
        >>> replay(exit_logits, [1, 2], ConfidencePolicy(threshold=0.9)).exit_layer.tolist()
        [1, 2]
    """
    segments = [Segment(depth, (), partial(_given, logits)) for depth, logits in zip(depths, exit_logits, strict=True)]
    samples = State({"sample": torch.arange(len(exit_logits[0]), device=exit_logits[0].device)})
    return run_early(segments, samples, policy, min_depth=min_depth, max_depth=max_depth)


def _given(logits: Tensor, state: State) -> Tensor:
    return logits[state["sample"]]


def _last_exit(segments: Sequence[Segment], min_depth: int | None, max_depth: int | None) -> int:
    depths = [segment.depth for segment in segments]
    allowed = [index for index, depth in enumerate(depths) if max_depth is None or depth <= max_depth]
    if not allowed:
        raise ValueError(f"max_depth={max_depth} is shallower than the first exit; exits answer at depths {depths}")
    if min_depth is not None and min_depth > depths[allowed[-1]]:
        raise ValueError(
            f"min_depth={min_depth} is deeper than the deepest exit allowed, {depths[allowed[-1]]}; "
            f"exits answer at depths {depths}"
        )
    return allowed[-1]


def _written(answers: Answers | None, samples: Tensor | None, new: Answers) -> Answers:
    """`answers` with those of `samples` replaced by `new`; all of them while none has exited."""
    if answers is None or samples is None:
        return new
    pairs = zip(_tensors(answers), _tensors(new), strict=True)
    return Answers(*(_replaced(old, samples, fresh) for old, fresh in pairs))


def _replaced(old: Tensor, samples: Tensor, new: Tensor) -> Tensor:
    dtype = torch.promote_types(old.dtype, new.dtype)
    return old.to(dtype).index_copy(0, samples, new.to(dtype))


def _tensors(answers: Answers) -> tuple[Tensor, ...]:
    return answers.logits, answers.exit_index, answers.exit_layer, answers.exit_score
