"""Tiny real bundles of the modalities signal and depth, for tests: graphs written by hand, nothing trained."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge.bundle import (
    MANIFEST,
    Bundle,
    Calibration,
    DepthLayout,
    Engine,
    Golden,
    Graph,
    Inputs,
    Manifest,
    Modality,
    Pooling,
    Precision,
    Preprocessing,
    Provenance,
    Resize,
    SignalLayout,
    manifest_bytes,
    sha256_file,
)
from edge.inference.engines import open_graph
from edge.inference.preprocessing import cut_tiles, to_canvas
from edge.judgement.score import pool_score

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

ENGINES = (Engine.ONNXRUNTIME, Engine.OPENVINO)
PLANE_M = 0.8
_CALIBRATION = 60


def bearing(
    seconds: float,
    *,
    rate_hz: float = 400.0,
    channels: int = 2,
    fault_at: float | None = None,
    fault_s: float = 0.5,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """Acceleration of a bearing in g, float32 [T, K]: shaft rotation and noise; a fault rings at each ball's pass."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    phases = np.arange(channels)
    good = np.sin(2 * np.pi * 25 * time[:, np.newaxis] + phases) + rng.normal(0, 0.1, (len(time), channels))
    if fault_at is not None:
        since_impact = np.mod(time - fault_at, 1 / 37.0)
        ring = np.exp(-since_impact * 120) * np.sin(2 * np.pi * 140 * since_impact)
        there = (time >= fault_at) & (time < fault_at + fault_s)
        good[:, 0] += 6 * ring * there
    return good.astype(np.float32)


def signal_layout(**changes: Any) -> SignalLayout:
    """Two channels at 400 Hz, windows of half a second, half of each in the next."""
    values = {"channels": ("drive end", "fan end"), "unit": "g", "rate_hz": 400.0, "window": 200, "hop": 100}
    return SignalLayout(**{**values, **changes})


def make_signal_bundle(path: Path, layout: SignalLayout | None = None, *, cell: int = 20, unit: float = 1.0) -> Bundle:
    """A bundle whose map is the root mean square of each cell of ``cell`` samples of each channel.

    Args:
        path: folder to make.
        layout: two channels of a bearing where None.
        cell: samples per map cell.
        unit: amplitude of the good signal that it is calibrated on.
    """
    layout = layout or signal_layout()
    count, channels = layout.window, len(layout.channels)

    def window(seed: int, fault: float | None = None) -> npt.NDArray[np.float32]:
        samples = bearing(
            count / layout.rate_hz + 0.1, rate_hz=layout.rate_hz, channels=channels, fault_at=fault, seed=seed
        )
        return np.ascontiguousarray(samples[:count].T) * np.float32(unit)

    return _make(
        path,
        trunk=_signal_trunk(cell),
        head=_root_head(),
        preprocessing=layout.preprocessing,
        frames=[window(seed) for seed in range(_CALIBRATION)],
        golden=[window(900), window(901, 0.0)],
        modality=Modality.SIGNAL,
        signal=layout,
    )


def scan(seed: int, *, height: int = 96, width: int = 96, dent_m: float = 0.0, lost: float = 0.02) -> Any:
    """A plane 0.8 m away with a little noise, perhaps dented in its middle; float32 [height, width, 3] in metres."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    z = PLANE_M + rng.normal(0, 2e-4, (height, width))
    radius = np.hypot(x - width / 2, y - height / 2) / (width / 8)
    z += dent_m * np.exp(-(radius**2))
    points = np.stack([(x - width / 2) / 500 * z, (y - height / 2) / 500 * z, z], axis=-1).astype(np.float32)
    points[rng.random((height, width)) < lost] = np.nan
    return points


def make_depth_bundle(
    path: Path, *, size: int = 64, min_valid: float = 0.5, frame: tuple[int, int] = (96, 96)
) -> Bundle:
    """A bundle whose map is the distance in millimetres of each cell of 8 x 8 points from the plane of :func:`scan`."""
    return _make(
        path,
        trunk=_depth_trunk(),
        head=_root_head(),
        preprocessing=Preprocessing(height=size, width=size, resize=Resize.VALID),
        frames=[scan(seed, height=frame[0], width=frame[1]) for seed in range(_CALIBRATION)],
        golden=[scan(900), scan(901, dent_m=0.01)],
        modality=Modality.DEPTH,
        depth=DepthLayout(pitch_m=PLANE_M / 500, min_valid=min_valid),
    )


def _make(
    path: Path,
    *,
    trunk: onnx.ModelProto,
    head: onnx.ModelProto,
    preprocessing: Inputs,
    frames: list[npt.NDArray[np.float32]],
    golden: list[npt.NDArray[np.float32]],
    **layout: Any,
) -> Bundle:
    path.mkdir(parents=True)
    onnx.save(trunk, path / "trunk.onnx")
    onnx.save(head, path / "head.onnx")
    pooling = Pooling(cells=2)
    (path / "calibration").mkdir()
    calibration, scores = [], {}
    canvases = [to_canvas(one, preprocessing) for one in golden]
    for engine in ENGINES:
        maps = _maps(path, preprocessing, [to_canvas(one, preprocessing) for one in frames], engine)
        name = f"calibration/{engine.value}.npz"
        np.savez(
            path / name,
            scores=np.array([pool_score(one, pooling) for one in maps], np.float32),
            maps=np.stack(maps).astype(np.float16),
            groups=np.array([f"record{index}" for index in range(len(maps))]),
        )
        calibration.append(Calibration(engine=engine, precision=Precision.FLOAT32, file=name, count=len(maps)))
        found = _maps(path, preprocessing, canvases, engine)
        scores[f"score_{engine.value}_float32"] = np.array([pool_score(one, pooling) for one in found], np.float32)
    np.savez(path / "golden.npz", canvas=np.stack(canvases), **scores)
    digest = hashlib.sha256(b"tiny").hexdigest()
    manifest = Manifest(
        method="tiny",
        product="tiny",
        preprocessing=preprocessing,
        trunk=Graph(float32="trunk.onnx", id=sha256_file(path / "trunk.onnx")),
        head=Graph(float32="head.onnx", id=sha256_file(path / "head.onnx")),
        taps=("energy",),
        map_stride=8,
        pooling=pooling,
        embedding_id={Precision.FLOAT32: digest},
        calibration=tuple(calibration),
        golden=Golden(
            file="golden.npz", count=len(canvases), tolerance={f"{engine.value}_float32": 1e-3 for engine in ENGINES}
        ),
        parity={},
        provenance=Provenance(
            data_sha256=digest, seed=0, preset="quick", train_images=8, calibration_images=len(frames), versions={}
        ),
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        files={str(file.relative_to(path)): sha256_file(file) for file in sorted(path.rglob("*")) if file.is_file()},
        **layout,
    )
    (path / MANIFEST).write_bytes(manifest_bytes(manifest))
    return Bundle.open(path)


def _maps(
    path: Path, preprocessing: Inputs, canvases: list[npt.NDArray[np.float32]], engine: Engine
) -> list[npt.NDArray[np.float32]]:
    opened = {"engine": engine, "precision": Precision.FLOAT32, "threads": 1}
    trunk, head = open_graph(path / "trunk.onnx", **opened), open_graph(path / "head.onnx", **opened)
    return [head.run(trunk.run({"image": cut_tiles(one, preprocessing)}))["anomaly_map"][0].copy() for one in canvases]


def _signal_trunk(cell: int) -> onnx.ModelProto:
    """Mean square of each cell: [N, K, Q] -> energy [N, 1, K, Q / cell]."""
    nodes = [
        helper.make_node("Mul", ["image", "image"], ["squares"]),
        helper.make_node("Unsqueeze", ["squares", "first"], ["planes"]),
        helper.make_node("AveragePool", ["planes"], ["energy"], kernel_shape=[1, cell], strides=[1, cell]),
    ]
    return _model(nodes, ["n", "k", "q"], {"first": np.array([1], np.int64)})


def _depth_trunk() -> onnx.ModelProto:
    """Mean squared distance in mm from the plane over the valid points of each cell of 8 x 8; nothing where invalid."""
    constants = {
        "z_index": np.array(2, np.int64),
        "plane": np.array(PLANE_M, np.float32),
        "mm": np.array(1000, np.float32),
        "zero": np.array(0, np.float32),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["image", "z_index"], ["z"], axis=3),
        helper.make_node("IsNaN", ["z"], ["invalid"]),
        helper.make_node("Sub", ["z", "plane"], ["off"]),
        helper.make_node("Mul", ["off", "mm"], ["off_mm"]),
        helper.make_node("Where", ["invalid", "zero", "off_mm"], ["measured"]),
        helper.make_node("Mul", ["measured", "measured"], ["squares"]),
        helper.make_node("Unsqueeze", ["squares", "axis"], ["planes"]),
        helper.make_node("AveragePool", ["planes"], ["energy"], kernel_shape=[8, 8], strides=[8, 8]),
    ]
    return _model(nodes, ["n", "height", "width", 3], constants)


def _root_head() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Sqrt", ["energy"], ["roots"]),
        helper.make_node("Squeeze", ["roots", "axis"], ["anomaly_map"]),
    ]
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("energy", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["n", "h", "w"])],
        [numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _model(
    nodes: list[onnx.NodeProto], shape: list[str | int], constants: dict[str, npt.NDArray[Any]]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "trunk",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("energy", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
