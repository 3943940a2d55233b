"""Weights of matrix products in 8 bits, inside branches too."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto
from onnxruntime.quantization import QuantType, quantize_dynamic

from .segment_graphs import quiet


def quantize(source: Path | ModelProto, target: Path) -> None:
    """Write an ONNX model with the weights of its `MatMul`s as int8; what they meet is quantized as it comes.

    Convolutions and products of two activations stay as they are: on a CPU they gain nothing.

    Args:
        source (`Path` or `ModelProto`): An ONNX file, or what is in it.
        target (`Path`): The file to write.
    """
    # on the root logger, it advises a preparation that does not enter branches
    with quiet(""):
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # what lies inside an `If` is a graph of its own, which it would otherwise leave alone
            extra_options={"EnableSubgraph": True},
        )
