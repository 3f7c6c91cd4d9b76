"""Bundles and engines: what is installed, what the golden frames say, and whether this machine keeps up."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.look import Look
from edge.adaptation.reference import described, read_reference
from edge.cameras import make_judge
from edge.doctor.findings import Finding, doubt, fine, isolated, of_error, wrong
from edge.doctor.sight import sight
from edge.errors import CaptureError, EngineError, LinewardError
from edge.frames import Frame
from edge.inference.detectors import Detectors
from edge.inference.engines import available_engines
from edge.inputs import Modality
from edge.products.files import add_products
from edge.products.judging import product_judges
from edge.settings import DEFAULT_FRAME_RATE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edge.doctor.cameras import Seen
    from edge.inference.detector import Detector
    from edge.judgement.verdicts import Judge
    from edge.settings import BoxSettings

CALLS = 20
LOAD_S = 2.0
# The rest is for decoding, evidence and the memory.
BUSY_SHARE = 0.8


def look_at_installed() -> Iterator[Finding]:
    """Name the engines."""
    names = [engine.value for engine in available_engines()]
    if not names:
        yield wrong("engine", "", "none is installed", "run: pip install 'lineward[box-openvino]', or [box-cpu]")
    else:
        yield fine("engine", "", f"installed: {', '.join(names)}", engines=names)


def look_at_bundles(settings: BoxSettings, seen: Sequence[Seen], *, scale: float | None) -> Iterator[Finding]:
    """Open the bundles as a box does, and judge frames of the cameras with them.

    Args:
        settings: of the box.
        seen: what the cameras gave.
        scale: pixels of the camera frame per millimetre, for all cameras; None where unknown.
    """
    try:
        detectors = Detectors.open(settings)
    except LinewardError as error:
        yield of_error("bundle", "", error)
        return
    for text in add_products(settings.products, detectors):
        yield wrong("product", "", text, "the message says how; the box runs without this product")
    for detector in detectors:
        yield from _proof(detector)
        if detector.products:
            names = list(detector.products)
            yield fine("products", detector.bundle.manifest.product, f"judges {', '.join(names)}", products=names)
        yield from isolated("moments", "", lambda detector=detector: _moments(detector))  # type: ignore[misc]  # as below
    usable = [one for one in seen if one.camera.enabled]
    for one in usable:
        detector, name = detectors.of(one.camera.name), one.camera.name
        yield from isolated("threshold", name, lambda one=one, detector=detector: _threshold(one, detector))  # type: ignore[misc]  # mypy has no defaults in lambdas
        yield from isolated("defect", name, lambda one=one, detector=detector: _defect(one, detector, scale))  # type: ignore[misc]  # as above
    yield from isolated("load", "", lambda: _load(detectors, usable))


def made(settings: BoxSettings) -> datetime | None:
    """When the box's own bundle was exported; None where it cannot be read."""
    from edge.bundle import Bundle  # noqa: PLC0415 (a name that only this needs)

    try:
        return Bundle.open(settings.bundle.resolve()).manifest.created.astimezone(timezone.utc)
    except LinewardError:
        return None


def _proof(detector: Detector) -> Iterator[Finding]:
    manifest, status = detector.bundle.manifest, detector.status
    subject = manifest.product
    tolerance = manifest.golden.tolerance.get(f"{status.engine.value}_{status.precision.value}", float("nan"))
    text = (
        f"{manifest.method} {detector.bundle.id} on {status.engine.value} {status.precision.value}; golden scores "
        f"differ by {status.golden_max_error:.3g}, {tolerance:.3g} is allowed"
    )
    figures = {"id": detector.bundle.id, "engine": status.engine.value, "precision": status.precision.value,
               "golden_max_error": status.golden_max_error}  # fmt: skip
    if status.fallback_reason:
        cure = "export the bundle on a machine of this kind, or name another engine or precision"
        yield doubt("bundle", subject, f"{text}; falls back: {status.fallback_reason}", cure, **figures)
    else:
        yield fine("bundle", subject, text, **figures)


def _moments(detector: Detector) -> Iterator[Finding]:
    bundle = detector.bundle
    try:
        reference = read_reference(bundle, detector.status.precision)
    except LinewardError as error:
        yield of_error("moments", bundle.manifest.product, error)
        return
    experts = 0 if reference is None else len(reference.moments)
    yield fine("moments", bundle.manifest.product, described(bundle.manifest), experts=experts)


def _threshold(seen: Seen, detector: Detector) -> Iterator[Finding]:
    camera, status = seen.camera, detector.status
    if detector.products:
        judges = product_judges(camera, detector, lambda _camera, _product: None)
    else:
        judges = (make_judge(camera, detector.bundle, detector.bundle.calibration(status.engine, status.precision)),)
    for index, judge in enumerate(judges):
        yield from _threshold_of(seen, detector, judge, index)


def _threshold_of(seen: Seen, detector: Detector, judge: Judge, index: int) -> Iterator[Finding]:
    """Of one product, by its index; the only one has 0."""
    camera, of = seen.camera, f"{judge.product}: " if judge.product else ""
    if seen.frame is not None:
        # Whether mask and smallest area fit is known once a frame of the camera's size has come.
        with contextlib.suppress(CaptureError):  # a frame that the crop does not fit is told under "defect"
            judge.judge(detector.predict(_frame(seen, detector), Look(index)))
    for text in judge.warnings:
        yield doubt("threshold", camera.name, of + text, "correct the camera's settings, or what the text names")
    threshold = judge.threshold
    text = f"{of}{threshold.value:.4g} ({threshold.method}) for {camera.budget_text(threshold.alpha)}"
    if threshold.budget_supported or threshold.method == "external":
        yield fine("threshold", camera.name, text, value=threshold.value)
    else:
        promised = camera.budget_text(threshold.smallest_supported_alpha)
        text += f"; {threshold.n_groups} groups of good scores promise {promised} at best"
        yield doubt("threshold", camera.name, text, "export with more good data, or allow more false alarms",
                    value=threshold.value)  # fmt: skip


def _defect(seen: Seen, detector: Detector, scale: float | None) -> Iterator[Finding]:
    camera, manifest = seen.camera, detector.bundle.manifest
    if seen.frame is None or manifest.modality is Modality.SIGNAL:
        return
    height, width = seen.frame.image.shape[:2]
    crop = manifest.preprocessing.crop
    if crop is not None and (crop.x + crop.w > width or crop.y + crop.h > height):
        text = (
            f"the bundle looks at {crop.w} x {crop.h} pixels at ({crop.x}, {crop.y}), the frame has {width} x {height}"
        )
        yield wrong("defect", camera.name, text, "set the camera to the size that the bundle was trained with")
        return
    found = sight(manifest, frame_width=width, frame_height=height)
    own = None if camera.min_area is None else camera.min_area.pixels_per_mm
    per_mm = scale or own

    def said(pixels: float) -> str:
        return f"{pixels:.0f} px" + ("" if per_mm is None else f" ({pixels / per_mm:.2g} mm)")

    smallest = found.smallest
    if camera.min_area is not None:
        smallest = max(smallest, camera.min_area.in_pixels**0.5)
    text = (
        f"one map cell covers {found.cell_width:.1f} x {found.cell_height:.1f} px; a square of {said(smallest)} fills "
        f"one wherever it lies"
    )
    if found.pooled > 1:
        text += f", one of {said(found.full)} all {found.pooled} cells of the score"
    figures = {"cell_px": [round(found.cell_width, 2), round(found.cell_height, 2)], "smallest_px": round(smallest, 1),
               "full_px": round(found.full, 1)}  # fmt: skip
    if found.enlarged:
        cure = "give it a larger image, or export with a smaller canvas: enlarging shows nothing new"
        yield doubt("defect", camera.name, f"{text}; the frame is smaller than what the network looks at", cure,
                    **figures)  # fmt: skip
    else:
        yield fine("defect", camera.name, text, **figures)


def _load(detectors: Detectors, seen: Sequence[Seen]) -> Iterator[Finding]:
    """Judge with as many threads as the box has cameras, and compare with what the cameras give."""
    if not seen:
        return
    frames = [_frame(one, detectors.of(one.camera.name)) for one in seen]
    for one, frame in zip(seen, frames, strict=True):
        detector = detectors.of(one.camera.name)
        took = []
        for _ in range(CALLS):
            prediction = detector.predict(frame)
            took.append((prediction.preprocess_ns + prediction.inference_ns) / 1e6)
        p50, worst = float(np.median(took)), max(took)
        text = f"{p50:.1f} ms per frame, {worst:.1f} ms at most of {CALLS}"
        limit = one.camera.timeout_ms
        if limit is not None and worst > limit:
            yield wrong("latency", one.camera.name, f"{text}, {limit:g} ms are allowed", "see: lineward bench, engines",
                        p50_ms=round(p50, 2))  # fmt: skip
        else:
            yield fine("latency", one.camera.name, text, p50_ms=round(p50, 2))
    able = _rate_together([(detectors.of(one.camera.name), frame) for one, frame in zip(seen, frames, strict=True)])
    wanted = sum(_wanted(one) for one in seen)
    cores = len(os.sched_getaffinity(0))
    text = f"{able:.0f} frames/s can be judged on {cores} cores, the cameras give {wanted:.0f}"
    figures = {"able_per_s": round(able, 1), "wanted_per_s": round(wanted, 1)}
    if wanted > able:
        cure = "lower the cameras' fps, spread them over boxes, or use int8 and a smaller canvas"
        yield wrong("load", "", f"{text}: frames will be dropped", cure, **figures)
    elif wanted > BUSY_SHARE * able:
        cure = "leave a fifth for decoding and evidence: lower the cameras' fps"
        yield doubt("load", "", text, cure, **figures)
    else:
        yield fine("load", "", text, **figures)


def _frame(seen: Seen, detector: Detector) -> Frame:
    if seen.frame is not None:
        return seen.frame
    preprocessing = detector.bundle.manifest.preprocessing
    crop = preprocessing.crop
    shape = preprocessing.canvas_shape if crop is None else (crop.y + crop.h, crop.x + crop.w, 3)
    now = datetime.now(timezone.utc)
    # Grey, or a metre away, or a signal at rest.
    value = 128 if preprocessing.dtype == "uint8" else 1
    return Frame(np.full(shape, value, preprocessing.dtype), seen.camera.name, 0, time.monotonic_ns(), now)


def _wanted(seen: Seen) -> float:
    """Frames per second that a camera gives; a file without a pace waits, and wants nothing."""
    source = seen.camera.source
    if seen.rate is not None:
        return seen.rate
    return source.fps or ((seen.camera.frame_rate or DEFAULT_FRAME_RATE) if source.live else 0.0)


def _rate_together(pairs: Sequence[tuple[Detector, Frame]]) -> float:
    ending = time.monotonic() + LOAD_S
    counts = [0] * len(pairs)
    errors: list[EngineError] = []

    def judge(index: int, detector: Detector, frame: Frame) -> None:
        try:
            while time.monotonic() < ending:
                detector.predict(frame)
                counts[index] += 1
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=judge, args=(i, *pair), daemon=True) for i, pair in enumerate(pairs)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.monotonic() - began)
