"""Weights of matrix products in 8 bits, inside branches too."""

from __future__ import annotations

import logging
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic


def quantize(source: Path, target: Path) -> None:
    """Write an ONNX file again with the weights of its `MatMul`s as int8; what they meet is quantized as it comes.

    Convolutions and products of two activations stay as they are: on a CPU they gain nothing.

    Args:
        source (`Path`), target (`Path`): ONNX files, the second to be written.
    """
    logger = logging.getLogger()
    level = logger.level
    # it advises, on the root logger, a preparation that does not enter branches
    logger.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # what lies inside an `If` is a graph of its own, which it would otherwise leave alone
            extra_options={"EnableSubgraph": True},
        )
    finally:
        logger.setLevel(level)
