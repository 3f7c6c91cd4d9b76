"""The detector: proves itself on golden frames, falls back visibly, and switches its state between two frames."""

from __future__ import annotations

import threading
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge.bundle import Bundle, Engine, Precision, Tiles, load_arrays
from edge.errors import BundleError, CaptureError, EngineError, MissingExtraError
from edge.frames import Frame, Prediction
from edge.inference import choice, sessions
from edge.inference import detector as module
from edge.inference.detector import Detector
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from tests.edge.tiny_bundle import (
    BANK_ROWS,
    CHANNELS,
    PAIRS,
    POOLING,
    defective_frame,
    good_frame,
    make_tiny_bundle,
    maps_of,
    repack,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("detector") / "bundle")


def frame_of(image: np.ndarray) -> Frame:
    return Frame(image=image, camera="a", camera_seq=0, captured_ns=0, captured_at=datetime.now(timezone.utc))


def break_golden(bundle: Bundle, *pairs: tuple[Engine, Precision], value: float = 99.0) -> Bundle:
    path = bundle.file(bundle.manifest.golden.file)
    arrays = load_arrays(path)
    for engine, precision in pairs:
        arrays[f"score_{engine.value}_{precision.value}"][0] = value
    np.savez(path, **arrays)
    return repack(bundle)


def far_state(value: float) -> dict[str, np.ndarray]:
    return {"bank": np.full((sum(CHANNELS), BANK_ROWS), value, np.float32)}


@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_predict_scores_good_and_defective(bundle: Bundle, engine: Engine, precision: Precision) -> None:
    detector = Detector.open(bundle, engine=engine, precision=precision, threads=1)
    good, bad = (detector.predict(frame_of(image)) for image in (good_frame(1), defective_frame(2)))
    limit = float(bundle.calibration(engine, precision).scores.max())
    assert pool_score(good.anomaly_map, POOLING) <= limit < pool_score(bad.anomaly_map, POOLING)
    assert bad.anomaly_map.dtype == np.float32
    assert np.unravel_index(bad.anomaly_map.argmax(), (8, 8)) in {(y, x) for y in range(2, 6) for x in range(2, 6)}
    assert min(good.preprocess_ns, good.inference_ns) > 0
    assert detector.status.fallback_reason == ""
    assert detector.status.golden_max_error <= bundle.manifest.golden.tolerance[f"{engine.value}_{precision.value}"]


@pytest.mark.parametrize("with_state", [True, False])
def test_tiles_are_cut_and_joined(tmp_path: Path, *, with_state: bool) -> None:
    tiled = make_tiny_bundle(tmp_path / "b", tiles=Tiles(rows=2, cols=2, overlap=32), state=with_state)
    detector = Detector.open(tiled, engine=Engine.OPENVINO, precision=Precision.FLOAT32, threads=1)
    image = defective_frame(5)
    state = load_file(tiled.file("state.safetensors")) if with_state else {}
    canvas = to_canvas(image, tiled.manifest.preprocessing)
    expected = maps_of(
        tiled.path, tiled.manifest.preprocessing, [canvas], state, engine=Engine.ONNXRUNTIME,
        precision=Precision.FLOAT32,
    )[0]  # fmt: skip
    found = detector.predict(frame_of(image)).anomaly_map
    assert found.shape == (12, 12)
    assert np.allclose(found, expected, atol=1e-3)
    assert detector.embeddings_of_canvas(canvas).shape == (4, 64, sum(CHANNELS))


def test_default_is_openvino_int8(bundle: Bundle) -> None:
    status = Detector.open(bundle, threads=1).status
    assert (status.engine, status.precision) == (Engine.OPENVINO, Precision.INT8)


def test_default_is_float32_without_int8_calibration(tmp_path: Path) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    only = [entry for entry in made.manifest.calibration if entry.precision is Precision.FLOAT32]
    detector = Detector.open(repack(made, calibration=only), threads=1)
    assert detector.status.precision is Precision.FLOAT32
    with pytest.raises(BundleError, match="not calibrated for int8, only for onnxruntime float32, openvino float32"):
        Detector.open(repack(made, calibration=only), precision=Precision.INT8)


def test_no_engine_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "available_engines", lambda: ())
    with pytest.raises(MissingExtraError, match=r"no inference engine installed.*lineward\[box-openvino\]"):
        Detector.open(bundle)
    with pytest.raises(MissingExtraError, match=r"onnxruntime not installed.*lineward\[box-cpu\]"):
        Detector.open(bundle, engine=Engine.ONNXRUNTIME)


@pytest.mark.parametrize("value", [99.0, float("nan")])
def test_golden_miss_falls_back_to_float32_and_says_so(tmp_path: Path, value: float) -> None:
    broken = break_golden(make_tiny_bundle(tmp_path / "b"), (Engine.OPENVINO, Precision.INT8), value=value)
    status = Detector.open(broken, threads=1).status
    assert (status.engine, status.precision) == (Engine.OPENVINO, Precision.FLOAT32)
    assert (status.requested_engine, status.requested_precision) == (Engine.OPENVINO, Precision.INT8)
    assert "openvino int8 misses the golden scores by" in status.fallback_reason
    assert status.golden_max_error < 1e-3


def test_golden_miss_of_one_engine_falls_back_to_the_other(tmp_path: Path) -> None:
    broken = break_golden(
        make_tiny_bundle(tmp_path / "b"), (Engine.OPENVINO, Precision.INT8), (Engine.OPENVINO, Precision.FLOAT32)
    )
    status = Detector.open(broken, threads=1).status
    assert (status.engine, status.precision) == (Engine.ONNXRUNTIME, Precision.FLOAT32)
    assert status.fallback_reason.count("misses") == 2


def test_golden_miss_of_everything_is_refused_with_figures(tmp_path: Path) -> None:
    broken = break_golden(make_tiny_bundle(tmp_path / "b"), *PAIRS)
    with pytest.raises(EngineError, match=r"openvino float32 misses the golden scores by 98\.\d+ \(tolerance 0\.001\)"):
        Detector.open(broken, threads=1)


def test_unsupported_precision_falls_back(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    entry = made.manifest.calibration[0].model_copy(
        update={"engine": Engine.ONNXRUNTIME, "precision": Precision.BFLOAT16}
    )
    odd = repack(made, calibration=[*made.manifest.calibration, entry])
    status = Detector.open(odd, engine=Engine.ONNXRUNTIME, precision=Precision.BFLOAT16, threads=1).status
    assert status.precision is Precision.FLOAT32
    assert "does not run bfloat16" in status.fallback_reason


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds the tensors none, the manifest needs bank"),
        ({"bank": np.zeros((3, 3), np.float32)}, r"bank is float32 \[3, 3\], the manifest needs float32 \[20, 32\]"),
        (far_state(float("nan")), "not finite"),
    ],
)
def test_state_that_does_not_fit_is_refused(
    bundle: Bundle, tmp_path: Path, tensors: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        Detector.open(bundle, threads=1).switch_state(tensors)
    made = make_tiny_bundle(tmp_path / "b")
    save_file(tensors, made.file("state.safetensors"))
    with pytest.raises(BundleError, match=words):
        Detector.open(repack(made), threads=1)


def test_damaged_state_file_is_refused(tmp_path: Path) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    made.file("state.safetensors").write_bytes(b"junk")
    with pytest.raises(BundleError, match="not a readable safetensors file"):
        Detector.open(repack(made), threads=1)


def test_frame_of_another_format_is_refused(bundle: Bundle) -> None:
    with pytest.raises(CaptureError, match="expected uint8"):
        Detector.open(bundle, threads=1).predict(frame_of(np.zeros((96, 96), np.uint8)))


def test_nan_in_a_map_is_not_hidden(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector.open(bundle, engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    monkeypatch.setattr(module, "check_state", lambda *_: None)
    detector.switch_state(far_state(float("nan"))).result()
    found = detector.predict(frame_of(good_frame(1))).anomaly_map
    assert np.isnan(pool_score(found, POOLING))


@pytest.mark.parametrize("engine", list(Engine))
def test_switch_state_under_load_never_mixes_heads(bundle: Bundle, engine: Engine) -> None:
    detector = Detector.open(bundle, engine=engine, precision=Precision.FLOAT32, threads=2, streams=2)
    frame = frame_of(good_frame(3))
    states = [far_state(5.0), far_state(9.0)]
    expected = [detector.predict(frame).anomaly_map]
    for state in states:
        detector.switch_state(state).result()
        expected.append(detector.predict(frame).anomaly_map)
    stop = threading.Event()
    found: list[np.ndarray] = []

    def work() -> None:
        while not stop.is_set():
            found.append(detector.predict(frame).anomaly_map)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for turn in range(8):
        detector.switch_state(states[turn % 2]).result()
    stop.set()
    for worker in workers:
        worker.join()
    near = [[np.allclose(one, known, atol=1e-3) for known in expected] for one in found]
    assert all(sum(row) == 1 for row in near)
    assert np.allclose(detector.predict(frame).anomaly_map, expected[2], atol=1e-3)


def test_predictions_name_the_memory_whose_head_made_them(bundle: Bundle) -> None:
    detector = Detector.open(bundle, engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=2, streams=2)
    frame = frame_of(good_frame(3))
    states = {1: far_state(5.0), 2: far_state(9.0)}
    expected = {}
    for version, state in states.items():
        detector.switch_state(state, memory_version=version).result()
        expected[version] = detector.predict(frame).anomaly_map
    stop = threading.Event()
    found: list[Prediction] = []

    def work() -> None:
        while not stop.is_set():
            found.append(detector.predict(frame))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for turn in range(8):
        detector.switch_state(states[1 + turn % 2], memory_version=1 + turn % 2).result()
    stop.set()
    for worker in workers:
        worker.join()
    assert {one.memory_version for one in found} == {1, 2}
    assert all(np.allclose(one.anomaly_map, expected[one.memory_version], atol=1e-3) for one in found)


def test_what_is_done_before_a_switch_can_stop_it(bundle: Bundle) -> None:
    detector = Detector.open(bundle, engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    seen: list[int] = []

    def look() -> None:
        seen.append(detector.memory_version)

    def refuse() -> None:
        raise OSError("the disk is full")

    detector.switch_state(far_state(5.0), memory_version=3, before=look).result()
    assert isinstance(detector.switch_state(far_state(9.0), memory_version=4, before=refuse).exception(), OSError)
    assert seen == [0]
    assert detector.predict(frame_of(good_frame(3))).memory_version == 3


def test_switch_state_last_asked_wins_and_copies_its_input(bundle: Bundle) -> None:
    detector = Detector.open(bundle, engine=Engine.OPENVINO, precision=Precision.FLOAT32, threads=1)
    frame = frame_of(good_frame(3))
    detector.switch_state(far_state(9.0)).result()
    wanted = detector.predict(frame).anomaly_map
    last = far_state(9.0)
    switches = [detector.switch_state(state) for state in (far_state(5.0), far_state(7.0), last)]
    last["bank"][:] = 0
    for switch in switches:
        switch.result()
    assert np.allclose(detector.predict(frame).anomaly_map, wanted, atol=1e-3)


def test_failed_switch_keeps_the_old_head(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector.open(bundle, engine=Engine.OPENVINO, precision=Precision.FLOAT32, threads=1)
    before = detector.predict(frame_of(good_frame(3))).anomaly_map

    def fail(*_: object, **__: object) -> None:
        raise EngineError("no memory")

    monkeypatch.setattr(sessions, "open_graph", fail)
    assert isinstance(detector.switch_state(far_state(5.0)).exception(), EngineError)
    assert np.array_equal(detector.predict(frame_of(good_frame(3))).anomaly_map, before)


def test_bundles_of_one_trunk_share_its_session(bundle: Bundle, tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path / "b", product="other", state=False)
    assert other.id != bundle.id
    options = {"engine": Engine.OPENVINO, "precision": Precision.FLOAT32, "threads": 1}
    first, second = Detector.open(bundle, **options), Detector.open(other, **options)
    assert first._trunk is second._trunk
    assert first._trunk is not Detector.open(bundle, engine=Engine.ONNXRUNTIME, threads=1)._trunk
    del first, second


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("tiles", [Tiles(), Tiles(rows=2, cols=2, overlap=32)])
def test_frames_begun_ahead_are_judged_as_those_judged_at_once(tmp_path: Path, engine: Engine, tiles: Tiles) -> None:
    bundle = make_tiny_bundle(tmp_path / "b", tiles=tiles)
    detector = Detector.open(bundle, engine=engine, precision=Precision.FLOAT32, threads=2, streams=2)
    frames = [frame_of(good_frame(1)), frame_of(defective_frame(2))]
    expected = [detector.predict(frame).anomaly_map for frame in frames]
    pending = [detector.begin(frame) for frame in frames]
    assert detector.begin(frames[0]) is None
    # Others judge meanwhile.
    assert np.array_equal(detector.predict(frames[0]).anomaly_map, expected[0])
    for one, frame, wanted in zip(pending, frames, expected, strict=True):
        assert one is not None
        found = one.result()
        assert found.frame is frame
        assert np.array_equal(found.anomaly_map, wanted)
        assert min(found.preprocess_ns, found.inference_ns) > 0
    again = detector.begin(frames[1])
    assert again is not None
    assert np.array_equal(again.result().anomaly_map, expected[1])


def test_frame_that_cannot_be_begun_gives_its_request_back(bundle: Bundle) -> None:
    detector = Detector.open(bundle, threads=1)
    for _ in range(3):
        with pytest.raises(CaptureError, match="check the camera's format"):
            detector.begin(frame_of(np.zeros((96, 96), np.uint8)))
    pending = detector.begin(frame_of(good_frame(1)))
    assert pending is not None
    pending.result()


def test_frame_begun_before_a_switch_names_the_memory_whose_head_made_it(bundle: Bundle) -> None:
    detector = Detector.open(bundle, engine=Engine.OPENVINO, precision=Precision.FLOAT32, threads=1)
    frame = frame_of(good_frame(3))
    before = detector.predict(frame).anomaly_map
    pending = detector.begin(frame)
    detector.switch_state(far_state(9.0), memory_version=7).result()
    assert pending is not None
    found = pending.result()
    assert found.memory_version == 0
    assert np.array_equal(found.anomaly_map, before)
    assert detector.predict(frame).memory_version == 7


def test_head_without_embedding_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector.open(bundle, threads=1)
    assert detector.has_embedding
    monkeypatch.setattr(detector._in_force.head, "outputs", ("anomaly_map",))
    with pytest.raises(EngineError, match="method tiny gives no embeddings"):
        detector.embeddings_of_canvas(np.zeros((64, 64, 3), np.uint8))
