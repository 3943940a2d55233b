"""Matrix products of an ONNX model in 8 bits, each token with a scale of its own: no sample meets another's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from .onnx_graph import Graph

# of a token of zeros, which has no scale
_SMALLEST_SCALE = 1e-30


def quantize(model: Any) -> Any:
    """A copy of a part whose products with a constant matrix are computed in 8 bits.

    A token `x` becomes `round(x / s)` with `s = max |x| / 127`, a weight 8 bits with a scale per output channel. As
    pairs of `QuantizeLinear` and `DequantizeLinear`, which ONNX Runtime, OpenVINO and onnxruntime-web compute in
    integers. No range is measured, and none is shared: a sample's answer does not depend on its batch. A sample whose
    hidden state is not finite gets logits of NaN, which integers would hide.

    Convolutions and products of two activations stay as they are: on a CPU they gain nothing.

    Args:
        model (`onnx.ModelProto`): A part: tensors of a state in; these with `_out` and `logits` out.
    """
    source = copy.deepcopy(model.graph)
    graph = Graph()
    held = {tensor.name: tensor for tensor in source.initializer}
    graph.constants.extend(source.initializer)
    numbers = {"scale_one": np.float32(1), "zero_point": np.uint8(128), "one_127th": np.float32(1 / 127)}
    numbers |= {"smallest_scale": np.float32(_SMALLEST_SCALE), "last_axis": np.array([-1])}
    for name, number in numbers.items():
        graph.constant(name, number)
    tokens: dict[str, tuple[str, str]] = {}
    weights: dict[str, str] = {}
    for node in source.node:
        weight = held.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or len(weight.dims) != 2 or weight.data_type != TensorProto.FLOAT:
            graph.nodes.append(node)
            continue
        activation, name = node.input
        if activation not in tokens:
            tokens[activation] = _quantized_tokens(graph, activation)
        if name not in weights:
            weights[name] = _quantized_weight(graph, name, numpy_helper.to_array(weight))
        rounded, scale = tokens[activation]
        product = graph.add("MatMul", [rounded, weights[name]], f"{node.output[0]}_8_bits")
        graph.add("Mul", [product, scale], node.output[0])
    _pass_on_nan(graph, source)
    read = {name for node in graph.nodes for name in node.input}
    constants = [tensor for tensor in graph.constants if tensor.name in read]
    made = helper.make_graph(graph.nodes, source.name, list(source.input), list(source.output), constants)
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


def _quantized_tokens(graph: Graph, name: str) -> tuple[str, str]:
    """An activation `[..., K]` rounded to its 255 steps, as float, and the step of each token `[..., 1]`."""
    largest = graph.add("ReduceMax", [graph.add("Abs", [name], f"{name}_abs"), "last_axis"], f"{name}_max", keepdims=1)
    scale = graph.add("Mul", [largest, "one_127th"], f"{name}_step")
    scale = graph.add("Max", [scale, "smallest_scale"], f"{name}_scale")
    steps = graph.add("Div", [name, scale], f"{name}_steps")
    rounded = graph.add("QuantizeLinear", [steps, "scale_one", "zero_point"], f"{name}_u8")
    return graph.add("DequantizeLinear", [rounded, "scale_one", "zero_point"], f"{name}_rounded"), scale


def _quantized_weight(graph: Graph, name: str, weight: np.ndarray) -> str:
    """A matrix `[K, N]` as int8, each column with its scale, and where it is float again."""
    scale = np.maximum(np.abs(weight).max(0) / 127, _SMALLEST_SCALE).astype(np.float32)
    rounded = graph.constant(f"{name}_s8", np.rint(weight / scale).astype(np.int8))
    steps, zero = graph.constant(f"{name}_scale", scale), graph.constant(f"{name}_zero", np.zeros(len(scale), np.int8))
    return graph.add("DequantizeLinear", [rounded, steps, zero], f"{name}_rounded", axis=1)


def _pass_on_nan(graph: Graph, source: Any) -> None:
    """Make the logits NaN of each sample whose state, after the part or else before it, is not finite."""
    for node in graph.nodes:
        node.name = node.name.replace("logits", "logits_of_numbers") if node.name == "logits" else node.name
        for names in (node.input, node.output):
            names[:] = ["logits_of_numbers" if name == "logits" else name for name in names]
    logits = "logits_of_numbers"
    for entry in [entry for entry in source.output if entry.name != "logits"] or source.input:
        tensor, here = entry.type.tensor_type, f"{entry.name}_finite"
        if tensor.elem_type != TensorProto.FLOAT:
            continue
        axes = graph.constant(f"{here}_axes", np.arange(1, len(tensor.shape.dim)))
        # a sum, since a maximum passes over NaN
        size = graph.add("ReduceSum", [graph.add("Abs", [entry.name], f"{here}_abs"), axes], f"{here}_sum", keepdims=0)
        nothing = graph.add("Mul", [size, graph.constant(f"{here}_zero", np.float32(0))], f"{here}_zero_or_nan")
        column = graph.add("Unsqueeze", [nothing, graph.constant(f"{here}_last", np.array([1]))], f"{here}_column")
        logits = graph.add("Add", [logits, column], f"{here}_logits")
    graph.add("Identity", [logits], "logits")
