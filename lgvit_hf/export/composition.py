"""Parts of a highway as one ONNX model, in plain `onnx`: nested `If`s, and rows that have left are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..runtimes.manifest import PARAMETERS
from .onnx_graph import Graph
from .segment_graphs import OPSET, Decision, Stretch

PRODUCER = "lgvit-hf"


def compose_single(
    parts: Sequence[Stretch], decision: Decision, depths: Sequence[int], defaults: dict[str, Any]
) -> Any:
    """One model in which each row leaves at its own exit, and the branches that nobody needs are not run.

    Args:
        parts (`Sequence[Stretch]`): Of the exits that are asked, the one that answers what is left last.
        decision (`Decision`): The policy; of it, the last part only takes the score.
        depths (`Sequence[int]`): Blocks run before each exit of the whole highway.
        defaults (`dict[str, np.ndarray]`):
            Values of the inputs that may be given anew: `exit_temperatures` `[E]`, and as `PARAMETERS` calls them.

    Returns:
        An `onnx.ModelProto`: `pixel_values` in; `logits` `[B, C]`, `exit_layer`, `exit_index` `[B]` int64 and
        `exit_score` `[B]` float32 out.
    """
    graph = Graph()
    batch = graph.add("Shape", ["pixel_values"], "batch", start=0, end=1)
    memory = []
    for name, value in decision.memory.items():
        first = graph.constant(f"first_{name}", value.numpy())
        memory.append(graph.add("Expand", [first, batch], f"start_{name}"))
    answers = _body(graph, 0, ["pixel_values"], memory, parts, decision)
    for name, answer in zip(("logits", "exit_index", "exit_score"), answers, strict=True):
        graph.add("Identity", [answer], name)
    graph.add("Gather", [graph.constant("depths", np.array(depths)), "exit_index"], "exit_layer", axis=0)
    outputs = [
        _logits_info("logits", parts[-1]),
        helper.make_tensor_value_info("exit_layer", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("exit_index", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("exit_score", TensorProto.FLOAT, ["batch"]),
    ]
    return _model(graph, parts[0], outputs, defaults)


def _body(
    graph: Graph,
    number: int,
    state: Sequence[str],
    memory: Sequence[str],
    parts: Sequence[Stretch],
    decision: Decision,
) -> tuple[str, str, str]:
    """From one exit on: names of the logits, exit index and score of the rows that have come this far."""
    part, here = parts[number], f"e{parts[number].exit_index}_"
    *after, logits = graph.inline(part.model, f"{here}part_", state)
    index = graph.constant(f"{here}index", np.array([part.exit_index]))
    rows = graph.add("Shape", [logits], f"{here}rows", start=0, end=1)
    exit_index = graph.add("Expand", [index, rows], f"{here}exit_index")
    last_part = number == len(parts) - 1
    # the final classifier has no threshold: nobody asks who leaves there, and a score that counts goes by the last
    threshold = max(0, part.exit_index - 1) if last_part else part.exit_index
    leave, score, *memory = _decide(graph, here, threshold, part, logits, memory, decision)
    if last_part:
        return logits, exit_index, score

    stay = graph.add("Not", [leave], f"{here}stay")
    found = graph.add("NonZero", [stay], f"{here}found")
    staying = graph.add("Shape", [found], f"{here}staying", start=1, end=2)
    nobody = graph.add("Equal", [staying, graph.constant(f"{here}none", np.array([0]))], f"{here}equal")
    nobody = graph.add("Squeeze", [nobody, graph.constant(f"{here}axis", np.array([0]))], f"{here}nobody")
    answers = (logits, exit_index, score)

    done, on = Graph(), Graph()
    last = [done.add("Identity", [name], f"{here}done_{place}") for place, name in enumerate(answers)]
    kept = on.add("Squeeze", [found, on.constant(f"{here}first_axis", np.array([0]))], f"{here}kept")
    carried = [on.add("Gather", [name, kept], f"{name}_kept", axis=0) for name in (*after, *memory)]
    deeper = _body(on, number + 1, carried[: len(after)], carried[len(after) :], parts, decision)
    places = on.add("Unsqueeze", [kept, on.constant(f"{here}last_axis", np.array([1]))], f"{here}places")
    merged = [
        on.add("ScatterND", [old, places, new], f"{here}merged_{place}")
        for place, (old, new) in enumerate(zip(answers, deeper, strict=True))
    ]
    names = [f"{here}answer_{place}" for place in range(3)]
    graph.nodes.append(
        helper.make_node(
            "If",
            [nobody],
            names,
            name=f"{here}if",
            then_branch=_branch(done, last, f"{here}nobody_goes_on", part),
            else_branch=_branch(on, merged, f"{here}some_go_on", part),
        )
    )
    return names[0], names[1], names[2]


def _decide(
    graph: Graph, here: str, threshold: int, part: Stretch, logits: str, memory: Sequence[str], decision: Decision
) -> list[str]:
    """Names of who leaves, the score, and the memory after it; `threshold` is the place of those to judge by."""
    inputs = [_at(graph, here, "exit_temperatures", part.exit_index)]
    for name in decision.parameters:
        inputs.append(_at(graph, here, PARAMETERS[name], 0 if name == "patience" else threshold))
    return graph.inline(decision.model, f"{here}decide_", [logits, *inputs, *memory])


def _at(graph: Graph, here: str, name: str, index: int) -> str:
    """One number `[1]` of an input. Not by `Gather`, which a quantizer would turn into integers with its values."""
    start, end = (graph.constant(f"{here}{name}_{end}", np.array([index + end])) for end in (0, 1))
    return graph.add("Slice", [name, start, end], f"{here}{name}")


def _branch(graph: Graph, outputs: Sequence[str], name: str, part: Stretch) -> Any:
    kinds = (_logits_info(outputs[0], part).type.tensor_type.elem_type, TensorProto.INT64, TensorProto.FLOAT)
    infos = [helper.make_tensor_value_info(entry, kind, None) for entry, kind in zip(outputs, kinds, strict=True)]
    return helper.make_graph(graph.nodes, name, [], infos, graph.constants)


def compose_all_exits(parts: Sequence[Stretch]) -> Any:
    """One model that runs every exit: `logits` of the last and `exit_logits` `[E, B, C]` of all."""
    graph, state, found = Graph(), ["pixel_values"], []
    for part in parts:
        *state, logits = graph.inline(part.model, f"e{part.exit_index}_part_", state)
        axis = graph.constant(f"e{part.exit_index}_axis", np.array([0]))
        found.append(graph.add("Unsqueeze", [logits, axis], f"e{part.exit_index}_logits"))
    graph.add("Identity", [logits], "logits")
    graph.add("Concat", found, "exit_logits", axis=0)
    info = _logits_info("logits", parts[-1])
    kind = info.type.tensor_type.elem_type
    stacked = helper.make_tensor_value_info("exit_logits", kind, [len(parts), "batch", _num_labels(parts[-1])])
    return _model(graph, parts[0], [info, stacked], {})


def _num_labels(part: Stretch) -> int:
    return part.model.graph.output[-1].type.tensor_type.shape.dim[-1].dim_value


def _logits_info(name: str, part: Stretch) -> Any:
    kind = part.model.graph.output[-1].type.tensor_type.elem_type
    return helper.make_tensor_value_info(name, kind, ["batch", _num_labels(part)])


def _model(graph: Graph, first: Stretch, outputs: Sequence[Any], defaults: dict[str, Any]) -> Any:
    pixels = first.model.graph.input[0].type.tensor_type
    sizes = ["batch", *(dim.dim_value for dim in pixels.shape.dim[1:])]
    inputs = [helper.make_tensor_value_info("pixel_values", pixels.elem_type, sizes)]
    for name, value in defaults.items():
        graph.constant(name, value)
        # an initializer that is an input too: what it holds is the default
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape)))
    model = helper.make_model(
        helper.make_graph(graph.nodes, "highway", inputs, list(outputs), graph.constants),
        producer_name=PRODUCER,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=first.model.ir_version,
    )
    onnx.checker.check_model(model)
    return model
