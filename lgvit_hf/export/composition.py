"""Parts of a highway as one ONNX model, in plain `onnx`: nested `If`s, and samples that exited are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..runtimes.manifest import PARAMETERS
from .onnx_graph import Graph, pruned
from .segment_graphs import OPSET, Decision, OnnxSegment

PRODUCER = "lgvit-hf"
ANSWERS = ("logits", "exit_index", "exit_score")


def joined(parts: Sequence[OnnxSegment], exits: Sequence[int]) -> list[OnnxSegment]:
    """The parts of a highway that ends at other exits left out: fewer and longer ones, without the others' heads.

    Args:
        parts (`Sequence[OnnxSegment]`): In the order in which they run.
        exits (`Sequence[int]`): Ascending indices of exits at their ends, that of the last part among them.
    """
    made, group = [], []
    for part in parts:
        group.append(part)
        if part.exit_index in exits:
            made.append(_join(group))
            group = []
    return made


def _join(parts: Sequence[OnnxSegment]) -> OnnxSegment:
    if len(parts) == 1:
        return parts[0]
    graph, first, last = Graph(), parts[0].model, parts[-1]
    answers = [entry.name for entry in first.graph.input]
    for number, part in enumerate(parts):
        # of the part before, the state without the logits
        state = answers[: len(part.model.graph.input)]
        answers = graph.inline(part.model, f"{number}_", state)
    outputs = list(last.model.graph.output)
    for entry, name in zip(outputs, answers, strict=True):
        graph.add("Identity", [name], entry.name)
    nodes = pruned(graph.nodes, [entry.name for entry in outputs])
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.constants if tensor.name in read]
    made = helper.make_graph(nodes, "part", list(first.graph.input), outputs, constants)
    model = helper.make_model(made, opset_imports=first.opset_import, ir_version=first.ir_version)
    return OnnxSegment(last.exit_index, model)


def compose_single(
    parts: Sequence[OnnxSegment], decisions: Sequence[Decision], depths: Sequence[int], defaults: dict[str, Any]
) -> Any:
    """One model in which each sample has its own exit, and branches that no sample needs are not run.

    Args:
        parts (`Sequence[OnnxSegment]`): Of the evaluated exits, the final one last.
        decisions (`Sequence[Decision]`): The policy at each of these exits; the last part only takes its score.
        depths (`Sequence[int]`): Blocks run before each exit of the whole highway.
        defaults (`dict[str, np.ndarray]`):
            Values of the inputs that may be given anew: `exit_temperatures` `[E]`, and as `PARAMETERS` calls them;
            `exit_thresholds` may be those of each sample, too, `[B * E]`.

    Returns:
        An `onnx.ModelProto`: `pixel_values` in; `logits` `[B, C]`, `exit_layer`, `exit_index` `[B]` int64 and
        `exit_score` `[B]` float32 out.
    """
    graph = Graph()
    batch = graph.add("Shape", ["pixel_values"], "batch", start=0, end=1)
    memory = []
    for name, value in decisions[0].memory.items():
        first = graph.constant(f"first_{name}", value.numpy())
        sizes = graph.constant(f"sizes_{name}", np.array(value.shape[1:], dtype=np.int64))
        shape = graph.add("Concat", [batch, sizes], f"shape_{name}", axis=0)
        memory.append(graph.add("Expand", [first, shape], f"start_{name}"))
    own = ["exit_thresholds"] if "threshold" in decisions[0].parameters else []
    own = [_of_each_sample(graph, name, batch, len(defaults[name])) for name in own]
    answers = _body(graph, ["pixel_values"], memory, own, parts, decisions)
    for name, answer in zip(ANSWERS, answers, strict=True):
        graph.add("Identity", [answer], name)
    graph.add("Gather", [graph.constant("depths", np.array(depths)), "exit_index"], "exit_layer", axis=0)
    logits, exit_index, exit_score = _answer_infos(ANSWERS, parts[-1], ["batch"])
    exit_layer = helper.make_tensor_value_info("exit_layer", TensorProto.INT64, ["batch"])
    return _model(graph, parts[0], [logits, exit_layer, exit_index, exit_score], defaults)


def _of_each_sample(graph: Graph, name: str, batch: str, length: int) -> str:
    """An input `[E]` or `[B * E]`, E of this `length`, as `[B, E]`."""
    rows = graph.add("Reshape", [name, graph.constant(f"rows_{name}", np.array([-1, length]))], f"{name}_rows")
    width = graph.constant(f"width_{name}", np.array([length]))
    shape = graph.add("Concat", [batch, width], f"shape_{name}", axis=0)
    return graph.add("Expand", [rows, shape], f"{name}_of_each")


def _body(
    graph: Graph,
    state: Sequence[str],
    memory: Sequence[str],
    own: Sequence[str],
    parts: Sequence[OnnxSegment],
    decisions: Sequence[Decision],
) -> list[str]:
    """From one exit on: names of the logits, exit index and score of the samples that reach it.

    `own` is the tensor `[B, E]` of the thresholds of these samples, of a policy that has some.
    """
    (part, *deeper), (decision, *decisions), here = parts, decisions, f"e{parts[0].exit_index}_"
    *after, logits = graph.inline(part.model, f"{here}part_", state)
    index = graph.constant(f"{here}index", np.array([part.exit_index]))
    samples = graph.add("Shape", [logits], f"{here}samples", start=0, end=1)
    exit_index = graph.add("Expand", [index, samples], f"{here}exit_index")
    # the final classifier has no threshold: nothing exits early there, and a score that counts goes by the last
    threshold = part.exit_index if deeper else max(0, part.exit_index - 1)
    inputs = [_at(graph, here, "exit_temperatures", part.exit_index)]
    for name in decision.parameters:
        if name == "threshold":
            inputs.append(_column(graph, here, own[0], threshold))
        else:
            inputs.append(_at(graph, here, PARAMETERS[name], 0 if name == "patience" else threshold))
    exits, score, *after_it = graph.inline(decision.model, f"{here}decide_", [logits, *inputs, *memory])
    memory, answer = after_it[: len(memory)], after_it[len(memory) :]
    answers = [*(answer or [logits]), exit_index, score]
    if not deeper:
        return answers

    goes_on = graph.add("Not", [exits], f"{here}goes_on")
    found = graph.add("NonZero", [goes_on], f"{here}found")
    number_left = graph.add("Shape", [found], f"{here}number_left", start=1, end=2)
    zero = graph.constant(f"{here}zero", np.array([0]))
    none_left = graph.add("Equal", [number_left, zero], f"{here}equal")
    none_left = graph.add("Squeeze", [none_left, zero], f"{here}none_left")

    done, on = Graph(), Graph()
    last = [done.add("Identity", [name], f"{here}done_{place}") for place, name in enumerate(answers)]
    kept = on.add("Squeeze", [found, on.constant(f"{here}first_axis", np.array([0]))], f"{here}kept")
    carried = [on.add("Gather", [name, kept], f"{name}_kept", axis=0) for name in (*after, *memory, *own)]
    places = len(after), len(after) + len(memory)
    kinds = carried[: places[0]], carried[places[0] : places[1]], carried[places[1] :]
    given = _body(on, *kinds, deeper, decisions)
    numbers = on.add("Unsqueeze", [kept, on.constant(f"{here}last_axis", np.array([1]))], f"{here}places")
    merged = [
        on.add("ScatterND", [old, numbers, new], f"{here}merged_{place}")
        for place, (old, new) in enumerate(zip(answers, given, strict=True))
    ]
    names = [f"{here}answer_{place}" for place in range(3)]
    then_branch, else_branch = (
        helper.make_graph(inner.nodes, here + name, [], _answer_infos(outputs, part, None), inner.constants)
        for inner, outputs, name in ((done, last, "none_go_on"), (on, merged, "some_go_on"))
    )
    branches = {"then_branch": then_branch, "else_branch": else_branch}
    graph.nodes.append(helper.make_node("If", [none_left], names, f"{here}if", **branches))
    return names


def _at(graph: Graph, here: str, name: str, index: int) -> str:
    """One number `[1]` of an input. Not by `Gather`, which a quantizer would turn into integers with its values."""
    start, end = (graph.constant(f"{here}{name}_{end}", np.array([index + end])) for end in (0, 1))
    return graph.add("Slice", [name, start, end], f"{here}{name}")


def _column(graph: Graph, here: str, name: str, index: int) -> str:
    """One number of each sample, `[B]`, of a tensor `[B, E]`."""
    start, end = (graph.constant(f"{here}column_{end}", np.array([index + end])) for end in (0, 1))
    axis = graph.constant(f"{here}column_axis", np.array([1]))
    column = graph.add("Slice", [name, start, end, axis], f"{here}column")
    return graph.add("Squeeze", [column, axis], f"{here}threshold")


def _answer_infos(names: Sequence[str], part: OnnxSegment, shape: list[str] | None) -> list[Any]:
    """Types of `ANSWERS` under other names, and the shapes of all where one is given."""
    kind, num_labels = _logits_of(part)
    return [
        helper.make_tensor_value_info(names[0], kind, shape and [*shape, num_labels]),
        helper.make_tensor_value_info(names[1], TensorProto.INT64, shape),
        helper.make_tensor_value_info(names[2], TensorProto.FLOAT, shape),
    ]


def _logits_of(part: OnnxSegment) -> tuple[int, int]:
    """Type and number of the labels of a part's logits."""
    logits = part.model.graph.output[-1].type.tensor_type
    return logits.elem_type, logits.shape.dim[-1].dim_value


def set_thresholds(model: Any, thresholds: str) -> None:
    """Make the adjustable inputs of a single file required, or take them away: the file then keeps their numbers.

    OpenVINO and browsers know no inputs with a default.

    Args:
        model (`onnx.ModelProto`): As `compose_single` returns it; changed.
        thresholds (`str`): `"input"` or `"fixed"`; `"optional"` is what it is already.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    adjustable = {entry.name for entry in graph.input} & constants
    for entry in graph.input:
        # where defaults are not known, shapes must be
        if entry.name in adjustable and thresholds == "input":
            value = next(tensor for tensor in graph.initializer if tensor.name == entry.name)
            entry.CopyFrom(helper.make_tensor_value_info(entry.name, TensorProto.FLOAT, list(value.dims)))
    held = {"optional": None, "input": graph.initializer, "fixed": graph.input}[thresholds]
    if held is not None:
        kept = [entry for entry in held if entry.name not in adjustable]
        del held[:]
        held.extend(kept)
    onnx.checker.check_model(model)


def compose_all_exits(parts: Sequence[OnnxSegment]) -> Any:
    """One model that runs every exit: `logits` of the last and `exit_logits` `[E, B, C]` of all."""
    graph, state, found = Graph(), ["pixel_values"], []
    axis = graph.constant("axis", np.array([0]))
    for part in parts:
        *state, logits = graph.inline(part.model, f"e{part.exit_index}_part_", state)
        found.append(graph.add("Unsqueeze", [logits, axis], f"e{part.exit_index}_logits"))
    graph.add("Identity", [logits], "logits")
    graph.add("Concat", found, "exit_logits", axis=0)
    kind, num_labels = _logits_of(parts[-1])
    shapes: dict[str, list[Any]] = {"logits": ["batch", num_labels], "exit_logits": [len(parts), "batch", num_labels]}
    return _model(graph, parts[0], [helper.make_tensor_value_info(name, kind, shapes[name]) for name in shapes], {})


def _model(graph: Graph, first: OnnxSegment, outputs: Sequence[Any], defaults: dict[str, Any]) -> Any:
    pixels = first.model.graph.input[0].type.tensor_type
    sizes = ["batch", *(dim.dim_value for dim in pixels.shape.dim[1:])]
    inputs = [helper.make_tensor_value_info("pixel_values", pixels.elem_type, sizes)]
    for name, value in defaults.items():
        graph.constant(name, value)
        # an initializer that is an input too: what it holds is the default
        # thresholds may be those of each sample, one sample after the other
        shape = ["thresholds"] if name == "exit_thresholds" else list(value.shape)
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    model = helper.make_model(
        helper.make_graph(graph.nodes, "highway", inputs, list(outputs), graph.constants),
        producer_name=PRODUCER,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=first.model.ir_version,
    )
    onnx.checker.check_model(model)
    return model
