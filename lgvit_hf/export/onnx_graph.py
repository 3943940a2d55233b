"""ONNX graphs as they grow, and models run one after the other as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import compose, helper, numpy_helper


class Graph:
    """Nodes and constants of one graph or branch, growing."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node with one output, by whose name it goes; returns that."""
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        """A constant of numpy; returns its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def inline(self, model: Any, prefix: str, inputs: Sequence[str]) -> list[str]:
        """Another model's nodes, its inputs fed by ours; returns what its outputs are called here."""
        inside = compose.add_prefix(model, prefix).graph
        fed = dict(zip((entry.name for entry in inside.input), inputs, strict=True))
        for node in inside.node:
            for place, name in enumerate(node.input):
                node.input[place] = fed.get(name, name)
            self.nodes.append(node)
        self.constants.extend(inside.initializer)
        outputs = [entry.name for entry in inside.output]
        # an input that is handed on as it is
        return [fed.get(name, name) for name in outputs]


def pruned(nodes: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
    """Of nodes in the order in which they run, those that some outputs need."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def chain(models: Sequence[Any], ends: bool) -> Any:
    """One model of several in a row, the last of which answers from the state that the others return.

    Args:
        models (`Sequence[onnx.ModelProto]`):
            The state's tensors in; those out, under the same names and `_out`, of the last one `logits`.
        ends (`bool`): Only give the logits; otherwise the state before them too.

    Returns:
        An `onnx.ModelProto` with the inputs of the first.
    """
    graph, first, last = Graph(), models[0].graph, models[-1].graph
    state = [entry.name for entry in first.input]
    for number, model in enumerate(models[:-1]):
        state = graph.inline(model, f"{number}_", state)
    (logits,) = graph.inline(models[-1], "exit_", state)
    handed_on = [] if ends else [helper.make_value_info(f"{entry.name}_out", entry.type) for entry in last.input]
    outputs = [*handed_on, *last.output]
    for entry, name in zip(outputs, [*([] if ends else state), logits], strict=True):
        graph.add("Identity", [name], entry.name)
    made = helper.make_graph(graph.nodes, "part", list(first.input), outputs, graph.constants)
    return helper.make_model(made, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
