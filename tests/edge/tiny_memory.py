"""A tiny bundle whose head measures the distance to two banks that a box may replace; needs onnx and both engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from edge.bundle import Bundle, Calibration, Engine, Golden, MemoryLayout, Precision, Preprocessing, StateTensor
from edge.inference.engines import open_graph
from edge.inference.preprocessing import cut_tiles, to_canvas
from edge.judgement.score import pool_score
from tests.edge.tiny_bundle import (
    CHANNELS,
    MAP_STRIDE,
    POOLING,
    TAPS,
    _model,
    defective_frame,
    good_frame,
    make_tiny_bundle,
    maps_of,
    repack,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SIZE = 64
GRID = (SIZE // MAP_STRIDE, SIZE // MAP_STRIDE)
LOCAL_ROWS, FLEET_ROWS = 48, 64
CALIBRATION_FRAMES = 40
COMMISSIONING_FRAMES = 24
PREPROCESSING = Preprocessing(height=SIZE, width=SIZE)
ENGINE, PRECISION = Engine.ONNXRUNTIME, Precision.FLOAT32


def make_memory_bundle(path: Path, *, commissioning: int = COMMISSIONING_FRAMES) -> Bundle:
    """Write a float32 bundle with a memory and open it.

    Args:
        path: folder to make.
        commissioning: images declared good whose embeddings it carries; 0 for none.
    """
    make_tiny_bundle(path, product="woven", size=SIZE)
    for name in ("head.int8.onnx", "trunk.int8.onnx", "calibration", "golden"):
        _remove(path / name)
    onnx.save(_head(), path / "head.onnx")
    rows = np.concatenate([embedding_of(path, good_frame(seed)) for seed in range(500, 508)])
    chosen = np.random.default_rng(3).choice(len(rows), LOCAL_ROWS, replace=False)
    local = np.ascontiguousarray(rows[chosen])
    state = {"bank_local": local, "bank_fleet": local[np.arange(FLEET_ROWS) % LOCAL_ROWS]}
    save_file(state, path / "state.safetensors")
    entries = _calibrate(path, state)
    golden = _golden(path, state)
    if commissioning:
        good = np.stack([embedding_of(path, good_frame(seed)) for seed in range(600, 600 + commissioning)])
        np.savez(
            path / "commissioning.npz",
            embedding_float32=good[:, np.newaxis].astype(np.float16),
            groups=np.array([f"g{index}" for index in range(commissioning)]),
        )
    manifest = Bundle(path, _manifest_of(path), "")
    head = manifest.manifest.head.model_copy(update={"int8": None})
    trunk = manifest.manifest.trunk.model_copy(update={"int8": None})
    return repack(
        manifest,
        method="feddymem",
        head=head.model_dump(),
        trunk=trunk.model_dump(),
        state=[StateTensor(name=name, shape=values.shape) for name, values in state.items()],
        calibration=entries,
        golden=golden,
        commissioning_file="commissioning.npz" if commissioning else None,
        memory=MemoryLayout(grid=GRID).model_dump(),
    )


def embedding_of(path: Path, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Patch rows float32 [L, D] of a frame, the long way round."""
    taps = open_graph(path / "trunk.onnx", engine=ENGINE, precision=PRECISION, threads=1).run(
        {"image": cut_tiles(to_canvas(frame, PREPROCESSING), PREPROCESSING)}
    )
    fine = taps[TAPS[0]]
    n, c, h, w = fine.shape
    pooled = fine.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    rows = np.concatenate([pooled, taps[TAPS[1]]], 1).transpose(0, 2, 3, 1).reshape(-1, sum(CHANNELS))
    return np.ascontiguousarray(rows, dtype=np.float32)


def _manifest_of(path: Path) -> Any:
    import json

    from edge.bundle import MANIFEST, Manifest

    return Manifest.model_validate(json.loads((path / MANIFEST).read_text()))


def _remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            inner.unlink()
        path.rmdir()
    else:
        path.unlink()


def _head() -> onnx.ModelProto:
    """Distance of each patch to the nearest row of both banks [R, D]; the banks hold zeros until a box fills them."""
    depth = sum(CHANNELS)
    constants = {
        "bank_local": np.zeros((LOCAL_ROWS, depth), np.float32),
        "bank_fleet": np.zeros((FLEET_ROWS, depth), np.float32),
        "minus_two": np.array(-2, np.float32),
        "zero": np.array(0, np.float32),
        "rows": np.array([0, -1, depth], np.int64),
        "last": np.array([-1], np.int64),
    }
    nodes = [
        helper.make_node("Concat", ["bank_local", "bank_fleet"], ["both"], axis=0),
        helper.make_node("Transpose", ["both"], ["bank"], perm=[1, 0]),
        helper.make_node("ReduceSumSquare", ["both", "last"], ["bank_norm"], keepdims=0),
        helper.make_node("AveragePool", [TAPS[0]], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["pooled", TAPS[1]], ["patches"], axis=1),
        helper.make_node("Transpose", ["patches"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["grid", "rows"], ["embedding"]),
        helper.make_node("MatMul", ["grid", "bank"], ["dots"]),
        helper.make_node("Mul", ["dots", "minus_two"], ["cross"]),
        helper.make_node("ReduceSumSquare", ["grid", "last"], ["patch_norm"], keepdims=1),
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


def _calibrate(path: Path, state: dict[str, npt.NDArray[Any]]) -> list[Calibration]:
    (path / "calibration").mkdir()
    canvases = [to_canvas(good_frame(seed), PREPROCESSING) for seed in range(CALIBRATION_FRAMES)]
    entries = []
    for engine in Engine:
        maps = maps_of(path, PREPROCESSING, canvases, state, engine=engine, precision=PRECISION)
        name = f"calibration/{engine.value}-{PRECISION.value}.npz"
        np.savez(
            path / name,
            scores=np.array([pool_score(item, POOLING) for item in maps], np.float32),
            maps=np.stack(maps).astype(np.float16),
            groups=np.array([f"part{index}" for index in range(len(maps))]),
        )
        entries.append(Calibration(engine=engine, precision=PRECISION, file=name, count=len(maps)))
    return entries


def _golden(path: Path, state: dict[str, npt.NDArray[Any]]) -> Golden:
    (path / "golden").mkdir()
    canvases = [to_canvas(frame, PREPROCESSING) for frame in (good_frame(900), defective_frame(901))]
    arrays: dict[str, npt.NDArray[Any]] = {"canvas": np.stack(canvases)}
    for engine in Engine:
        maps = maps_of(path, PREPROCESSING, canvases, state, engine=engine, precision=PRECISION)
        arrays[f"score_{engine.value}_{PRECISION.value}"] = np.array(
            [pool_score(item, POOLING) for item in maps], np.float32
        )
    np.savez(path / "golden/golden.npz", **arrays)
    return Golden(
        file="golden/golden.npz",
        count=len(canvases),
        tolerance={f"{engine.value}_{PRECISION.value}": 1e-3 for engine in Engine},
    )
