"""From PyTorch to ONNX, piece by piece: each stretch of a highway, and what its policy decides."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models import example_image
from ..policies import ExitPolicy
from ..segments import Segment, State

OPSET = 18
# policies that a single file can decide by
EXPORTABLE = (
    "confidence",
    "entropy",
    "margin",
    "confidence_entropy",
    "label_confidence",
    "patience",
    "patience_confidence",
    "fixed",
    "never",
)
# fields of a policy that stay adjustable in the exported file, and what their inputs are called there
PARAMETERS = {
    "threshold": "exit_thresholds",
    "entropy_threshold": "exit_entropy_thresholds",
    "patience": "exit_patience",
}


@dataclass(frozen=True)
class Part:
    """A stretch of a highway as an ONNX model: the state's tensors in; those and `logits` out, of the last one these.

    Args:
        exit_index (`int`): Of the exit at its end, counted in the whole highway.
        model (`onnx.ModelProto`): The stretch.
    """

    exit_index: int
    model: Any


def exits_that_run(policy: ExitPolicy, num_exits: int) -> list[int]:
    """Indices of the exits that a policy asks, the one that answers what is left included.

    Args:
        policy (`ExitPolicy`): A built-in one.
        num_exits (`int`): The final classifier counted.
    """
    if policy.name == "fixed":
        return [policy.exit_index]
    return [index for index in range(num_exits - 1) if not policy.skips(index)] + [num_exits - 1]


class _Stretch(nn.Module):
    """Segments in a row, of which the last one answers."""

    def __init__(
        self, model: PreTrainedModel, segments: Sequence[Segment], names: list[str], state: State, ends: bool
    ):
        super().__init__()
        self.model, self.segments, self.names, self.grid, self.ends = model, segments, names, state.grid, ends

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        tensors = [tensor.to(self.model.dtype) for tensor in tensors]
        state = State(dict(zip(self.names, tensors, strict=True)), self.grid)
        for segment in self.segments:
            state = segment.advance(state)
        logits = self.segments[-1].answer(state).float()
        return [logits] if self.ends else [*state.tensors.values(), logits]


@torch.no_grad()
def export_parts(model: PreTrainedModel, exits: Sequence[int]) -> list[Part]:
    """The stretches between some exits of a highway; the heads of other exits are left out.

    Pixels and logits are float32, the state between stretches is of the model's dtype.

    Args:
        model (`PreTrainedModel`): A highway, in `eval()` mode.
        exits (`Sequence[int]`): Ascending indices.
    """
    with _attention(model):
        return _export_parts(model, exits)


def _export_parts(model: PreTrainedModel, exits: Sequence[int]) -> list[Part]:
    segments, state = model.segments(), State({"pixel_values": example_image(model, batch_size=2).float()})
    parts, start = [], 0
    for index in exits:
        names, ends = list(state.tensors), index == exits[-1]
        stretch = _Stretch(model, segments[start : index + 1], names, state, ends)
        after = State({name: tensor.to(model.dtype) for name, tensor in state.tensors.items()}, state.grid)
        for segment in segments[start : index + 1]:
            after = segment.advance(after)
        outputs = [] if ends else list(after.tensors)
        exported = _exported(
            stretch,
            (list(state.tensors.values()),),
            ([{0: torch.export.Dim("batch")} for _ in names],),
            names,
            # a tensor that keeps its name would be input and output at once
            [*(f"{name}_out" for name in outputs), "logits"],
        )
        parts.append(Part(index, exported))
        state, start = after, index + 1
    return parts


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[None]:
    """Swin's attention as all versions of transformers have it, so that they export the same file."""
    before = model.config._attn_implementation
    if model.config.model_type == "swin_highway":
        model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


class _Decision(nn.Module):
    """A policy with its parameters as tensors `[1]`, so that they can be given anew in every run."""

    def __init__(self, policy: ExitPolicy, parameters: list[str], memory: list[str]):
        super().__init__()
        self.policy, self.adjustable, self.remembered = policy, parameters, memory

    def forward(
        self, logits: Tensor, temperature: Tensor, parameters: list[Tensor], memory: list[Tensor]
    ) -> list[Tensor]:
        policy = object.__new__(type(self.policy))
        given = {
            name: value if name == "patience" else [value]
            for name, value in zip(self.adjustable, parameters, strict=True)
        }
        vars(policy).update({**vars(self.policy), "temperature": 1.0, **given})
        leave, after = policy(logits.float() / temperature, dict(zip(self.remembered, memory, strict=True)), 0)
        return [leave, after["score"].float(), *(after[name] for name in self.remembered)]


@dataclass(frozen=True)
class Decision:
    """What a policy decides, as an ONNX model.

    Args:
        model (`onnx.ModelProto`): Inputs `logits`, `temperature`, the `parameters`, and the memory's names with `_in`;
            outputs `leave`, `score`, and the memory's names with `_out`.
        parameters (`list[str]`): Fields of the policy that are inputs.
        memory (`dict[str, Tensor]`): Names, and what a row starts with, `[1]` each.
    """

    model: Any
    parameters: list[str]
    memory: dict[str, Tensor]


def export_decision(policy: ExitPolicy, num_labels: int) -> Decision:
    """What a policy decides at one exit; its thresholds and its temperature are inputs `[1]`."""
    start = policy.start(1, "cpu")
    parameters = [name for name in PARAMETERS if hasattr(policy, name)]
    batch = {0: torch.export.Dim("batch")}
    module = _Decision(policy, parameters, list(start))
    exported = _exported(
        module,
        (
            torch.randn(2, num_labels),
            torch.ones(1),
            [torch.ones(1) for _ in parameters],
            [tensor.expand(2).clone() for tensor in start.values()],
        ),
        (batch, None, [None for _ in parameters], [batch for _ in start]),
        ["logits", "temperature", *parameters, *(f"{name}_in" for name in start)],
        ["leave", "score", *(f"{name}_out" for name in start)],
    )
    return Decision(exported, parameters, start)


def _exported(
    module: nn.Module, arguments: tuple, dynamic_shapes: tuple, inputs: list[str], outputs: list[str]
) -> Any:
    with _quiet():
        # in two steps: in one, the second would give the sizes names of its own and stumble over inputs without any
        traced = torch.export.export(module.eval(), arguments, dynamic_shapes=dynamic_shapes)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    model = program.model_proto
    # stack traces, which may be larger than the weights
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
    # shapes of one export, which a quantizer takes for the truth
    del model.graph.value_info[:]
    return model


@contextmanager
def _quiet():
    """Without the exporter's notes on its own inner steps."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
