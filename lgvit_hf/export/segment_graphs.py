"""From PyTorch to ONNX, piece by piece: each segment of a highway, and what its policy decides."""

from __future__ import annotations

import copy
import logging
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ensemble import EnsemblePolicy, parts_of
from ..hub.loading import example_image
from ..modeling_highway import HighwayMixin
from ..policies import CustomPolicy, ExitPolicy, Memory
from ..runtimes.manifest import PARAMETERS
from ..segments import State

OPSET = 18
# protobuf takes 2 GiB, of which the graph needs some
MAX_FILE_BYTES = 2_000_000_000
# policies that a single file can decide by
EXPORTABLE = tuple(
    "calibrated_confidence confidence confidence_entropy entropy fixed gate label_confidence margin never patience "
    "patience_confidence".split()
)


@dataclass(frozen=True)
class OnnxSegment:
    """A segment of a highway as an ONNX model: the state's tensors in; those and `logits` out, of the last one these.

    Args:
        exit_index (`int`): Of the exit at its end, counted in the whole highway.
        model (`onnx.ModelProto`): The segment, of which several of the highway's may have become one.
    """

    exit_index: int
    model: Any


class Read(TorchDispatchMode):
    """Remembers, while it is entered, the storages of all tensors that are read.

    Example:

        >>> weight, other = torch.ones(2), torch.ones(2)
        >>> with Read() as read:
        ...     _ = weight * 2
        >>> [tensor.untyped_storage().data_ptr() in read.storages for tensor in (weight, other)]
        [True, False]
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.storages.update(tensor.untyped_storage().data_ptr() for tensor in tensors)
        return func(*args, **(kwargs or {}))


class _Step(nn.Module):
    """One block, which changes the state, or an exit, which answers from it; holds the modules that it reads."""

    def __init__(self, modules: list[nn.Module], step: Callable[[State], Any], state: State, dtype: torch.dtype):
        super().__init__()
        self.held, self.step, self.dtype = nn.ModuleList(modules), step, dtype
        self.names, self.grid = list(state.tensors), state.grid

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        tensors = [tensor.to(self.dtype) for tensor in tensors]
        given = self.step(State(dict(zip(self.names, tensors, strict=True)), self.grid))
        return list(given.tensors.values()) if isinstance(given, State) else [given.float()]


@torch.no_grad()
def export_parts(model: HighwayMixin, exits: Sequence[int]) -> list[OnnxSegment]:
    """The segments between some exits of a highway; the heads of other exits are left out.

    Pixels and logits are float32, the state between segments is of the model's dtype.

    Args:
        model (`HighwayMixin`): A highway, in `eval()` mode.
        exits (`Sequence[int]`): Ascending indices.
    """
    from .onnx_graph import chain

    known: dict[str, tuple[Any, list[str]]] = {}
    parts, start = [], 0
    segments, state = model.segments(), State({"pixel_values": example_image(model, batch_size=2).float()})
    with _attention(model):
        for index in exits:
            models = []
            for block in (block for segment in segments[start : index + 1] for block in segment.blocks):
                exported, state = _exported_step(model, block, state, known)
                models.append(exported)
            exported, _ = _exported_step(model, segments[index].answer, state, known)
            parts.append(OnnxSegment(index, chain([*models, exported], ends=index == exits[-1])))
            start = index + 1
    return parts


def _exported_step(
    model: HighwayMixin, step: Callable[[State], Any], state: State, known: dict[str, tuple[Any, list[str]]]
) -> tuple[Any, Any]:
    """A block or an exit as an ONNX model, and what it gives of the state."""
    names, tensors = list(state.tensors), list(state.tensors.values())
    with Read() as read:
        given = step(replace(state, tensors={name: tensor.to(model.dtype) for name, tensor in state.tensors.items()}))
    # a tensor that keeps its name would be input and output at once
    outputs = [f"{name}_out" for name in given.tensors] if isinstance(given, State) else ["logits"]
    # with the whole model, the exporter would look at all its weights every time
    module = _Step(_modules_read(model, read), step, state, model.dtype)
    batch = {0: torch.export.Dim("batch")}
    called = {parameter: name for name, parameter in (*model.named_parameters(), *model.named_buffers())}
    return _exported(module, (tensors,), ([batch for _ in names],), names, outputs, known, called), given


@torch.no_grad()
def weight_bytes(model: HighwayMixin, exits: Sequence[int]) -> list[int]:
    """Bytes of the weights between some exits of a highway, as its dtype has them; runs it on one image.

    Args:
        model (`HighwayMixin`): A highway, in `eval()` mode.
        exits (`Sequence[int]`): Ascending indices.

    Example:

        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> small = dict(hidden_size=24, intermediate_size=24, num_attention_heads=2, image_size=32)
        >>> model = ViTHighway(ViTHighwayConfig(**small, num_hidden_layers=2, exit_positions=[1])).eval()
        >>> first, last = weight_bytes(model, [0, 1])
        >>> first > last > 0, weight_bytes(model, [1])[0] < first + last
        (True, True)
    """
    held = [*model.parameters(), *model.buffers()]
    sizes, state, start = [], State({"pixel_values": example_image(model)}), 0
    for index in exits:
        with Read() as read:
            for segment in model.segments()[start : index + 1]:
                state = segment.advance(state)
            segment.answer(state)
        sizes.append(sum(weight.nbytes for weight in held if weight.untyped_storage().data_ptr() in read.storages))
        start = index + 1
    return sizes


def check_file_sizes(sizes: Mapping[str, int], advice: str) -> None:
    """Raise `ValueError` for an ONNX file that would be too large.

    Args:
        sizes (`Mapping[str, int]`): Bytes of weights by file.
        advice (`str`): What to do instead.
    """
    for name, size in sizes.items():
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{name} would hold {size / 1e9:.1f} GB of weights, and an ONNX file takes "
                f"{MAX_FILE_BYTES / 1e9:g} GB; {advice}"
            )


def _modules_read(model: nn.Module, read: Read) -> list[nn.Module]:
    """The modules, none inside another, whose own parameters or buffers were read."""

    def reads(module: nn.Module) -> bool:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return any(tensor.untyped_storage().data_ptr() in read.storages for tensor in own)

    owners = [module for module in model.modules() if reads(module)]
    inside = {child for owner in owners for child in owner.modules() if child is not owner}
    return [owner for owner in owners if owner not in inside]


@contextmanager
def _attention(model: HighwayMixin) -> Iterator[None]:
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

    def __init__(self, policy: ExitPolicy, parameters: list[str], memory: list[str], exit_index: int, num_exits: int):
        super().__init__()
        self.policy, self.ensemble = parts_of(policy)
        self.adjustable, self.remembered = parameters, memory
        self.exit_index, self.num_exits = exit_index, num_exits

    def forward(
        self, logits: Tensor, temperature: Tensor, parameters: list[Tensor], memory: list[Tensor]
    ) -> list[Tensor]:
        policy = object.__new__(type(self.policy))
        given = zip(self.adjustable, parameters, strict=True)
        numbers = {name: value if name == "patience" else [value] * self.num_exits for name, value in given}
        vars(policy).update({**vars(self.policy), "temperature": 1.0, **numbers})
        index, before = self.exit_index, dict(zip(self.remembered, memory, strict=True))

        def decide(logits: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
            exited, after = policy(logits.float() / temperature, memory, index)
            # said once more for runtimes in which NaN is greater than a threshold
            exited = exited & ~logits.isnan().any(-1)
            if "threshold" in self.adjustable:
                exited = exited & ~after["score"].isnan()
            return exited, after

        scaled = CustomPolicy(decide)
        judge = scaled if self.ensemble is None else EnsemblePolicy(scaled, self.ensemble)
        exited, after = judge(logits, before, index)
        answer = [] if self.ensemble is None else [after["answer"]]
        return [exited, after["score"].float(), *(after[name] for name in self.remembered), *answer]


@dataclass(frozen=True)
class Decision:
    """What a policy decides, as an ONNX model.

    Args:
        model (`onnx.ModelProto`): Inputs `logits`, `temperature`, the `parameters`, and the memory's names with `_in`;
            outputs `leave`, `score`, the memory's names with `_out`, and of an ensemble its logits, `answer`.
        parameters (`list[str]`): Fields of the policy that are inputs.
        memory (`dict[str, Tensor]`): Names, and what a sample starts with, `[1, ...]` each.
    """

    model: Any
    parameters: list[str]
    memory: dict[str, Tensor]


def export_decisions(policy: ExitPolicy, num_labels: int, exits: Sequence[int], num_exits: int) -> list[Decision]:
    """What a policy decides at each of `exits`; the same where its thresholds and temperatures are all that differs.

    Args:
        policy (`ExitPolicy`): A built-in one, perhaps on an ensemble.
        num_labels (`int`): Classes of the logits.
        exits (`Sequence[int]`): Indices of exits, the final classifier's perhaps among them.
        num_exits (`int`): Early exits of the highway.
    """
    if not policy.differs_by_exit:
        return [export_decision(policy, num_labels)] * len(exits)
    return [export_decision(policy, num_labels, index, num_exits) for index in exits]


def export_decision(policy: ExitPolicy, num_labels: int, exit_index: int = 0, num_exits: int = 1) -> Decision:
    """What a policy decides at one exit; its thresholds and its temperature are inputs `[1]`."""
    start, (decides, ensemble) = policy.start(1, "cpu"), parts_of(policy)
    parameters = [name for name in PARAMETERS if hasattr(decides, name)]
    batch = {0: torch.export.Dim("batch")}
    module = _Decision(policy, parameters, list(start), exit_index, num_exits)
    numbers, memory = [torch.ones(1) for _ in parameters], [torch.cat([tensor, tensor]) for tensor in start.values()]
    inputs = ["logits", "temperature", *parameters, *(f"{name}_in" for name in start)]
    outputs = ["leave", "score", *(f"{name}_out" for name in start)]
    outputs += [] if ensemble is None else ["answer"]
    arguments = (torch.randn(2, num_labels), torch.ones(1), numbers, memory)
    dynamic_shapes = (batch, None, [None for _ in numbers], [batch for _ in memory])
    return Decision(_exported(module, arguments, dynamic_shapes, inputs, outputs, {}, {}), parameters, start)


def _exported(
    module: nn.Module,
    arguments: tuple,
    dynamic_shapes: tuple,
    inputs: list[str],
    outputs: list[str],
    known: dict[str, tuple[Any, list[str]]],
    called: dict[Tensor, str],
) -> Any:
    """A module as an ONNX model; of those that compute the same with other weights, the first is translated for all.

    Args:
        known (`dict`): What has been translated so far, by its structure; grows.
        called (`dict[Tensor, str]`): Names of weights in the file.
    """
    # they speak of the exporter's own inner steps
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):
        # in two steps: in one, the second would give the sizes names of its own and stumble over inputs without any
        traced = torch.export.export(module.eval(), arguments, dynamic_shapes=dynamic_shapes)
        structure, weights = _structure(traced), _weights(traced)
        if structure not in known:
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                # folds weights into others, and so has to wait for them
                optimize=False,
                external_data=False,
                verbose=False,
            )
            known[structure] = program, list(weights)
        program = _with_weights(*known[structure], weights, called)
    # at last: the optimizer gives an input that is handed on as it is a name of its own
    for entries, names in ((program.model.graph.inputs, inputs), (program.model.graph.outputs, outputs)):
        for entry, name in zip(entries, names, strict=True):
            entry.name = name
    model = program.model_proto
    # stack traces, which may be larger than the weights
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
    # shapes of one export, which a quantizer takes for the truth
    del model.graph.value_info[:]
    return model


def _with_weights(program: Any, names: list[str], weights: dict[str, Tensor], called: dict[Tensor, str]) -> Any:
    """A program that is not optimized yet with other weights in place of those called `names`; optimized."""
    import onnx_ir

    program = copy.copy(program)
    program.model = program.model.clone()
    held = dict(program.model.graph.initializers)
    for name, weight in zip(names, weights.values(), strict=True):
        if name in held:
            held[name].name = called.get(weight, name)
            held[name].const_value = onnx_ir.tensor(weight.detach().contiguous().numpy(), name=held[name].name)
    program.optimize()
    return program


def _weights(traced: Any) -> dict[str, Tensor]:
    """The parameters, buffers and constant tensors that a traced program reads, in the order of its inputs."""
    held = {**traced.state_dict, **traced.constants}
    read = {node.name for node in traced.graph.nodes if node.op == "placeholder" and node.users}
    specs = traced.graph_signature.input_specs
    return {spec.target: held[spec.target] for spec in specs if spec.target is not None and spec.arg.name in read}


def _structure(traced: Any) -> str:
    """What a traced program computes, but for the values of its weights, as text."""
    kinds = {spec.arg.name: spec.kind.name for spec in traced.graph_signature.input_specs}
    numbers: dict[Any, str] = {}
    lines = []
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            # a graph inside the graph: never the same as another
            return uuid.uuid4().hex
        if node.op == "placeholder":
            if kinds[node.name] != "USER_INPUT" and not node.users:
                continue
            value = node.meta["val"]
            what = (kinds[node.name], getattr(value, "dtype", type(value)), str(getattr(value, "shape", value)))
        else:
            what = (str(node.target), *map_arg((node.args, node.kwargs), numbers.__getitem__))
        numbers[node] = f"%{len(numbers)}"
        lines.append(f"{node.op} {what}")
    return "\n".join(lines)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without warnings, and of these loggers only their errors."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
