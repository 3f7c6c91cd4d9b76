"""A tiny bundle for two products, a dark one and a bright one, with or without a router and a state per product."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.adaptation.moments import Moments, Reference
from edge.adaptation.reference import tensors_of
from edge.adaptation.shift import shift_of
from edge.bundle import Bundle, Calibration, CalibrationScores, Engine, Graph, Precision, StateTensor
from edge.inference.engines import open_graph
from edge.inference.preprocessing import cut_tiles, join_maps, to_canvas
from edge.inference.sessions import PRODUCT, ROUTE
from edge.judgement.score import pool_score
from edge.products.product_file import ProductFile, write_product
from tests.edge.routed_bundle import BRIGHT, BRIGHTER, DARK, bright_frame, dark_frame
from tests.edge.tiny_bundle import CHANNELS, MAP_STRIDE, MOMENTS, POOLING, TAPS, make_tiny_bundle, repack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import Preprocessing

    Make = Callable[[int], npt.NDArray[np.uint8]]

PRODUCTS = (DARK, BRIGHT)
MAKE: dict[str, Make] = {DARK: dark_frame, BRIGHT: bright_frame}
BANKS = "product_banks"
ROWS = {DARK: 4, BRIGHT: 32}
"""Of the bank of each: the fewer there are, the higher good parts score, so the two have thresholds of their own."""
COUNT = 40
_DEPTH = sum(CHANNELS)


def broken(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The part with a bright red square in its middle."""
    found, (height, width) = image.copy(), image.shape[:2]
    found[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8] = (20, 20, 250)
    return found


def make_unified_bundle(
    path: Path, *, router: bool = True, takes_product: bool = True, moments: bool = False, seed: int = 0
) -> Bundle:
    """Write a bundle and open it; float32 alone.

    Args:
        path: folder to make.
        router: whether the head names the product that it sees, or none.
        takes_product: whether there is a bank for each product, chosen by the head's input; else one for both.
        moments: whether it carries those of each product.
        seed: of the frames that banks and scores are made from; another one gives another bundle.
    """
    bundle = make_tiny_bundle(path)
    preprocessing = bundle.manifest.preprocessing
    taps = {name: [_taps(path, preprocessing, make(seed + i)) for i in range(8)] for name, make in MAKE.items()}
    banks = np.stack([bank_of(found, ROWS[name]) for name, found in taps.items()])
    shared = np.concatenate(list(banks), axis=1)
    model = _head(banks if takes_product else shared[np.newaxis], takes_product=takes_product)
    if router:
        _add_router(model, path, preprocessing)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path / "head.onnx")
    (path / "head.int8.onnx").unlink()
    (path / "trunk.int8.onnx").unlink()
    for file in (path / "calibration").iterdir():
        file.unlink()
    (path / "state.safetensors").unlink()
    state = {BANKS: banks} if takes_product else {}
    if takes_product:
        save_file(state, path / "state.safetensors")
    changes: dict[str, Any] = {
        "products": PRODUCTS,
        "subclasses": PRODUCTS,
        "takes_product": takes_product,
        "product_state": tuple(state),
        "state": tuple(StateTensor(name=name, shape=values.shape) for name, values in state.items()),
        "state_file": "state.safetensors" if takes_product else None,
        "trunk": Graph(float32="trunk.onnx", id=bundle.manifest.trunk.id),
        "head": Graph(float32="head.onnx", id=bundle.manifest.head.id),
    }
    changes["calibration"] = _calibrate(path, preprocessing, state, takes_product=takes_product, seed=seed)
    changes["golden"] = _golden(path, preprocessing, state, takes_product=takes_product, bundle=bundle)
    if moments:
        _write_moments(path, preprocessing)
        changes["moments_file"] = MOMENTS
    return repack(bundle, **changes)


def make_product_file(
    path: Path, bundle: Bundle, make: Make, *, name: str = "added", scores: bool = False, rows: int = 16
) -> ProductFile:
    """Write the file of one more product, whose good parts ``make`` gives.

    Args:
        path: of the file.
        bundle: that it fits; its head takes a product.
        make: a good part, uint8 [H, W, 3] BGR, by number.
        name: of the product.
        scores: whether it carries scores of good parts, of ONNX Runtime in float32.
        rows: of its bank.
    """
    preprocessing = bundle.manifest.preprocessing
    bank = bank_of([_taps(bundle.path, preprocessing, make(i)) for i in range(8)], rows)
    calibration = None
    if scores:
        grown = {BANKS: bank[np.newaxis]}
        canvases = [to_canvas(make(200 + i), preprocessing) for i in range(COUNT)]
        maps = _maps(
            bundle.path, preprocessing, canvases, [0] * COUNT, grown, engine=Engine.ONNXRUNTIME, takes_product=True
        )
        calibration = _scores(maps)
    found = ProductFile(
        product=name, bundle=bundle.id, head=bundle.manifest.head.id, engine=Engine.ONNXRUNTIME,
        precision=Precision.FLOAT32, image="good.png", created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        state={BANKS: bank}, calibration=calibration,
    )  # fmt: skip
    write_product(path, found)
    return found


def bank_of(taps: list[dict[str, npt.NDArray[Any]]], rows: int) -> npt.NDArray[np.float32]:
    """Columns [D, 32] drawn from patches, only so many of them different ones."""
    patches = []
    for maps in taps:
        fine = maps[TAPS[0]]
        n, c, h, w = fine.shape
        pooled = fine.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        patches.append(np.concatenate([pooled, maps[TAPS[1]]], 1).transpose(0, 2, 3, 1).reshape(-1, _DEPTH))
    found = np.concatenate(patches)
    chosen = np.random.default_rng(3).choice(len(found), rows, replace=False)
    return np.ascontiguousarray(np.resize(found[chosen], (32, _DEPTH)).T, dtype=np.float32)


def _taps(path: Path, preprocessing: Preprocessing, image: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    trunk = open_graph(path / "trunk.onnx", engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    return dict(trunk.run({"image": cut_tiles(to_canvas(image, preprocessing), preprocessing)}))


def _head(banks: npt.NDArray[np.float32], *, takes_product: bool) -> onnx.ModelProto:
    """Distance of each patch to the nearest column of its product's bank [D, R]."""
    constants: dict[str, npt.NDArray[Any]] = {
        BANKS: np.zeros_like(banks) if takes_product else banks,
        "minus_two": np.array(-2, np.float32),
        "zero": np.array(0, np.float32),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "last": np.array([-1], np.int64),
    }
    chosen = [helper.make_node("Gather", [BANKS, PRODUCT], ["chosen"], axis=0)] if takes_product else []
    nodes = [
        *chosen,
        helper.make_node("Unsqueeze", ["chosen" if takes_product else BANKS, "one"], ["bank"]),
        helper.make_node("AveragePool", [TAPS[0]], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["pooled", TAPS[1]], ["patches"], axis=1),
        helper.make_node("Transpose", ["patches"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["grid", "bank"], ["dots"]),
        helper.make_node("Mul", ["dots", "minus_two"], ["cross"]),
        helper.make_node("ReduceSumSquare", ["grid", "last"], ["patch_norm"], keepdims=1),
        helper.make_node("ReduceSumSquare", ["bank", "two"], ["bank_norm"], keepdims=1),
        helper.make_node("Add", ["cross", "patch_norm"], ["partial"]),
        helper.make_node("Add", ["partial", "bank_norm"], ["squared"]),
        helper.make_node("ReduceMin", ["squared", "last"], ["nearest"], keepdims=0),
        helper.make_node("Max", ["nearest", "zero"], ["positive"]),
        helper.make_node("Sqrt", ["positive"], ["anomaly_map"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, f"h_{name}", f"w_{name}"])
        for name, channels in zip(TAPS, CHANNELS, strict=True)
    ]
    if takes_product:
        inputs.append(helper.make_tensor_value_info(PRODUCT, TensorProto.INT64, ["n"]))
    outputs = [helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["n", "h", "w"])]
    graph = helper.make_graph(
        nodes, "head", inputs, outputs, [numpy_helper.from_array(value, key) for key, value in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _add_router(model: onnx.ModelProto, path: Path, preprocessing: Preprocessing) -> None:
    """``route`` is how far the mean of the first tap lies beyond a margin to either side."""
    dark, middle, bright = (
        float(_taps(path, preprocessing, bright_frame(1, level))[TAPS[0]].mean())
        for level in (BRIGHTER, BRIGHTER // 2, 0)
    )
    sign = np.sign(bright - dark)
    constants = {
        "route_axes": np.array([1, 2, 3], np.int64),
        "route_middle": np.array(middle, np.float32),
        "route_sides": np.array([[-sign, sign]], np.float32),
        "route_margin": np.array(min(abs(bright - middle), abs(dark - middle)) / 2, np.float32),
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
    model.graph.output.append(helper.make_tensor_value_info(ROUTE, TensorProto.FLOAT, ["n", len(PRODUCTS)]))


def _maps(
    path: Path,
    preprocessing: Preprocessing,
    canvases: list[npt.NDArray[np.uint8]],
    products: list[int],
    state: dict[str, npt.NDArray[Any]],
    *,
    engine: Engine,
    takes_product: bool,
) -> npt.NDArray[np.float32]:
    """The maps of canvases, the long way round: one session each, no detector."""
    common: dict[str, Any] = {"engine": engine, "precision": Precision.FLOAT32, "threads": 1}
    trunk = open_graph(path / "trunk.onnx", **common)
    grown = [name for name, values in state.items() if len(values) >= len(PRODUCTS)]
    if state and not grown:
        # A product alone takes the first place of a state as large as the graph's.
        state = {name: np.concatenate([values] * len(PRODUCTS)) for name, values in state.items()}
    head = open_graph(path / "head.onnx", **common, state=state, more_rows=tuple(state))
    maps = []
    for canvas, product in zip(canvases, products, strict=True):
        inputs = dict(trunk.run({"image": cut_tiles(canvas, preprocessing)}))
        if takes_product:
            inputs[PRODUCT] = np.array([product], np.int64)
        maps.append(join_maps(head.run(inputs)["anomaly_map"], preprocessing, MAP_STRIDE).copy())
    return np.stack(maps)


def _scores(maps: npt.NDArray[np.float32], products: npt.NDArray[np.str_] | None = None) -> CalibrationScores:
    scores = np.array([pool_score(one, POOLING) for one in maps], np.float32)
    groups = np.array([f"part{index}" for index in range(len(maps))])
    return CalibrationScores(scores, maps.astype(np.float16), groups, products)


def _calibrate(
    path: Path, preprocessing: Preprocessing, state: dict[str, npt.NDArray[Any]], *, takes_product: bool, seed: int
) -> tuple[Calibration, ...]:
    canvases = [to_canvas(make(seed + 100 + i), preprocessing) for make in MAKE.values() for i in range(COUNT)]
    indices = [index for index in range(len(PRODUCTS)) for _ in range(COUNT)]
    entries = []
    for engine in Engine:
        maps = _maps(path, preprocessing, canvases, indices, state, engine=engine, takes_product=takes_product)
        found = _scores(maps, np.array([PRODUCTS[index] for index in indices]))
        name = f"calibration/{engine.value}-float32.npz"
        np.savez(path / name, scores=found.scores, maps=found.maps, groups=found.groups, products=found.products)
        entries.append(Calibration(engine=engine, precision=Precision.FLOAT32, file=name, count=len(maps)))
    return tuple(entries)


def _golden(
    path: Path,
    preprocessing: Preprocessing,
    state: dict[str, npt.NDArray[Any]],
    *,
    takes_product: bool,
    bundle: Bundle,
) -> dict[str, Any]:
    frames = [image for make in MAKE.values() for image in (make(900), broken(make(901)))]
    canvases, indices = [to_canvas(frame, preprocessing) for frame in frames], [0, 0, 1, 1]
    arrays: dict[str, npt.NDArray[Any]] = {"canvas": np.stack(canvases), PRODUCT: np.array(indices, np.int64)}
    for engine in Engine:
        maps = _maps(path, preprocessing, canvases, indices, state, engine=engine, takes_product=takes_product)
        arrays[f"score_{engine.value}_float32"] = np.array([pool_score(one, POOLING) for one in maps], np.float32)
    np.savez(path / bundle.manifest.golden.file, **arrays)
    tolerance = {f"{engine.value}_float32": 1e-3 for engine in Engine}
    return {"file": bundle.manifest.golden.file, "count": len(frames), "tolerance": tolerance}


def _write_moments(path: Path, preprocessing: Preprocessing) -> None:
    trunk = open_graph(path / "trunk.onnx", engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    moments, usual = [], []
    for make in MAKE.values():
        seen = []
        for i in range(COUNT):
            tiles = cut_tiles(to_canvas(make(100 + i), preprocessing), preprocessing)
            seen.append(joined([measure_canvas(tiles), measure_taps(trunk.run({"image": tiles}))]))
        mean = Moments(
            {name: np.mean([one.mean[name] for one in seen], axis=0, dtype=np.float32) for name in seen[0].mean},
            {name: np.mean([one.std[name] for one in seen], axis=0, dtype=np.float32) for name in seen[0].mean},
        )
        moments.append(mean)
        usual.append(float(np.quantile([shift_of(one, mean) for one in seen], 0.99)))
    save_file(tensors_of(Reference(tuple(moments), tuple(usual), PRODUCTS), Precision.FLOAT32), path / MOMENTS)
