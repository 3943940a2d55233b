"""Matrix products of an ONNX model in 8 bits, by each token's scale or fixed ranges: no sample meets another's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..serving.device.session import open_session, run_segment
from .onnx_graph import Graph
from .segment_graphs import quiet

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
    graph, held = Graph(), _matrices(source)
    graph.constants.extend(source.initializer)
    numbers = {"scale_one": np.float32(1), "zero_point": np.uint8(128), "one_127th": np.float32(1 / 127)}
    numbers |= {"smallest_scale": np.float32(_SMALLEST_SCALE), "last_axis": np.array([-1])}
    for name, number in numbers.items():
        graph.constant(name, number)
    tokens: dict[str, tuple[str, str]] = {}
    weights: dict[str, str] = {}
    for node in source.node:
        weight = held.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None:
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
    return _finished(graph, model)


def quantize_static(models: Sequence[Any], batches: Sequence[np.ndarray]) -> list[Any]:
    """Copies of the parts of a highway whose products with a constant matrix are computed in 8 bits, by fixed ranges.

    An activation's range, from its smallest to its largest number, is measured on images that run through the parts in
    order, in float; what lies outside is clipped. By ONNX Runtime's `quantize_static`. Since ranges are constants, a
    sample's answer does not depend on its batch; one that is not finite gets logits of NaN, as `quantize` says.

    Args:
        models (`Sequence[onnx.ModelProto]`): The parts, in the order in which they run.
        batches (`Sequence[np.ndarray]`): Images `[B, C, H, W]` float32.

    Raises:
        ValueError: There are no images, or a hidden state on the way is NaN or infinite.
    """
    if not batches:
        raise ValueError("there is no image to measure the ranges of activations on")
    states, made = [{"pixel_values": batch} for batch in batches], []
    for number, model in enumerate(models):
        for state in states:
            _check_finite(state, number)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "part.onnx"
            onnx.save(model, file)
            made.append(_in_ranges(model, states, file))
            session = open_session(file, None)
            states = [run_segment(session, state) for state in states]
    return made


def _check_finite(state: dict[str, np.ndarray], number: int) -> None:
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} is NaN or infinite before part {number} on an image that ranges of activations are measured "
                "on; leave such images out, or repair the model"
            )


def _in_ranges(model: Any, states: Sequence[dict[str, np.ndarray]], file: Path) -> Any:
    """One part, which is also in `file`."""
    from onnxruntime import quantization

    matrices = _matrices(model.graph)
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]
    if not products:  # of an empty list, ONNX Runtime would quantize all
        return _finished(_graph_of(model), model)
    target = file.with_name("quantized.onnx")
    needed = {entry.name for entry in model.graph.input}
    feeds = iter([{name: array for name, array in state.items() if name in needed} for state in states])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    # it advises to optimize the file first, which has been done
    with quiet("root"):
        quantization.quantize_static(
            file,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=products,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # otherwise products would be rounded to 8 bits too
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    return _finished(_graph_of(onnx.load(target)), model)


def _graph_of(model: Any) -> Graph:
    graph = Graph()
    graph.nodes.extend(copy.deepcopy(model.graph.node))
    graph.constants.extend(copy.deepcopy(model.graph.initializer))
    return graph


def _matrices(graph: Any) -> dict[str, Any]:
    """The constant matrices of float32, by name."""
    return {
        tensor.name: tensor
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }


def _finished(graph: Graph, model: Any) -> Any:
    """A model of these nodes with the inputs and outputs of another, that passes NaN on."""
    source = model.graph
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
    """Make the state and the logits NaN of each sample whose state before or after the part is not finite.

    Both: integers may hide it where no residual connection goes around them, as in Swin's merging of patches.
    """
    names = {entry.name: f"{entry.name}_of_numbers" for entry in source.output}
    for node in graph.nodes:
        node.name = names.get(node.name, node.name)
        for places in (node.input, node.output):
            places[:] = [names.get(name, name) for name in places]
    before = [_zero_or_nan(graph, entry.name, entry) for entry in source.input if _is_float(entry)]
    *state, logits = source.output
    after = []
    for entry in state:
        graph.add("Identity", [_plus(graph, names[entry.name], before, entry)], entry.name)
        if _is_float(entry):
            after.append(_zero_or_nan(graph, entry.name, entry))
    graph.add("Identity", [_plus(graph, names[logits.name], after or before, logits)], logits.name)


def _is_float(entry: Any) -> bool:
    return bool(entry.type.tensor_type.elem_type == TensorProto.FLOAT)


def _zero_or_nan(graph: Graph, name: str, entry: Any) -> str:
    """`[B]`: 0 for a sample that is finite in a tensor of the state, otherwise NaN."""
    here = f"{name}_finite"
    axes = graph.constant(f"{here}_axes", np.arange(1, len(entry.type.tensor_type.shape.dim)))
    # a sum, since a maximum passes over NaN
    size = graph.add("ReduceSum", [graph.add("Abs", [name], f"{here}_abs"), axes], f"{here}_sum", keepdims=0)
    return graph.add("Mul", [size, graph.constant(f"{here}_zero", np.float32(0))], f"{here}_zero_or_nan")


def _plus(graph: Graph, name: str, numbers: Sequence[str], entry: Any) -> str:
    """A tensor with a number `[B]` added to all that it has of a sample; one that is not float as it is."""
    if not _is_float(entry):
        return name
    axes = graph.constant(f"{name}_axes", np.arange(1, len(entry.type.tensor_type.shape.dim)))
    for place, number in enumerate(numbers):
        column = graph.add("Unsqueeze", [number, axes], f"{name}_column_{place}")
        name = graph.add("Add", [name, column], f"{name}_{place}")
    return name
