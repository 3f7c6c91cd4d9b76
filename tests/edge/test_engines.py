"""Both engines behind one interface: same figures, pruned outputs, state written in, precision said aloud."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from edge.bundle import Bundle, Engine, Precision
from edge.errors import EngineError, MissingExtraError
from edge.inference import openvino_session
from edge.inference.engines import GraphSession, open_graph, supports
from edge.inference.onnx_file import read_initialisers, with_initialisers
from tests.edge.tiny_bundle import BANK_ROWS, CHANNELS, PAIRS, TAPS, make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

BANK = (sum(CHANNELS), BANK_ROWS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("engines") / "bundle")


def file_of(bundle: Bundle, graph: str, precision: Precision) -> Path:
    return bundle.path / (f"{graph}.int8.onnx" if precision is Precision.INT8 else f"{graph}.onnx")


def open_head(bundle: Bundle, engine: Engine, precision: Precision, **options: object) -> GraphSession:
    return open_graph(file_of(bundle, "head", precision), engine=engine, precision=precision, threads=1, **options)


def taps_of(seed: int, count: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        TAPS[0]: rng.uniform(0, 1, (count, CHANNELS[0], 16, 16)).astype(np.float32),
        TAPS[1]: rng.uniform(0, 1, (count, CHANNELS[1], 8, 8)).astype(np.float32),
    }


def distances(taps: dict[str, np.ndarray], bank: np.ndarray) -> np.ndarray:
    n, c, h, w = taps[TAPS[0]].shape
    pooled = taps[TAPS[0]].reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    rows = np.concatenate([pooled, taps[TAPS[1]]], 1).transpose(0, 2, 3, 1)
    return np.linalg.norm(rows[..., np.newaxis] - bank, axis=3).min(-1)


@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_state_overrides_the_initialiser(bundle: Bundle, engine: Engine, precision: Precision) -> None:
    taps = taps_of(1)
    # Inside the range that the int8 bank was calibrated for; its rounding is the only error left.
    for bank in (np.random.default_rng(seed).uniform(0, 0.5, BANK).astype(np.float32) for seed in (2, 3)):
        found = open_head(bundle, engine, precision, state={"bank": bank}).run(taps)["anomaly_map"]
        limit = 1e-4 if precision is Precision.FLOAT32 else 0.25
        assert np.abs(found - distances(taps, bank)).max() < limit


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"memory": np.zeros(BANK, np.float32)}, "'memory': the graph has no such initialiser .*bank"),
        ({"bank": np.zeros((4, 4), np.float32)}, r"'bank': shape \[4, 4\], the graph needs \[20, 32\]"),
        ({"bank": np.zeros(BANK, np.float64)}, "'bank': must be float32"),
    ],
)
@pytest.mark.parametrize("engine", list(Engine))
def test_state_that_does_not_fit_is_refused(
    bundle: Bundle, engine: Engine, state: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        open_head(bundle, engine, Precision.FLOAT32, state=state)


@pytest.mark.parametrize("engine", list(Engine))
def test_outputs_are_pruned_and_ordered(bundle: Bundle, engine: Engine) -> None:
    both = open_head(bundle, engine, Precision.FLOAT32, outputs=["embedding", "anomaly_map"])
    assert list(both.run(taps_of(1))) == ["embedding", "anomaly_map"]
    one = open_head(bundle, engine, Precision.FLOAT32, outputs=["anomaly_map"])
    assert list(one.run(taps_of(1))) == ["anomaly_map"]
    assert one.graph_outputs == ("anomaly_map", "embedding")
    with pytest.raises(EngineError, match="no output 'mask'; it has anomaly_map, embedding"):
        open_head(bundle, engine, Precision.FLOAT32, outputs=["mask"])


def test_openvino_pruned_output_is_not_computed(bundle: Bundle) -> None:
    session = open_head(bundle, Engine.OPENVINO, Precision.FLOAT32, outputs=["embedding"])
    kinds = {node.get_rt_info()["layerType"] for node in session._compiled.get_runtime_model().get_ordered_ops()}
    assert not kinds & {"MatMul", "FullyConnected"}


@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_trunk_runs_any_batch_and_size(bundle: Bundle, engine: Engine, precision: Precision) -> None:
    session = open_graph(file_of(bundle, "trunk", precision), engine=engine, precision=precision, threads=1)
    assert session.input_shapes == {"image": (None, None, None, 3)}
    for shape in ((1, 32, 32, 3), (3, 64, 96, 3)):
        taps = session.run({"image": np.zeros(shape, np.uint8)})
        assert [taps[name].shape for name in TAPS] == [
            (shape[0], CHANNELS[0], shape[1] // 4, shape[2] // 4),
            (shape[0], CHANNELS[1], shape[1] // 8, shape[2] // 8),
        ]


@pytest.mark.parametrize("engine", list(Engine))
def test_asked_shape_is_the_only_one_accepted(bundle: Bundle, engine: Engine) -> None:
    path = file_of(bundle, "trunk", Precision.FLOAT32)
    options = {"engine": engine, "precision": Precision.FLOAT32, "threads": 1}
    session = open_graph(path, input_shapes={"image": (2, 64, 64, 3)}, **options)
    assert session.run({"image": np.zeros((2, 64, 64, 3), np.uint8)})[TAPS[0]].shape == (2, CHANNELS[0], 16, 16)
    with pytest.raises(EngineError, match=r"\[1, 64, 64, 3\], the graph needs uint8 \[2, 64, 64, 3\]"):
        session.run({"image": np.zeros((1, 64, 64, 3), np.uint8)})
    with pytest.raises(EngineError, match="cannot be"):
        open_graph(path, input_shapes={"image": (2, 64, 64, 4)}, **options)
    with pytest.raises(EngineError, match="has no input 'picture'"):
        open_graph(path, input_shapes={"picture": (2, 64, 64, 3)}, **options)


@pytest.mark.parametrize("engine", list(Engine))
def test_wrong_inputs_are_named(bundle: Bundle, engine: Engine) -> None:
    session = open_head(bundle, engine, Precision.FLOAT32)
    taps = taps_of(1)
    with pytest.raises(EngineError, match="needs the inputs stride4, stride8, got stride4"):
        session.run({TAPS[0]: taps[TAPS[0]]})
    with pytest.raises(EngineError, match="'stride8' is float64"):
        session.run({**taps, TAPS[1]: taps[TAPS[1]].astype(np.float64)})


@pytest.mark.parametrize("engine", list(Engine))
def test_inputs_may_be_strided_read_only_or_changed_in_place(bundle: Bundle, engine: Engine) -> None:
    bank = np.random.default_rng(1).uniform(0, 1, BANK).astype(np.float32)
    session = open_head(bundle, engine, Precision.FLOAT32, state={"bank": bank}, outputs=["anomaly_map"])
    taps = taps_of(2)
    wide = np.repeat(taps[TAPS[1]], 2, axis=3)[..., ::2]
    taps[TAPS[0]].flags.writeable = False
    assert np.allclose(session.run({**taps, TAPS[1]: wide})["anomaly_map"], distances(taps, bank), atol=1e-4)
    taps = taps_of(3)
    session.run(taps)
    taps[TAPS[1]] *= 0.5
    assert np.allclose(session.run(taps)["anomaly_map"], distances(taps, bank), atol=1e-4)


@pytest.mark.parametrize("engine", list(Engine))
def test_clone_has_buffers_of_its_own(bundle: Bundle, engine: Engine) -> None:
    bank = np.random.default_rng(1).uniform(0, 1, BANK).astype(np.float32)
    shapes = {name: array.shape for name, array in taps_of(0).items()}
    first = open_head(bundle, engine, Precision.FLOAT32, state={"bank": bank}, input_shapes=shapes, streams=2)
    second = first.clone()
    kept = first.run(taps_of(1))["anomaly_map"]
    second.run(taps_of(2))
    assert np.allclose(kept, distances(taps_of(1), bank), atol=1e-4)


def test_openvino_precision_is_always_explicit(bundle: Bundle) -> None:
    hints = {}
    for precision in Precision:
        if supports(Engine.OPENVINO, precision):
            compiled = open_head(bundle, Engine.OPENVINO, precision)._compiled
            hints[precision] = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    expected = {Precision.FLOAT32: "f32", Precision.BFLOAT16: "bf16", Precision.INT8: "f32"}
    assert hints == {precision: expected[precision] for precision in hints}


def test_bfloat16_only_in_openvino_and_only_where_native(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="onnxruntime does not run bfloat16"):
        open_head(bundle, Engine.ONNXRUNTIME, Precision.BFLOAT16)

    class OldProcessor:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino_session, "core", OldProcessor)
    with pytest.raises(EngineError, match="openvino does not run bfloat16"):
        open_head(bundle, Engine.OPENVINO, Precision.BFLOAT16)


@pytest.mark.parametrize(("engine", "extra"), [(Engine.ONNXRUNTIME, "box-cpu"), (Engine.OPENVINO, "box-openvino")])
def test_missing_engine_names_the_extra(
    bundle: Bundle, engine: Engine, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == engine.value else real(name))
    with pytest.raises(MissingExtraError, match=rf"{engine.value} is not installed.*lineward\[{extra}\]"):
        open_head(bundle, engine, Precision.FLOAT32)


@pytest.mark.parametrize("engine", list(Engine))
def test_file_that_is_no_graph_is_refused(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "head.onnx").write_bytes(b"junk")
    with pytest.raises(EngineError, match=r"head\.onnx: not an ONNX model"):
        open_graph(tmp_path / "head.onnx", engine=engine, precision=Precision.FLOAT32, threads=1)
    with pytest.raises(EngineError, match=r"none\.onnx: cannot be read"):
        open_graph(tmp_path / "none.onnx", engine=engine, precision=Precision.FLOAT32, threads=1)


@pytest.mark.parametrize("engine", list(Engine))
def test_one_engine_alone_is_enough(bundle: Bundle, engine: Engine) -> None:
    other = next(one for one in Engine if one is not engine)
    program = (
        "import sys; sys.modules[sys.argv[2]] = None\n"
        "from pathlib import Path\n"
        "from edge.bundle import Bundle\n"
        "from edge.inference.detector import Detector\n"
        "assert not {'openvino', 'onnxruntime', 'torch', 'onnx'} & {n for n, m in sys.modules.items() if m}\n"
        "print(Detector.open(Bundle.open(Path(sys.argv[1])), threads=1).status.engine.value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle.path), other.value], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (engine.value, "")


def _constants_only(tensors: list[onnx.TensorProto]) -> bytes:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [], tensors)
    return helper.make_model(graph).SerializeToString()


@settings(max_examples=50, deadline=None)
@given(
    arrays=st.lists(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, max_side=9)), max_size=4),
    raw=st.booleans(),
)
def test_initialisers_read_and_written_as_onnx_does(*, arrays: list[np.ndarray], raw: bool) -> None:
    tensors = [
        numpy_helper.from_array(array, f"t{index}")
        if raw
        else helper.make_tensor(f"t{index}", TensorProto.FLOAT, array.shape, array.ravel().tolist())
        for index, array in enumerate(arrays)
    ]
    data = _constants_only(tensors)
    assert {name: item.shape for name, item in read_initialisers(data).items()} == {
        f"t{index}": array.shape for index, array in enumerate(arrays)
    }
    new = {f"t{index}": np.full_like(array, index + 0.5) for index, array in enumerate(arrays)}
    patched = onnx.load_from_string(with_initialisers(data, new))
    for tensor in patched.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), new[tensor.name])


@settings(max_examples=50, deadline=None)
@given(
    arrays=st.lists(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=9)), min_size=1, max_size=4),
    hollow=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_hollow_initialisers_are_filled(arrays: list[np.ndarray], hollow: list[bool]) -> None:
    tensors = [numpy_helper.from_array(array, f"t{index}") for index, array in enumerate(arrays)]
    for tensor, empty in zip(tensors, hollow, strict=False):
        if empty:
            tensor.ClearField("raw_data")
    data = _constants_only(tensors)
    found = read_initialisers(data)
    assert [found[tensor.name].is_hollow for tensor in tensors] == hollow[: len(tensors)]
    new = {f"t{index}": np.full_like(array, index + 0.5) for index, array in enumerate(arrays)}
    filled = onnx.load_from_string(with_initialisers(data, new))
    whole = onnx.load_from_string(data)
    assert [numpy_helper.to_array(tensor).tolist() for tensor in filled.graph.initializer] == [
        array.tolist() for array in new.values()
    ]
    del whole.graph.initializer[:], filled.graph.initializer[:]
    assert filled == whole


@pytest.mark.parametrize("engine", list(Engine))
def test_hollow_graph_runs_with_its_state_and_not_without(bundle: Bundle, tmp_path: Path, engine: Engine) -> None:
    model = onnx.load(file_of(bundle, "head", Precision.FLOAT32))
    for tensor in model.graph.initializer:
        if tensor.name == "bank":
            tensor.ClearField("raw_data")
    onnx.save(model, tmp_path / "head.onnx")
    bank = np.random.default_rng(0).uniform(0, 0.5, BANK).astype(np.float32)
    options = {"engine": engine, "precision": Precision.FLOAT32, "threads": 1}
    found = open_graph(tmp_path / "head.onnx", state={"bank": bank}, **options).run(taps_of(1))["anomaly_map"].copy()
    whole = open_head(bundle, engine, Precision.FLOAT32, state={"bank": bank}).run(taps_of(1))["anomaly_map"]
    assert np.array_equal(found, whole)
    with pytest.raises(EngineError, match=r"initialiser bank has no values; open it with a state"):
        open_graph(tmp_path / "head.onnx", **options)
    with pytest.raises(EngineError, match=r"shape \[4, 4\]"):
        open_graph(tmp_path / "head.onnx", state={"bank": np.zeros((4, 4), np.float32)}, **options)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_graph_raises_only_our_error(data: st.DataObject) -> None:
    whole = _constants_only([numpy_helper.from_array(np.arange(6, dtype=np.float32), "t")])
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    if content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(0, 255))
    with contextlib.suppress(EngineError):
        with_initialisers(bytes(content), {"t": np.zeros(6, np.float32)})


def test_truncated_graph_is_refused(bundle: Bundle) -> None:
    whole = file_of(bundle, "head", Precision.FLOAT32).read_bytes()
    inside = read_initialisers(whole)["bank"].offset + 100
    with pytest.raises(EngineError, match=r"not an ONNX model .*runs past"):
        read_initialisers(whole[:inside])
