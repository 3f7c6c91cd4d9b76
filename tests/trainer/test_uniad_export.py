"""UniAD's graph in both engines: the same map as torch's, and in int8 only what may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch

from deploy.export import export_head
from deploy.quantize import quantize_head
from edge.bundle import Engine, Precision
from edge.inference.engines import open_graph
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.generic import generic_canvases
from trainer.methods.uniad.fit import UniADConfig, reconstructor, shares, standardisation, train
from trainer.methods.uniad.model import TAP_NAMES, Features, Sampling, UniADHead

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Taps = dict[str, npt.NDArray[np.float32]]

GRID = (4, 4)
SIDE = 16 * GRID[0]


@pytest.fixture(scope="module")
def taps() -> Taps:
    """Return taps of photographs: 48 to learn from, 24 to measure ranges on, 24 to compare on."""
    trunk = lite0_trunk()
    with torch.inference_mode():
        found = dict(zip(trunk.tap_names, trunk(torch.from_numpy(generic_canvases(SIDE))), strict=True))
    return {name: found[name].numpy().copy() for name in TAP_NAMES}


@pytest.fixture(scope="module", params=list(Sampling))
def head(request: pytest.FixtureRequest, taps: Taps) -> UniADHead:
    """Return a head of the edge's size that has learned a little: untrained, its part of the map would be noise."""
    config = UniADConfig(steps=40, sampling=request.param)
    learned = [torch.from_numpy(taps[name][::2]) for name in TAP_NAMES]
    tokens = Features(GRID, request.param)(*learned)
    mean, scale = standardisation(tokens)
    network = reconstructor(config, GRID, tokens.shape[2])
    network.initialise(torch.Generator().manual_seed(0))
    train(
        network,
        lambda rows: (tokens[rows] - mean) * scale,
        shares(None, len(tokens), 0.0),
        config,
        generator=torch.Generator().manual_seed(0),
        report=lambda _done: None,
    )
    return (
        UniADHead(network, mean, scale, torch.linspace(0.8, 1.2, 16).reshape(GRID), request.param)
        .eval()
        .requires_grad_(requires_grad=False)
    )


@pytest.fixture(scope="module")
def graphs(head: UniADHead, taps: Taps, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("uniad")
    exact, rounded = folder / "head.onnx", folder / "head.int8.onnx"
    export_head(head, exact, tap_shapes={name: tap.shape[1:] for name, tap in taps.items()})
    names = quantize_head(exact, rounded, [{name: tap[1::4] for name, tap in taps.items()}])
    assert names
    return exact, rounded


def seen(taps: Taps) -> Taps:
    return {name: np.ascontiguousarray(tap[3::4]) for name, tap in taps.items()}


def test_both_engines_give_torchs_map_whatever_brings_taps_to_the_grid(
    head: UniADHead, graphs: tuple[Path, Path], taps: Taps
) -> None:
    of = seen(taps)
    with torch.inference_mode():
        (wanted,) = head(*(torch.from_numpy(of[name]) for name in TAP_NAMES))
    assert wanted.shape[1:] == (2 * GRID[0], 2 * GRID[1])
    for engine in Engine:
        found = open_graph(graphs[0], engine=engine, precision=Precision.FLOAT32, threads=1).run(of)["anomaly_map"]
        assert np.abs(found - wanted.numpy()).max() <= 1e-4 * float(wanted.max()), engine


def test_int8_map_is_the_float_map_within_a_twentieth(graphs: tuple[Path, Path], taps: Taps) -> None:
    of = seen(taps)
    for engine in Engine:
        exact, rounded = (
            open_graph(path, engine=engine, precision=precision, threads=1).run(of)["anomaly_map"].copy()
            for path, precision in zip(graphs, (Precision.FLOAT32, Precision.INT8), strict=True)
        )
        # Of what the map varies by, which is less than the map.
        assert np.linalg.norm(rounded - exact) <= 0.05 * np.linalg.norm(exact - exact.mean()), engine


def test_only_products_with_weights_are_in_int8(graphs: tuple[Path, Path]) -> None:
    exact, rounded = (onnx.load(path).graph for path in graphs)
    made = {name: node for node in rounded.node for name in node.output}
    fed = [node for node in rounded.node if node.op_type != "QuantizeLinear"]
    int8 = {node.op_type for node in fed if any(made[i].op_type == "DequantizeLinear" for i in node.input if i in made)}
    assert int8 == {"MatMul"}
    weights = {tensor.name for tensor in exact.initializer if len(tensor.dims) == 2}
    dense = [node for node in exact.node if node.op_type == "MatMul" and node.input[1] in weights]
    # Of 2 + 2 layers: four of each attention, two of each feed-forward network, and the way in and out.
    assert len(dense) == 2 * (4 + 2) + 2 * (8 + 2) + 2
    in_int8 = [
        node for node in rounded.node if node.op_type == "MatMul" and made[node.input[1]].op_type == "DequantizeLinear"
    ]
    assert len(in_int8) == len(dense)
    kinds = {node.op_type for node in rounded.node}
    assert {"Softmax", "LayerNormalization"} <= kinds


def test_no_number_in_the_graph_is_too_large_for_half_precision(graphs: tuple[Path, Path]) -> None:
    for tensor in onnx.load(graphs[0]).graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            assert np.abs(value).max() < 65504, tensor.name
