"""The detector with looks: corrected and measured the same at once and ahead, and not a bit changed where plain."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from safetensors.numpy import load_file

from edge.adaptation.correction import MomentCorrection
from edge.adaptation.look import PLAIN, Look
from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.adaptation.moments import DETAIL, IMAGE, Moments
from edge.bundle import Bundle, Engine, Precision, Tiles
from edge.inference.detector import Detector
from edge.inference.preprocessing import cut_tiles, join_maps, to_canvas
from edge.judgement.score import pool_score
from tests.edge.routed_bundle import DARK, SUBCLASSES, bright_frame, dark_frame, make_routed_bundle
from tests.edge.test_detector import frame_of
from tests.edge.tiny_bundle import MAP_STRIDE, PAIRS, POOLING, TAPS, good_frame, make_tiny_bundle, maps_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.frames import Prediction

MEASURED = Look(measure=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_routed_bundle(tmp_path_factory.mktemp("looks") / "bundle")


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0].value}-{pair[1].value}")
def detector(bundle: Bundle, request: pytest.FixtureRequest) -> Detector:
    engine, precision = request.param
    return Detector.open(bundle, engine=engine, precision=precision, threads=1)


def dimmed(seed: int, gain: float = 0.72) -> np.ndarray:
    return np.rint(good_frame(seed) * gain + 8).astype(np.uint8)


def moments_of(detector: Detector, images: Sequence[np.ndarray], look: Look = MEASURED) -> Moments:
    found = detector.predict(frame_of(images[0]), look).moments
    assert found is not None
    return found


def from_to(detector: Detector, now: np.ndarray, wanted: np.ndarray, own: float = 0.0) -> MomentCorrection:
    """A correction as a camera that follows would have it: taps are measured behind the correction of the canvas."""
    reference, seen = moments_of(detector, [wanted]), moments_of(detector, [now])
    of_canvas = Look(0, 1, MomentCorrection(_image_of(seen), _image_of(reference)), measure=True)
    behind = moments_of(detector, [now], of_canvas)
    return MomentCorrection(behind, reference, own)


def _image_of(moments: Moments) -> Moments:
    names = (IMAGE, DETAIL)
    return Moments({name: moments.mean[name] for name in names}, {name: moments.std[name] for name in names})


def same(one: Prediction, other: Prediction) -> None:
    assert np.array_equal(one.anomaly_map, other.anomaly_map)
    assert one.moments_version == other.moments_version
    assert (one.route is None) == (other.route is None)
    if one.route is not None and other.route is not None:
        assert np.array_equal(one.route, other.route)
    assert (one.moments is None) == (other.moments is None)
    if one.moments is not None and other.moments is not None:
        for name, mean in one.moments.mean.items():
            assert np.array_equal(mean, other.moments.mean[name])
            assert np.array_equal(one.moments.std[name], other.moments.std[name])


def test_plain_measured_and_identity_give_the_same_bits(detector: Detector) -> None:
    frame = frame_of(dimmed(3))
    plain = detector.predict(frame)
    measured = detector.predict(frame, MEASURED)
    assert measured.moments is not None
    identity = Look(0, 5, MomentCorrection(measured.moments, measured.moments))
    same(detector.predict(frame, PLAIN), plain)
    assert plain.moments is None
    assert plain.moments_version == 0
    for other in (measured, detector.predict(frame, identity)):
        assert np.array_equal(other.anomaly_map, plain.anomaly_map)
        assert np.array_equal(other.route, plain.route)
    assert detector.predict(frame, identity).moments_version == 5


def test_plain_is_what_two_sessions_alone_give(bundle: Bundle, detector: Detector) -> None:
    preprocessing, state = bundle.manifest.preprocessing, load_file(bundle.file("state.safetensors"))
    image = dimmed(4)
    detector.predict(frame_of(image), Look(0, 1, from_to(detector, image, good_frame(4), 0.5), measure=True))
    expected = maps_of(
        bundle.path, preprocessing, [to_canvas(image, preprocessing)], state,
        engine=detector.status.engine, precision=detector.status.precision,
    )[0]  # fmt: skip
    assert np.allclose(detector.predict(frame_of(image)).anomaly_map, expected, atol=1e-5)


@pytest.mark.parametrize("own", [0.0, 0.4, 1.0])
def test_at_once_and_ahead_agree_bit_for_bit(detector: Detector, own: float) -> None:
    image = dimmed(5)
    look = Look(0, 7, from_to(detector, image, good_frame(5), own), measure=True)
    frames = [frame_of(dimmed(seed)) for seed in (5, 6, 7)]
    at_once = [detector.predict(frame, look) for frame in frames]
    for frame, expected in zip(frames, at_once, strict=True):
        pending = detector.begin(frame, look)
        assert pending is not None
        # Another frame, seen otherwise, has its whole way while this one is in the engine.
        between = detector.predict(frames[0], MEASURED)
        found = pending.result()
        same(found, expected)
        assert found.moments_version == 7
        same(between, detector.predict(frames[0], MEASURED))


def test_correction_takes_back_what_the_lamp_did(detector: Detector) -> None:
    good, dim = good_frame(8), dimmed(8)
    usual, off = (pool_score(detector.predict(frame_of(image)).anomaly_map, POOLING) for image in (good, dim))
    for own in (0.0, 1.0):
        look = Look(0, 1, from_to(detector, dimmed(9), good_frame(9), own))
        back = pool_score(detector.predict(frame_of(dim), look).anomaly_map, POOLING)
        assert abs(back - usual) < 0.3 * (off - usual)


def test_moments_are_of_the_canvas_as_it_came_and_of_taps_behind_it(bundle: Bundle, detector: Detector) -> None:
    image = dimmed(10)
    preprocessing = bundle.manifest.preprocessing
    tiles = cut_tiles(to_canvas(image, preprocessing), preprocessing).copy()
    correction = from_to(detector, image, good_frame(10))
    found = detector.predict(frame_of(image), Look(0, 1, correction, measure=True)).moments
    assert found is not None
    raw = measure_canvas(tiles)
    assert np.array_equal(found.mean[IMAGE], raw.mean[IMAGE])
    assert set(found.mean) == {DETAIL, IMAGE, *TAPS}
    correction.canvas(tiles)
    with detector._trunk.borrow() as slot:
        behind = measure_taps(slot.session.run({"image": tiles}))
    for name in TAPS:
        assert np.allclose(found.mean[name], behind.mean[name], atol=1e-6)


def test_embeddings_of_a_canvas_are_corrected_as_its_frame_is(bundle: Bundle, detector: Detector) -> None:
    image = dimmed(11)
    canvas = to_canvas(image, bundle.manifest.preprocessing)
    kept = canvas.copy()
    look = Look(0, 1, from_to(detector, image, good_frame(11)))
    good, off, back = (
        detector.embeddings_of_canvas(one, look_of)
        for one, look_of in (
            (to_canvas(good_frame(11), bundle.manifest.preprocessing), PLAIN), (canvas, PLAIN), (canvas, look),
        )
    )  # fmt: skip
    assert np.array_equal(canvas, kept)
    assert np.abs(back - good).mean() < 0.3 * np.abs(off - good).mean()
    assert np.array_equal(detector.map_of_canvas(canvas, look), detector.predict(frame_of(image), look).anomaly_map)


def test_golden_frames_are_seen_plain(detector: Detector) -> None:
    before = detector.golden_error()
    image = dimmed(12)
    detector.predict(frame_of(image), Look(0, 1, from_to(detector, image, good_frame(12), 0.5), measure=True))
    assert detector.golden_error() == before


def test_route_comes_with_the_map_and_names_the_subclass(detector: Detector) -> None:
    dark, bright = detector.predict(frame_of(dark_frame(13))), detector.predict(frame_of(bright_frame(13)))
    for found, name in ((dark, 0), (bright, 1)):
        assert found.route is not None
        assert found.route.dtype == np.float32
        assert found.route.shape == (2,)
        assert int(found.route.argmax()) == name
        # The tiny trunk was quantised for the bright product alone: what the dark one looks like is cut off.
        assert found.route[name] > 0 or detector.status.precision is Precision.INT8
        assert found.subclass == SUBCLASSES[name]
    kept = np.array(dark.route)
    detector.predict(frame_of(bright_frame(14)))
    assert np.array_equal(dark.route, kept)
    neither = detector.predict(frame_of(bright_frame(13, 30))).route
    assert neither is not None
    assert (neither < 0).all() or detector.status.precision is Precision.INT8


def test_no_router_gives_no_route(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = make_tiny_bundle(tmp_path_factory.mktemp("plain") / "b")
    for engine in Engine:
        found = Detector.open(plain, engine=engine, precision=Precision.FLOAT32, threads=1).predict(
            frame_of(good_frame(1))
        )
        assert found.route is None
        assert found.subclass == ""


@pytest.mark.parametrize("engine", list(Engine))
def test_cameras_of_one_detector_have_looks_of_their_own(bundle: Bundle, engine: Engine) -> None:
    shared = Detector.open(bundle, engine=engine, precision=Precision.FLOAT32, threads=1, streams=2)
    images = [dimmed(20, gain) for gain in (0.6, 0.8, 1.0, 1.2)]
    # What is sharpened goes through buffers of its own.
    images[0], images[3] = (cv2.GaussianBlur(images[index], (0, 0), 0.7) for index in (0, 3))
    looks = [
        Look(0, index + 1, from_to(shared, image, good_frame(20), own), measure=True)
        for index, (image, own) in enumerate(zip(images, (0.0, 0.5, 1.0, 0.0), strict=True))
    ]
    expected = [shared.predict(frame_of(image), look) for image, look in zip(images, looks, strict=True)]
    begun = threading.Barrier(len(images))

    def camera(index: int) -> None:
        frame, look = frame_of(images[index]), looks[index]
        begun.wait(20)
        for _ in range(15):
            pending = shared.begin(frame, look)
            same(shared.predict(frame, look), expected[index])
            if pending is not None:
                same(pending.result(), expected[index])

    with ThreadPoolExecutor(len(images)) as pool:
        list(pool.map(camera, range(len(images))))


@pytest.mark.parametrize("engine", list(Engine))
def test_tiles_of_a_frame_are_measured_and_corrected_as_one(tmp_path: object, engine: Engine) -> None:
    tiled = make_routed_bundle(tmp_path / "b", tiles=Tiles(rows=2, cols=2, overlap=32))  # type: ignore[operator]
    detector = Detector.open(tiled, engine=engine, precision=Precision.FLOAT32, threads=1)
    preprocessing = tiled.manifest.preprocessing
    image = dimmed(30)
    look = Look(0, 2, from_to(detector, image, good_frame(30)), measure=True)
    found = detector.predict(frame_of(image), look)
    assert found.moments is not None
    tiles = cut_tiles(to_canvas(image, preprocessing), preprocessing)
    assert np.array_equal(found.moments.mean[IMAGE], measure_canvas(tiles).mean[IMAGE])
    assert look.correction is not None
    look.correction.canvas(tiles)
    with detector._trunk.borrow() as slot:
        taps = {name: np.array(tap) for name, tap in slot.session.run({"image": tiles}).items()}
        head = detector._in_force.head.session("anomaly_map", slot.index)
        maps = np.array(head.run(look.correction.taps(taps))["anomaly_map"])
    assert np.allclose(found.anomaly_map, join_maps(maps, preprocessing, MAP_STRIDE), atol=1e-5)
    pending = detector.begin(frame_of(image), look)
    assert pending is not None
    same(pending.result(), found)
    assert found.route is not None
    assert found.route.shape == (2,)
    assert detector.predict(frame_of(dark_frame(30))).subclass == DARK


def test_of_image_alone_taps_stay_as_they_are(detector: Detector) -> None:
    image = dimmed(31)
    reference, seen = (_image_of(moments_of(detector, [one])) for one in (good_frame(31), image))
    look = Look(0, 1, MomentCorrection(seen, reference), measure=True)
    usual, off, back = (
        pool_score(detector.predict(frame_of(one), seen_as).anomaly_map, POOLING)
        for one, seen_as in ((good_frame(31), PLAIN), (image, PLAIN), (image, look))
    )
    assert abs(back - usual) < 0.5 * (off - usual)
    assert joined([reference]).mean.keys() == {IMAGE, DETAIL}
