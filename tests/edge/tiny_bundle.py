"""A complete, valid, tiny bundle on disk for tests of the box: two small graphs, int8 twins, calibration, golden.

Uses edge's own sessions and pooling for its figures; needs onnx and both engines.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from safetensors.numpy import save_file

from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.adaptation.moments import Moments, Reference
from edge.adaptation.reference import tensors_of
from edge.adaptation.shift import shift_of
from edge.bundle import (
    MANIFEST,
    Bundle,
    Calibration,
    Engine,
    Golden,
    Graph,
    Manifest,
    Pooling,
    Precision,
    Preprocessing,
    Provenance,
    StateTensor,
    Tiles,
    manifest_bytes,
    sha256_file,
)
from edge.inference.engines import open_graph
from edge.inference.onnx_file import with_initialisers
from edge.inference.preprocessing import cut_tiles, join_maps, to_canvas
from edge.judgement.score import pool_score

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

PAIRS = tuple((engine, precision) for engine in Engine for precision in (Precision.FLOAT32, Precision.INT8))
TAPS = ("stride4", "stride8")
CHANNELS = (8, 12)
BANK_ROWS = 32
MAP_STRIDE = 8
POOLING = Pooling(cells=3)
CALIBRATION_FRAMES = 40
MOMENTS = "moments.safetensors"


def good_frame(seed: int, *, height: int = 96, width: int = 96) -> npt.NDArray[np.uint8]:
    """A good part: a smooth gradient with a little noise; uint8 [height, width, 3] BGR."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 90 + 40 * x / width + 20 * y / height + rng.normal(0, 1)
    image = base[..., np.newaxis] + np.array([0.0, 8.0, 16.0]) + rng.normal(0, 3, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def defective_frame(seed: int, *, height: int = 96, width: int = 96) -> npt.NDArray[np.uint8]:
    """The same part with a bright red square in its middle."""
    image = good_frame(seed, height=height, width=width)
    image[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8] = (20, 20, 250)
    return image


def make_tiny_bundle(
    path: Path,
    *,
    product: str = "tiny",
    size: int = 64,
    tiles: Tiles | None = None,
    state: bool = True,
    moments: bool = False,
) -> Bundle:
    """Write a bundle and open it.

    Args:
        path: folder to make.
        product: name in the manifest.
        size: side of a tile in pixels, a multiple of 32.
        tiles: how the canvas is cut; one tile where None.
        state: whether the bank is a state tensor named ``bank`` (the graphs then hold zeros) or fixed in the graphs.
        moments: whether it carries the moments of good frames, so that a box can follow the light.
    """
    path.mkdir(parents=True)
    preprocessing = Preprocessing(height=size, width=size, tiles=tiles or Tiles())
    canvases = [to_canvas(good_frame(seed), preprocessing) for seed in range(CALIBRATION_FRAMES + 8)]
    images = [cut_tiles(canvas, preprocessing) for canvas in canvases]

    onnx.save(_trunk(), path / "trunk.onnx")
    _quantise(path / "trunk.onnx", path / "trunk.int8.onnx", [{"image": image} for image in images[:8]])
    trunk = open_graph(path / "trunk.onnx", engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    taps = [dict(trunk.run({"image": image})) for image in images[-8:]]
    bank = _bank(taps)
    onnx.save(_head(bank), path / "head.onnx")
    _quantise(path / "head.onnx", path / "head.int8.onnx", taps)

    tensors = {"bank": bank} if state else {}
    if state:
        save_file(tensors, path / "state.safetensors")
        for name in ("head.onnx", "head.int8.onnx"):
            model = (path / name).read_bytes()
            (path / name).write_bytes(with_initialisers(model, {"bank": np.zeros_like(bank)}))

    calibration = _calibrate(path, preprocessing, canvases[:CALIBRATION_FRAMES], tensors)
    golden = _golden(path, preprocessing, tensors)
    if moments:
        write_moments(path, preprocessing, canvases)
    return _pack(
        path,
        product=product,
        preprocessing=preprocessing,
        calibration=calibration,
        golden=golden,
        bank_shape=bank.shape if state else None,
        moments_file=MOMENTS if moments else None,
    )


def write_moments(path: Path, preprocessing: Preprocessing, canvases: list[npt.NDArray[np.uint8]]) -> None:
    """Write what good canvases show to each precision's trunk, as a bundle carries it."""
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for precision in (Precision.FLOAT32, Precision.INT8):
        suffix = ".int8.onnx" if precision is Precision.INT8 else ".onnx"
        trunk = open_graph(path / f"trunk{suffix}", engine=Engine.ONNXRUNTIME, precision=precision, threads=1)
        seen = []
        for canvas in canvases:
            tiles = cut_tiles(canvas, preprocessing)
            seen.append(joined([measure_canvas(tiles), measure_taps(trunk.run({"image": tiles}))]))
        reference = Moments(
            {name: np.mean([one.mean[name] for one in seen], axis=0, dtype=np.float32) for name in seen[0].mean},
            {name: np.mean([one.std[name] for one in seen], axis=0, dtype=np.float32) for name in seen[0].mean},
        )
        usual = float(np.quantile([shift_of(one, reference) for one in seen], 0.99))
        tensors |= tensors_of(Reference((reference,), (usual,), ("",)), precision)
    save_file(tensors, path / MOMENTS)


def maps_of(
    path: Path,
    preprocessing: Preprocessing,
    canvases: list[npt.NDArray[np.uint8]],
    state: dict[str, npt.NDArray[Any]],
    *,
    engine: Engine,
    precision: Precision,
) -> list[npt.NDArray[np.float32]]:
    """The maps of canvases, the long way round: one session each, no detector."""
    suffix = ".int8.onnx" if precision is Precision.INT8 else ".onnx"
    trunk = open_graph(path / f"trunk{suffix}", engine=engine, precision=precision, threads=1)
    head = open_graph(path / f"head{suffix}", engine=engine, precision=precision, threads=1, state=state)
    maps = []
    for canvas in canvases:
        taps = trunk.run({"image": cut_tiles(canvas, preprocessing)})
        maps.append(join_maps(head.run(taps)["anomaly_map"], preprocessing, MAP_STRIDE).copy())
    return maps


def repack(bundle: Bundle, **changes: Any) -> Bundle:
    """Write the manifest again with other fields and the hashes of what lies in the folder now, and open it."""
    files = {
        str(file.relative_to(bundle.path)): sha256_file(file)
        for file in bundle.path.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }
    content = {**bundle.manifest.model_dump(), **changes, "files": files}
    (bundle.path / MANIFEST).write_bytes(manifest_bytes(Manifest.model_validate(content)))
    return Bundle.open(bundle.path)


def _trunk() -> onnx.ModelProto:
    rng = np.random.default_rng(7)
    weights = {
        "mean": np.full((1, 3, 1, 1), 127, np.float32),
        "scale": np.full((1, 3, 1, 1), 1 / 128, np.float32),
        "w1": rng.normal(0, 0.3, (CHANNELS[0], 3, 4, 4)).astype(np.float32),
        "w2": rng.normal(0, 0.3, (CHANNELS[1], CHANNELS[0], 2, 2)).astype(np.float32),
        "b1": np.full(CHANNELS[0], 0.5, np.float32),
        "b2": np.full(CHANNELS[1], 0.5, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float_image"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float_image"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["normal"]),
        helper.make_node("Conv", ["normal", "w1", "b1"], ["conv1"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Relu", ["conv1"], [TAPS[0]]),
        helper.make_node("Conv", [TAPS[0], "w2", "b2"], ["conv2"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Relu", ["conv2"], [TAPS[1]]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", "height", "width", 3])
    taps = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, f"h_{name}", f"w_{name}"])
        for name, channels in zip(TAPS, CHANNELS, strict=True)
    ]
    return _model("trunk", nodes, [image], taps, weights)


def _head(bank: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """Euclidean distance of each patch (both taps at stride 8) to the nearest column of the bank [D, R]."""
    depth = sum(CHANNELS)
    constants = {
        "bank": bank,
        "minus_two": np.array(-2, np.float32),
        "zero": np.array(0, np.float32),
        "rows": np.array([0, -1, depth], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([-1], np.int64),
    }
    nodes = [
        helper.make_node("AveragePool", [TAPS[0]], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["pooled", TAPS[1]], ["patches"], axis=1),
        helper.make_node("Transpose", ["patches"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["grid", "rows"], ["embedding"]),
        helper.make_node("MatMul", ["grid", "bank"], ["dots"]),
        helper.make_node("Mul", ["dots", "minus_two"], ["cross"]),
        helper.make_node("ReduceSumSquare", ["grid", "last"], ["patch_norm"], keepdims=1),
        helper.make_node("ReduceSumSquare", ["bank", "first"], ["bank_norm"], keepdims=0),
        helper.make_node("Add", ["cross", "patch_norm"], ["partial"]),
        helper.make_node("Add", ["partial", "bank_norm"], ["squared"]),
        helper.make_node("ReduceMin", ["squared", "last"], ["nearest"], keepdims=0),
        helper.make_node("Max", ["nearest", "zero"], ["positive"]),
        helper.make_node("Sqrt", ["positive"], ["anomaly_map"]),
    ]
    taps = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, f"h_{name}", f"w_{name}"])
        for name, channels in zip(TAPS, CHANNELS, strict=True)
    ]
    outputs = [
        helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["n", "h", "w"]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", "l", depth]),
    ]
    return _model("head", nodes, taps, outputs, constants)


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, npt.NDArray[Any]],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, name, inputs, outputs, [numpy_helper.from_array(value, key) for key, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Feeds(CalibrationDataReader):
    def __init__(self, feeds: list[dict[str, npt.NDArray[Any]]]) -> None:
        self._feeds: Iterator[dict[str, npt.NDArray[Any]]] = iter(feeds)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return next(self._feeds, None)


def _quantise(source: Path, target: Path, feeds: list[dict[str, npt.NDArray[Any]]]) -> None:
    logging.disable(logging.WARNING)  # it advises a symbolic shape inference that these graphs do not need
    try:
        quantize_static(
            source,
            target,
            _Feeds(feeds),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            op_types_to_quantize=["Conv", "MatMul"],
            # Keeps the float32 initialiser in the file, so that a new state passes through the same quantisation.
            extra_options={"AddQDQPairToWeight": True},
        )
    finally:
        logging.disable(logging.NOTSET)


def _bank(taps: list[dict[str, npt.NDArray[Any]]]) -> npt.NDArray[np.float32]:
    """Columns [D, BANK_ROWS] drawn from the patches of good frames."""
    rows = []
    for maps in taps:
        fine = maps[TAPS[0]]
        n, c, h, w = fine.shape
        pooled = fine.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        rows.append(np.concatenate([pooled, maps[TAPS[1]]], 1).transpose(0, 2, 3, 1).reshape(-1, sum(CHANNELS)))
    patches = np.concatenate(rows)
    chosen = np.random.default_rng(3).choice(len(patches), BANK_ROWS, replace=False)
    return np.ascontiguousarray(patches[chosen].T, dtype=np.float32)


def _calibrate(
    path: Path,
    preprocessing: Preprocessing,
    canvases: list[npt.NDArray[np.uint8]],
    state: dict[str, npt.NDArray[Any]],
) -> tuple[Calibration, ...]:
    (path / "calibration").mkdir()
    entries = []
    for engine, precision in PAIRS:
        maps = maps_of(path, preprocessing, canvases, state, engine=engine, precision=precision)
        name = f"calibration/{engine.value}-{precision.value}.npz"
        np.savez(
            path / name,
            scores=np.array([pool_score(item, POOLING) for item in maps], np.float32),
            maps=np.stack(maps).astype(np.float16),
            groups=np.array([f"part{index}" for index in range(len(maps))]),
        )
        entries.append(Calibration(engine=engine, precision=precision, file=name, count=len(maps)))
    return tuple(entries)


def _golden(path: Path, preprocessing: Preprocessing, state: dict[str, npt.NDArray[Any]]) -> Golden:
    (path / "golden").mkdir()
    canvases = [to_canvas(frame, preprocessing) for frame in (good_frame(900), defective_frame(901))]
    arrays: dict[str, npt.NDArray[Any]] = {"canvas": np.stack(canvases)}
    for engine, precision in PAIRS:
        maps = maps_of(path, preprocessing, canvases, state, engine=engine, precision=precision)
        arrays[f"score_{engine.value}_{precision.value}"] = np.array(
            [pool_score(item, POOLING) for item in maps], np.float32
        )
    np.savez(path / "golden/golden.npz", **arrays)
    tolerance = {f"{e.value}_{p.value}": 1e-3 if p is Precision.FLOAT32 else 0.05 for e, p in PAIRS}
    return Golden(file="golden/golden.npz", count=len(canvases), tolerance=tolerance)


def _pack(
    path: Path,
    *,
    product: str,
    preprocessing: Preprocessing,
    calibration: tuple[Calibration, ...],
    golden: Golden,
    bank_shape: tuple[int, ...] | None,
    moments_file: str | None,
) -> Bundle:
    trunk_id, head_id = sha256_file(path / "trunk.onnx"), sha256_file(path / "head.onnx")
    digest = hashlib.sha256(b"tiny").hexdigest()
    manifest = Manifest(
        method="tiny",
        product=product,
        preprocessing=preprocessing,
        trunk=Graph(float32="trunk.onnx", int8="trunk.int8.onnx", id=trunk_id),
        head=Graph(float32="head.onnx", int8="head.int8.onnx", id=head_id),
        taps=TAPS,
        map_stride=MAP_STRIDE,
        state=() if bank_shape is None else (StateTensor(name="bank", shape=bank_shape),),
        state_file=None if bank_shape is None else "state.safetensors",
        moments_file=moments_file,
        pooling=POOLING,
        embedding_id={
            precision: hashlib.sha256(f"{trunk_id} {precision.value}".encode()).hexdigest()
            for precision in (Precision.FLOAT32, Precision.INT8)
        },
        calibration=calibration,
        golden=golden,
        parity={},
        provenance=Provenance(
            data_sha256=digest,
            seed=0,
            preset="quick",
            train_images=8,
            calibration_images=CALIBRATION_FRAMES,
            versions={"onnx": onnx.__version__},
        ),
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        files={str(file.relative_to(path)): sha256_file(file) for file in sorted(path.rglob("*")) if file.is_file()},
    )
    (path / MANIFEST).write_bytes(manifest_bytes(manifest))
    return Bundle.open(path)
