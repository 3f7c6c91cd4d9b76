"""A tiny bundle whose head names the product that it sees: a dark one, a bright one, or none in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge.bundle import Bundle, Engine, Precision
from edge.inference.engines import open_graph
from edge.inference.preprocessing import cut_tiles, to_canvas
from edge.inference.sessions import ROUTE
from tests.edge.tiny_bundle import TAPS, good_frame, make_tiny_bundle, repack

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Tiles

DARK, BRIGHT = SUBCLASSES = ("dark", "bright")
BRIGHTER = 60
"""Grey levels from a frame of the dark product to one of the bright product."""


def dark_frame(seed: int) -> np.ndarray:
    """A frame of the first product; uint8 [96, 96, 3] BGR."""
    return bright_frame(seed, BRIGHTER)


def bright_frame(seed: int, darker: int = 0) -> np.ndarray:
    """A frame of the second product; of no product with about half of the levels less."""
    return good_frame(seed) - np.uint8(darker)


def make_routed_bundle(path: Path, *, tiles: Tiles | None = None) -> Bundle:
    """Write a bundle with a router and open it: ``route`` is how far the mean of the first tap lies beyond a margin."""
    bundle = make_tiny_bundle(path, tiles=tiles)
    dark, middle, bright = (_level(bundle, bright_frame(1, level)) for level in (BRIGHTER, BRIGHTER // 2, 0))
    # Which side is which, and how wide none of both is.
    sign = np.sign(bright - dark)
    margin = min(abs(bright - middle), abs(dark - middle)) / 2
    for name in ("head.onnx", "head.int8.onnx"):
        model = onnx.load(path / name)
        constants = {
            "route_axes": np.array([1, 2, 3], np.int64),
            "route_middle": np.array(middle, np.float32),
            "route_sides": np.array([[-sign, sign]], np.float32),
            "route_margin": np.array(margin, np.float32),
            "route_rows": np.array([-1, 1], np.int64),
        }
        model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
        model.graph.node.extend([
            helper.make_node("ReduceMean", [TAPS[0], "route_axes"], ["route_mean"], keepdims=0),
            helper.make_node("Sub", ["route_mean", "route_middle"], ["route_from"]),
            helper.make_node("Reshape", ["route_from", "route_rows"], ["route_column"]),
            helper.make_node("MatMul", ["route_column", "route_sides"], ["route_beyond"]),
            helper.make_node("Sub", ["route_beyond", "route_margin"], [ROUTE]),
        ])  # fmt: skip
        model.graph.output.append(helper.make_tensor_value_info(ROUTE, TensorProto.FLOAT, ["n", len(SUBCLASSES)]))
        onnx.checker.check_model(model)
        onnx.save(model, path / name)
    return repack(bundle, subclasses=SUBCLASSES)


def _level(bundle: Bundle, frame: np.ndarray) -> float:
    preprocessing = bundle.manifest.preprocessing
    trunk = open_graph(bundle.path / "trunk.onnx", engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    tiles = cut_tiles(to_canvas(frame, preprocessing), preprocessing)
    return float(trunk.run({"image": tiles})[TAPS[0]].mean())
