"""`TorchSegments`: a highway whose segments are run one by one, each on samples that came there at different times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from ..data.devices import wait_for_accelerators
from ..engine import Answers, answers_of_exit, drop_exited_samples, evaluate_exit
from ..evaluation.cost_table import threads_of
from ..exit_policy import ExitPolicy
from ..policies import Memory
from ..segments import State
from .device.loop import ANSWERS, Arrays
from .predictor import THRESHOLDS
from .torch_model import TorchModel, policy_by
from .torch_part import merged_segments

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Reached:
    """A sample before a block: its state and the policy's memory of it, each tensor `[1, ...]`."""

    state: State
    memory: Memory


class TorchSegments:
    """Runs blocks of a highway's segments, see `Runs` of `segment_scheduler.py`; the policy is the one of now.

    Segments whose exit the policy skips are one with the next. Where samples come with `thresholds` `[E]` of their
    own, these take the place of the policy's, see `PerSamplePolicy`.

    Args:
        opened (`TorchModel`): A highway in PyTorch, or an exported one of the layout `segments`.
    """

    def __init__(self, opened: TorchModel):
        self._model, self.shape = opened.model, opened.shape
        model = self._model
        self._policy, self._device, self._dtype = model.answering_policy, model.device, model.dtype
        segments = model.segments()
        last = len(segments) - 1
        self._exits = [index for index in range(last) if not self._policy.skips(index)] + [last]
        self._segments = merged_segments(segments, self._exits)

    @property
    def num_blocks(self) -> list[int]:
        """Of each segment, the stem counted as one of the first."""
        return [len(segment.blocks) for segment in self._segments]

    @torch.inference_mode()
    def run(
        self, segment: int, start: int, stop: int, samples: Sequence[Arrays | Reached]
    ) -> tuple[list[Reached | None], list[Arrays | None]]:
        """See `Runs`."""
        state, memory = self._joined(samples)
        for block in self._segments[segment].blocks[start:stop]:
            state = block(state)
        if stop < len(self._segments[segment].blocks):
            return list(_parted(state, memory)), [None] * len(samples)
        return self._after_exit(segment, state, memory)

    @torch.inference_mode()
    def walk(self, samples: int) -> list[list[float]]:
        """See `Runs`; all samples go on, whatever the policy says."""
        state = self._begun(np.zeros((samples, *self.shape), np.float32))
        memory, times = self._policy.start(samples, self._device), []
        # of one thread that computes its own time is what it takes without the others on the machine
        alone = self._device.type == "cpu" and threads_of(self._model) == 1
        clock = time.thread_time if alone else time.perf_counter
        for number, segment in enumerate(self._segments):
            times.append([0.0] * len(segment.blocks))
            for step, block in enumerate(segment.blocks):
                state, times[-1][step] = _timed(clock, block, state)
            (_, memory), milliseconds = _timed(clock, self._evaluated, number, state, memory)
            times[-1][-1] += milliseconds
        return times

    def _evaluated(self, number: int, state: State, memory: Memory) -> tuple[Answers, Memory]:
        segment, index = self._segments[number], self._exits[number]
        last = number == len(self._segments) - 1
        logits, _, _, memory = evaluate_exit(segment, state, self._policy, memory, index, self._device, last)
        return answers_of_exit(segment, logits, memory, index), memory

    def _begun(self, pixels: np.ndarray) -> State:
        return State({"pixel_values": torch.tensor(pixels, device=self._device, dtype=self._dtype)})

    def _policy_of(self, memory: Memory) -> ExitPolicy:
        return policy_by(memory[THRESHOLDS], self._model) if THRESHOLDS in memory else self._policy

    def _joined(self, samples: Sequence[Arrays | Reached]) -> tuple[State, Memory]:
        reached = [sample for sample in samples if isinstance(sample, Reached)]
        if not reached:
            new = [sample for sample in samples if not isinstance(sample, Reached)]
            policy = self._policy
            if THRESHOLDS in new[0]:
                policy = policy_by(torch.tensor(np.stack([each[THRESHOLDS] for each in new])), self._model)
            state = self._begun(np.stack([each["pixel_values"] for each in new]))
            return state, policy.start(len(new), self._device)
        first = reached[0]
        if len(reached) == 1:
            return first.state, first.memory
        tensors = {name: torch.cat([each.state[name] for each in reached]) for name in first.state.tensors}
        memory = {name: torch.cat([each.memory[name] for each in reached]) for name in first.memory}
        return State(tensors, first.state.grid), memory

    def _after_exit(
        self, number: int, state: State, memory: Memory
    ) -> tuple[list[Reached | None], list[Arrays | None]]:
        segment, index, samples = self._segments[number], self._exits[number], state.batch_size
        last = number == len(self._segments) - 1
        policy = self._policy_of(memory)
        logits, exits, num_exiting, memory = evaluate_exit(segment, state, policy, memory, index, self._device, last)
        reached: list[Reached | None] = [None] * samples
        answers: list[Arrays | None] = [None] * samples
        if num_exiting:
            found = _as_arrays(answers_of_exit(segment, logits, memory, index))
            for sample in range(samples) if last else np.flatnonzero(exits.cpu().numpy()).tolist():
                answers[sample] = {name: array[sample : sample + 1] for name, array in found.items()}
        if num_exiting < samples:
            stay = torch.arange(samples)
            if num_exiting:
                state, memory, stay = drop_exited_samples(state, memory, exits, num_exiting)
            for sample, each in zip(stay.tolist(), _parted(state, memory), strict=True):
                reached[sample] = each
        return reached, answers


def _parted(state: State, memory: Memory) -> list[Reached]:
    """Each sample by itself."""
    samples = state.batch_size
    tensors = {name: torch.split(tensor, 1) for name, tensor in state.tensors.items()}
    remembered = {name: torch.split(tensor, 1) for name, tensor in memory.items()}
    return [
        Reached(
            State({name: each[sample] for name, each in tensors.items()}, state.grid),
            {name: each[sample] for name, each in remembered.items()},
        )
        for sample in range(samples)
    ]


def _as_arrays(answers: Answers) -> Arrays:
    tensors = {name: getattr(answers, name) for name in ANSWERS}
    return {name: (each.float() if name == "logits" else each).cpu().numpy() for name, each in tensors.items()}


def _timed(clock: Callable[[], float], run: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """What it gives, and milliseconds."""
    wait_for_accelerators()
    start = clock()
    result = run(*arguments)
    wait_for_accelerators()
    return result, 1e3 * (clock() - start)
