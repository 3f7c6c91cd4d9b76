"""What a graph costs, counted on the file itself: multiply-accumulates of its matrix products and convolutions.

It must not know engines: what they fuse or skip is theirs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx
from onnx import shape_inference

from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_MATRICES = ("MatMul", "Gemm")
_CONVOLUTIONS = ("Conv",)


def multiply_accumulates(path: Path, input_shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the multiply-accumulates of one call.

    Only MatMul, Gemm and Conv count, as in published figures; normalisations, softmax and sums are not in them.

    Args:
        path: a graph.
        input_shapes: of every input.

    Raises:
        DataError: an input has no shape given, or the shape of an operand is not known then.
    """
    model = onnx.load(path)
    for value in model.graph.input:
        if value.name not in input_shapes:
            raise DataError(f"{path}: input {value.name} has no shape; give one")
        for dim, size in zip(value.type.tensor_type.shape.dim, input_shapes[value.name], strict=True):
            dim.dim_value = size
    for output in model.graph.output:  # what the exporter wrote of N would contradict what is inferred
        output.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = inferred.graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output, *graph.value_info)
    } | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type not in (*_MATRICES, *_CONVOLUTIONS):
            continue
        first, second, out = (shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
        if not (first and second and out) or 0 in (*first, *second, *out):
            raise DataError(f"{path}: the shapes of {node.name} are not known; fix the inputs' shapes")
        if node.op_type in _CONVOLUTIONS:
            total += math.prod(out) * math.prod(second[1:])
        else:
            turned = any(one.name == "transA" and one.i for one in node.attribute)
            total += math.prod(out) * first[-2 if turned else -1]
    return total


def parameters(path: Path) -> int:
    """Return the numbers in a graph's float initialisers; indices and shapes are none."""
    graph = onnx.load(path).graph
    return sum(math.prod(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
