from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SIZE, textures
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyMemoryHead, ToyPbasHead, ToyTrunk

from deploy.export import export_head, export_trunk, tap_shapes
from deploy.quantize import TrunkQuantization, quantize_head, quantize_trunk
from deploy.rounding import round_rows
from edge.bundle import Engine, Precision
from edge.errors import DataError
from edge.inference.engines import open_graph
from edge.inference.openvino_session import core

if TYPE_CHECKING:
    from pathlib import Path


def _executed(path: Path, kinds: tuple[str, ...], shapes: dict[str, list[int]]) -> list[tuple[str, str]]:
    """Read from OpenVINO's executed graph: (kind, precision) of each layer of the kinds named."""
    model = core().read_model(path)
    model.reshape(shapes)
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    found = []
    for op in compiled.get_runtime_model().get_ops():
        info = {key: str(getattr(value, "value", value)) for key, value in op.get_rt_info().items()}
        if info["layerType"] in kinds:
            found.append((info["layerType"], info["runtimePrecision"]))
    return found


def _taps(trunk: ToyTrunk, pictures: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        taps = dict(zip(trunk.tap_names, trunk(torch.from_numpy(pictures)), strict=True))
    return {name: taps[name].numpy() for name in ("s8", "s16")}


@pytest.fixture(scope="module")
def trunk_onnx(trunk: ToyTrunk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trunk") / "trunk.onnx"
    export_trunk(trunk, path, size=(SIZE, SIZE))
    return path


@pytest.mark.parametrize("float_convs", [0, 3])
def test_quantize_trunk_runs_every_other_convolution_in_int8(
    trunk_onnx: Path, tmp_path: Path, float_convs: int
) -> None:
    target = tmp_path / "q.onnx"
    quantize_trunk(trunk_onnx, target, textures(8, seed=1), options=TrunkQuantization(float_convs=float_convs))
    executed = _executed(target, ("Convolution",), {"image": [1, SIZE, SIZE, 3]})
    assert len(executed) == 10
    assert sum(precision in ("u8", "i8") for _, precision in executed) == 10 - float_convs
    kinds = [node.op_type for node in onnx.load(target).graph.node]
    assert kinds.count("Clip") == min(float_convs, 2), "a Clip behind int8 keeps depthwise convolutions in float"


def test_quantize_trunk_lets_openvino_read_the_image_in_place(trunk_onnx: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    quantize_trunk(trunk_onnx, target, textures(8, seed=1))
    shapes = {"image": [1, SIZE, SIZE, 3]}
    assert _executed(trunk_onnx, ("Transpose",), shapes) == []
    assert _executed(target, ("Transpose",), shapes) == []


def test_quantize_trunk_gives_both_engines_the_same_taps_near_float(trunk_onnx: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    quantize_trunk(trunk_onnx, target, textures(8, seed=1))
    image = textures(2, seed=9)
    exact = onnxruntime.InferenceSession(trunk_onnx).run(None, {"image": image})
    for engine in Engine:
        session = open_graph(target, engine=engine, precision=Precision.INT8, threads=1)
        got = session.run({"image": image})
        for name, wanted in zip(ToyTrunk.tap_names, exact, strict=True):
            assert np.linalg.norm(got[name] - wanted) < 0.1 * np.linalg.norm(wanted), (engine, name)


def test_quantize_trunk_writes_the_same_bytes_twice(trunk_onnx: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_trunk(trunk_onnx, tmp_path / name, textures(4, seed=1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_quantize_trunk_refuses_an_empty_set(trunk_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="generic set"):
        quantize_trunk(trunk_onnx, tmp_path / "q", np.empty((0, 64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def search(trunk: ToyTrunk, memory_head: ToyMemoryHead, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("head")
    export_head(memory_head, folder / "h.onnx", tap_shapes=tap_shapes(trunk, (SIZE, SIZE)))
    names = quantize_head(
        folder / "h.onnx", folder / "q.onnx", [_taps(trunk, textures(8, seed=1))], state_names=memory_head.state_names
    )
    assert len(names) == 1
    return folder / "h.onnx", folder / "q.onnx"


def test_quantize_head_searches_the_bank_in_int8(search: tuple[Path, Path]) -> None:
    executed = _executed(search[1], ("FullyConnected", "MatMul"), {"s8": [1, 16, 8, 8], "s16": [1, 24, 4, 4]})
    assert [precision for _, precision in executed] == ["u8"]


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_quantize_head_takes_a_new_bank_with_its_own_range(
    search: tuple[Path, Path], trunk: ToyTrunk, memory_head: ToyMemoryHead, engine: Engine, factor: float
) -> None:
    bank = (memory_head.bank * factor).numpy()
    state: dict[str, Any] = {"bank": bank, "bank_norms": (bank**2).sum(1)}
    taps = {name: value.copy() for name, value in _taps(trunk, textures(2, seed=9)).items()}
    maps = [
        open_graph(path, engine=engine, precision=precision, threads=1, state=state).run(taps)["anomaly_map"].copy()
        for path, precision in zip(search, (Precision.FLOAT32, Precision.INT8), strict=True)
    ]
    assert np.abs(maps[0] - maps[1]).mean() < 0.02 * maps[0].mean()


def test_quantize_head_leaves_named_ops_and_single_channel_convs_in_float(trunk: ToyTrunk, tmp_path: Path) -> None:
    head = ToyPbasHead()
    export_head(head, tmp_path / "h.onnx", tap_shapes=tap_shapes(trunk, (SIZE, SIZE)))
    taps = [_taps(trunk, textures(8, seed=1))]
    names = quantize_head(tmp_path / "h.onnx", tmp_path / "q.onnx", taps, state_names=("centre",))
    assert len(names) == 2
    fewer = quantize_head(
        tmp_path / "h.onnx", tmp_path / "q2.onnx", taps, state_names=("centre",), float_ops=("project",)
    )
    assert len(fewer) == 1
    shapes = {"s8": [1, 16, 8, 8], "s16": [1, 24, 4, 4]}
    precisions = [precision for _, precision in _executed(tmp_path / "q.onnx", ("Convolution",), shapes)]
    assert "f32" in precisions
    assert len([p for p in precisions if p in ("u8", "i8")]) == 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_round_rows_never_does_worse_than_nearest_by_much(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    # Inputs that share a large mean, as neighbouring pixels do.
    seen = rng.normal(3, 1, (200, 1)) + rng.normal(0, 0.3, (200, size))
    moments = (seen.T @ seen / len(seen))[None]
    rows = rng.normal(0, 1, (1, 6, size))
    steps = np.abs(rows).max(2) / 7
    got = round_rows(rows, moments, steps, limit=7)
    assert np.abs(got).max() <= 7
    nearest = np.clip(np.rint(rows / steps[:, :, None]), -7, 7)

    def error(integers: np.ndarray) -> float:
        difference = integers * steps[:, :, None] - rows
        return float(np.einsum("grd,gde,gre->", difference, moments, difference))

    assert error(got) <= 1.1 * error(nearest)
