"""A search for the nearest row, done block by block: the same numbers, without writing all distances to memory first.

Knows OpenVINO's graphs and nothing of banks: it looks for a matrix product of which each row's minimum is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

# A block of products stays in a core's second-level cache, with room for what else is there (1 to 2 MiB on most).
# 3,136 queries x 500 rows are 6.3 MB: trunk and head of a memory detector took 5 to 8 % less processor time in blocks
# of 1 MiB than in one piece (one thread, int8 and float32), the head alone up to a fifth less beside other work.
BLOCK_BYTES = 1 << 20
_FLOAT_BYTES = 4
_ROW_AXIS = -2


@dataclass(frozen=True, slots=True)
class _Search:
    """A product, what is done to each element of it, and the minimum over its last axis."""

    product: Any
    steps: tuple[Any, ...]
    minimum: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.product.get_output_shape(0))


def block_searches(model: Any, *, block_bytes: int = BLOCK_BYTES) -> int:  # noqa: ANN401 openvino has no type information
    """Cut every large search of a graph into blocks of queries, in place.

    Args:
        model: an ``openvino.Model``; searches whose shape is not static are left alone.
        block_bytes: of products, at most, as long as a block has one query.

    Returns:
        How many searches were cut.
    """
    cut = 0
    for node in model.get_ordered_ops():
        search = _search_of(node) if node.get_type_name() == "ReduceMin" else None
        if search is None:
            continue
        blocks = -(-int(np.prod(search.shape)) * _FLOAT_BYTES // block_bytes)
        rows = search.shape[_ROW_AXIS]
        if blocks > 1 and rows > 1:
            _cut(search, [len(part) for part in np.array_split(np.arange(rows), min(blocks, rows))])
            cut += 1
    if cut:
        model.validate_nodes_and_infer_types()
    return cut


def _search_of(minimum: Any) -> _Search | None:  # noqa: ANN401 (as above)
    shape = minimum.input_value(0).get_partial_shape()
    if not (shape.is_static and _is_over_last_axis(minimum, len(shape))):
        return None
    steps: list[Any] = []
    node = minimum.input_value(0).get_node()
    while node.get_type_name() in ("Add", "Subtract", "Multiply"):
        steps.append(node)
        followed = _operand(node, shape.to_shape())
        if followed is None:
            return None
        node = node.input_value(followed).get_node()
    if node.get_type_name() != "MatMul" or any(_consumers(one) != 1 for one in (node, *steps)):
        return None
    queries = node.input_value(0).get_partial_shape()
    whole = queries.is_static and len(queries) == len(shape) and node.get_output_partial_shape(0) == shape
    return _Search(node, tuple(reversed(steps)), minimum) if whole else None


def _is_over_last_axis(minimum: Any, rank: int) -> bool:  # noqa: ANN401 (as above)
    axes = minimum.input_value(1).get_node()
    if axes.get_type_name() != "Constant" or rank < 2:  # noqa: PLR2004 (rows and columns)
        return False
    return {int(axis) % rank for axis in axes.data.ravel()} == {rank - 1}


def _operand(step: Any, shape: Sequence[int]) -> int | None:  # noqa: ANN401 (as above)
    """Which operand the products come by; None unless the other one is the same for every query."""
    shapes = [step.input_value(index).get_partial_shape() for index in range(2)]
    if not all(one.is_static for one in shapes):
        return None
    sizes = [list(one.to_shape()) for one in shapes]
    whole = [size == list(shape) for size in sizes]
    if whole.count(True) != 1:
        return None
    other = sizes[whole.index(False)]
    same_for_all = len(other) < -_ROW_AXIS or other[_ROW_AXIS] == 1
    return whole.index(True) if same_for_all else None


def _consumers(node: Any) -> int:  # noqa: ANN401 (as above)
    return len(node.output(0).get_target_inputs())


def _cut(search: _Search, sizes: Sequence[int]) -> None:
    from openvino import opset13  # noqa: PLC0415 a box may have the other engine only

    kinds = {"Add": opset13.add, "Subtract": opset13.subtract, "Multiply": opset13.multiply}
    product, minimum = search.product, search.minimum
    axis = len(search.shape) + _ROW_AXIS
    turned, other_turned = (product.get_attributes()[f"transpose_{side}"] for side in "ab")
    # Of queries that lie in columns, blocks of columns.
    queries = opset13.variadic_split(product.input_value(0), axis + 1 if turned else axis, list(sizes))
    found = []
    for index in range(len(sizes)):
        value = opset13.matmul(queries.output(index), product.input_value(1), turned, other_turned)
        for step in search.steps:
            followed = _operand(step, search.shape)
            operands = [step.input_value(side) if side != followed else value for side in range(2)]
            value = kinds[step.get_type_name()](*operands)
        found.append(opset13.reduce_min(value, minimum.input_value(1), minimum.get_attributes()["keep_dims"]))
    joined = opset13.concat(found, axis)
    joined.output(0).set_names(minimum.output(0).get_names())
    for target in minimum.output(0).get_target_inputs():
        target.replace_source_output(joined.output(0))
