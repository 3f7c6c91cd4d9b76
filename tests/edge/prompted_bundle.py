"""A tiny bundle whose head is told each of two products by the embedding of one good image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from edge.bundle import Bundle, Calibration, Engine, Graph, Precision, StateTensor, Tiles
from edge.inference.engines import open_graph
from edge.inference.preprocessing import cut_tiles, join_maps, to_canvas
from edge.inference.sessions import EMBEDDING, PRODUCT
from edge.judgement.score import pool_score
from edge.products.product_file import PROMPTS
from tests.edge.routed_bundle import bright_frame, dark_frame
from tests.edge.tiny_bundle import CHANNELS, MAP_STRIDE, POOLING, TAPS, make_tiny_bundle, repack

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

PRODUCTS = ("dark", "bright")
MAKE = {"dark": dark_frame, "bright": bright_frame}
COUNT = 12
_DEPTH = CHANNELS[1]


def make_prompted_bundle(path: Path, *, tiles: int = 1) -> Bundle:
    """Write a bundle, float32 alone, whose map is how far each patch lies from the prompt's at its place.

    Args:
        path: folder to make.
        tiles: beside each other.
    """
    bundle = make_tiny_bundle(path, tiles=Tiles(cols=tiles))
    for name in ("head.int8.onnx", "trunk.int8.onnx", "state.safetensors"):
        (path / name).unlink()
    for file in (path / "calibration").iterdir():
        file.unlink()
    canvases = {
        name: [to_canvas(make(i), bundle.manifest.preprocessing) for i in range(COUNT)] for name, make in MAKE.items()
    }
    sites = (bundle.manifest.preprocessing.height // MAP_STRIDE) ** 2
    onnx.save(_head(len(PRODUCTS), sites), path / "head.onnx")
    none = np.zeros((len(PRODUCTS), sites, _DEPTH), np.float32)
    prompts = np.stack([
        _run(bundle, canvases[name][0], none, 0, Engine.ONNXRUNTIME)[EMBEDDING][0] for name in PRODUCTS
    ])  # fmt: skip
    save_file({PROMPTS: prompts}, path / "state.safetensors")
    entries = []
    images = [(canvas, index) for index, name in enumerate(PRODUCTS) for canvas in canvases[name][1:]]
    golden: dict[str, npt.NDArray[Any]] = {
        "canvas": np.stack([canvas for canvas, _ in images[:: COUNT - 1]]),
        PRODUCT: np.arange(len(PRODUCTS)),
    }
    for engine in Engine:
        maps = np.stack([_map(bundle, canvas, prompts, index, engine) for canvas, index in images])
        scores = np.array([pool_score(one, POOLING) for one in maps], np.float32)
        file = f"calibration/{engine.value}-float32.npz"
        np.savez(
            path / file,
            scores=scores,
            maps=maps.astype(np.float16),
            groups=np.arange(len(maps)).astype(np.str_),
            products=np.array([PRODUCTS[index] for _, index in images]),
        )
        entries.append(Calibration(engine=engine, precision=Precision.FLOAT32, file=file, count=len(maps)))
        golden[f"score_{engine.value}_float32"] = scores[:: COUNT - 1]
    np.savez(path / bundle.manifest.golden.file, **golden)
    return repack(
        bundle,
        products=PRODUCTS,
        subclasses=PRODUCTS,
        takes_product=True,
        product_state=(PROMPTS,),
        state=(StateTensor(name=PROMPTS, shape=prompts.shape),),
        taps=(TAPS[1],),
        trunk=Graph(float32="trunk.onnx", id=bundle.manifest.trunk.id),
        head=Graph(float32="head.onnx", id=bundle.manifest.head.id),
        calibration=tuple(entries),
        golden={
            "file": bundle.manifest.golden.file,
            "count": len(PRODUCTS),
            "tolerance": {f"{engine.value}_float32": 1e-3 for engine in Engine},
        },
    )


def _map(
    bundle: Bundle, canvas: npt.NDArray[np.uint8], prompts: npt.NDArray[np.float32], product: int, engine: Engine
) -> npt.NDArray[np.float32]:
    found = _run(bundle, canvas, prompts, product, engine)["anomaly_map"]
    return join_maps(found, bundle.manifest.preprocessing, MAP_STRIDE).copy()


def _run(
    bundle: Bundle, canvas: npt.NDArray[np.uint8], prompts: npt.NDArray[np.float32], product: int, engine: Engine
) -> dict[str, npt.NDArray[Any]]:
    common: dict[str, Any] = {"engine": engine, "precision": Precision.FLOAT32, "threads": 1}
    tiles = cut_tiles(canvas, bundle.manifest.preprocessing)
    trunk = open_graph(bundle.path / "trunk.onnx", **common, outputs=[TAPS[1]])
    head = open_graph(bundle.path / "head.onnx", **common, state={PROMPTS: prompts})
    inputs = {TAPS[1]: np.array(trunk.run({"image": tiles})[TAPS[1]]), PRODUCT: np.full(len(tiles), product)}
    return {name: np.array(values) for name, values in head.run(inputs).items()}


def _head(products: int, sites: int) -> onnx.ModelProto:
    side = int(sites**0.5)
    constants: dict[str, npt.NDArray[Any]] = {
        PROMPTS: np.zeros((products, sites, _DEPTH), np.float32),
        "rows": np.array([0, _DEPTH, -1], np.int64),
        "last": np.array([-1], np.int64),
        "grid": np.array([0, side, side], np.int64),
    }
    nodes = [
        helper.make_node("Reshape", [TAPS[1], "rows"], ["flat"]),
        helper.make_node("Transpose", ["flat"], [EMBEDDING], perm=[0, 2, 1]),
        helper.make_node("Gather", [PROMPTS, PRODUCT], ["prompt"], axis=0),
        helper.make_node("Sub", [EMBEDDING, "prompt"], ["apart"]),
        helper.make_node("ReduceL2", ["apart", "last"], ["distance"], keepdims=0),
        helper.make_node("Reshape", ["distance", "grid"], ["anomaly_map"]),
    ]
    inputs = [
        helper.make_tensor_value_info(TAPS[1], TensorProto.FLOAT, ["n", _DEPTH, "h", "w"]),
        helper.make_tensor_value_info(PRODUCT, TensorProto.INT64, ["n"]),
    ]
    outputs = [
        helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["n", "h", "w"]),
        helper.make_tensor_value_info(EMBEDDING, TensorProto.FLOAT, ["n", "l", _DEPTH]),
    ]
    graph = helper.make_graph(
        nodes, "head", inputs, outputs, [numpy_helper.from_array(value, key) for key, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
