"""A search cut into blocks gives the same bits, and whatever is not quite such a search is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import openvino
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13

from edge.bundle import Engine, Precision
from edge.inference.engines import open_graph
from edge.inference.openvino_session import core
from edge.inference.search_blocks import block_searches

if TYPE_CHECKING:
    from pathlib import Path

DEPTH = 8


def search(
    batch: int,
    rows: int,
    bank: int,
    *,
    turned: bool = False,
    axis: int = -1,
    keep: bool = False,
    other: tuple[int, ...] = (),
    watched: bool = False,
) -> openvino.Model:
    """Squared distances of [batch, rows, DEPTH] to a bank, less the queries' norms, and their minimum."""
    rng = np.random.default_rng(0)
    shape = [batch, DEPTH, rows] if turned else [batch, rows, DEPTH]
    queries = opset13.parameter(shape, openvino.Type.f32, name="x")
    queries.output(0).set_names({"x"})
    memory = rng.normal(size=(bank, DEPTH)).astype(np.float32)
    product = opset13.matmul(queries, opset13.constant(memory), turned, transpose_b=True)
    doubled = opset13.multiply(product, opset13.constant(np.float32(2)))
    norms = opset13.constant((memory**2).sum(1) if not other else rng.normal(size=other).astype(np.float32))
    distances = opset13.subtract(norms, doubled)
    least = opset13.reduce_min(distances, opset13.constant(np.array([axis])), keep_dims=keep)
    least.output(0).set_names({"least"})
    outputs = [opset13.relu(least)] + ([product] if watched else [])
    return openvino.Model(outputs, [queries], "search")


def result(model: openvino.Model) -> list[np.ndarray]:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    values = np.random.default_rng(1).normal(size=model.input(0).shape).astype(np.float32)
    found = compiled.create_infer_request().infer({"x": values})
    return [np.array(found[port]) for port in compiled.outputs]


def kinds(model: openvino.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(2, 40),
    bank=st.integers(1, 30),
    turned=st.booleans(),
    keep=st.booleans(),
    kilobytes=st.integers(1, 4),
)
def test_blocks_give_the_same_bits(
    *, batch: int, rows: int, bank: int, turned: bool, keep: bool, kilobytes: int
) -> None:
    whole = search(batch, rows, bank, turned=turned, keep=keep)
    blocks = search(batch, rows, bank, turned=turned, keep=keep)
    large = batch * rows * bank * 4 > kilobytes * 1024
    assert block_searches(blocks, block_bytes=kilobytes * 1024) == large
    assert kinds(blocks).count("MatMul") == min(rows, -(-batch * rows * bank * 4 // (kilobytes * 1024)))
    assert blocks.output(0).get_partial_shape() == whole.output(0).get_partial_shape()
    (found,), (expected,) = result(blocks), result(whole)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 1},
        {"watched": True},
        {"other": (1, 20, 30)},
        {"other": (20, 1)},
        {"other": (1, 1, 1), "axis": -2},
    ],
    ids=["another axis", "products are used elsewhere", "a value per product", "a value per query", "axis of queries"],
)
def test_what_is_no_search_of_independent_queries_is_left_alone(options: dict[str, Any]) -> None:
    model = search(1, 20, 30, **options)
    before = kinds(model)
    assert block_searches(model, block_bytes=64) == 0
    assert kinds(model) == before


def test_varying_shapes_are_left_alone() -> None:
    model = search(1, 20, 30)
    model.reshape({"x": [-1, -1, DEPTH]})
    assert block_searches(model, block_bytes=64) == 0


def test_graphs_are_opened_in_blocks(tmp_path: Path) -> None:
    bank = np.random.default_rng(0).normal(size=(DEPTH, 400)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "bank"], ["again"]),
        helper.make_node("ReduceMin", ["again", "last"], ["least"], keepdims=0),
    ]
    constants = [numpy_helper.from_array(bank, "bank"), numpy_helper.from_array(np.array([-1]), "last")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "rows", DEPTH])]
    outputs = [helper.make_tensor_value_info("least", TensorProto.FLOAT, ["n", "rows"])]
    graph = helper.make_graph(nodes, "search", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "s.onnx")
    for rows, blocks in ((700, 2), (600, 1)):
        session = open_graph(
            tmp_path / "s.onnx",
            engine=Engine.OPENVINO,
            precision=Precision.FLOAT32,
            threads=1,
            input_shapes={"x": (1, rows, DEPTH)},
        )
        assert session.output_names == ("least",)
        executed = [node.get_rt_info()["layerType"] for node in session._compiled.get_runtime_model().get_ops()]
        assert executed.count("FullyConnected") + executed.count("MatMul") == blocks
        values = np.random.default_rng(2).normal(size=(1, rows, DEPTH)).astype(np.float32)
        assert np.allclose(session.run({"x": values})["least"], (values @ bank).min(-1), atol=1e-4)
