"""Each camera for a few frames: does it open, what does it give, how fast, how is it exposed."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edge.capture.capture import Capture
from edge.capture.settings import SourceKind, TriggerMode
from edge.doctor.findings import Finding, doubt, fine, isolated, of_error, wrong
from edge.errors import CaptureError
from edge.inputs import Modality
from edge.settings import DEFAULT_FRAME_RATE, CameraSettings, Mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from edge.frames import Frame

FRAMES = 20
FIRST_FRAME_S = 10.0
_STOP_S = 2.0
_POLL_S = 0.2
# Of all pixels, and of 255.
_CLIPPED_SHARE, _CLIPPED, _DARK_MEAN = 0.05, 250, 20.0
_RATE_TOLERANCE = 0.2
_AT_ONCE = 8


@dataclass(slots=True)
class Seen:
    """What a camera gave.

    Attributes:
        camera: its settings.
        findings: what was found.
        frame: the last frame; None where none came.
        rate: frames per second of a live camera; None where it cannot be told.
    """

    camera: CameraSettings
    findings: list[Finding] = field(default_factory=list)
    frame: Frame | None = None
    rate: float | None = None


def look_at_cameras(cameras: Sequence[CameraSettings], *, seconds: float, running: bool) -> list[Seen]:
    """Open all enabled cameras at the same time, as a box does, and take some frames of each.

    Args:
        cameras: of the settings.
        seconds: for the frames of each, after its first.
        running: a box has them open now, perhaps.

    Returns:
        One per camera, in order, the disabled ones with a finding that says so.
    """

    def look(camera: CameraSettings) -> Seen:
        seen = Seen(camera)
        if not camera.enabled:
            seen.findings.append(fine("camera", camera.name, "is disabled"))
        elif camera.source.modality is Modality.SIGNAL:
            text = "is a signal, which is not looked at here; the box's status says what comes of it"
            seen.findings.append(fine("camera", camera.name, text))
        else:
            seen.findings += isolated("camera", camera.name, lambda: _look_at(seen, seconds=seconds, running=running))
        return seen

    with ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="look") as pool:
        return list(pool.map(look, cameras))


def list_genicam(cameras: Sequence[CameraSettings]) -> Iterator[Finding]:
    """Name the GigE and USB3 Vision cameras that answer, where the settings have such a camera.

    Raises:
        CaptureError: Aravis is not installed.
    """
    if all(camera.source.kind is not SourceKind.GENICAM for camera in cameras):
        return
    from edge.capture.aravis import library  # noqa: PLC0415 (loads a library of the system)

    devices = library().devices()
    if not devices:
        cure = "see its power, its cable, and that its address is in the network of this machine's card"
        yield doubt("camera", "genicam", "no GigE or USB3 Vision camera answers", cure)
    for device in devices:
        yield fine("camera", "genicam", f"{device.vendor} {device.model} answers as {device.id!r} at {device.address}")


def _look_at(seen: Seen, *, seconds: float, running: bool) -> Iterator[Finding]:
    camera = seen.camera
    capture = Capture(name=camera.name, settings=camera.source)
    try:
        capture.start()
        frames = _take(capture, camera, seconds)
        state, error, remarks, counters = capture.state, capture.error, capture.remarks, capture.counters
    except CaptureError as problem:
        yield of_error("camera", camera.name, problem)
        return
    finally:
        capture.stop(_STOP_S)
    if not frames:
        yield _no_frame(camera, error or f"is {state.value}", running=running)
        return
    seen.frame = frames[-1]
    span = (frames[-1].captured_ns - frames[0].captured_ns) / 1e9
    if camera.source.live and span > 0:
        seen.rate = (frames[-1].camera_seq - frames[0].camera_seq) / span
    height, width = seen.frame.image.shape[:2]
    rate = "" if seen.rate is None else f", {seen.rate:.1f} frames/s"
    figures = {"width": width, "height": height, "frames": len(frames)}
    if seen.rate is not None:
        figures["frames_per_second"] = round(seen.rate, 2)
    yield fine("camera", camera.name, f"{width} x {height} pixels{rate}, {camera.source.label}", **figures)
    for remark in remarks:
        yield doubt("camera", camera.name, remark, "correct the settings, or the camera's own")
    if counters.corrupt:
        text = f"{counters.corrupt} of {counters.corrupt + counters.captured} images could not be decoded"
        yield doubt("camera", camera.name, text, "see its cable, its network or the files")
    yield from _rate(seen)
    if camera.source.modality is Modality.IMAGE:
        yield _exposure(camera.name, seen.frame.image)
    else:
        share = float(np.isfinite(seen.frame.image[..., 2]).mean())
        yield fine("exposure", camera.name, f"{100 * share:.1f} % of the points are valid", valid_share=round(share, 4))
    yield from _region(camera, width, height)


def _take(capture: Capture, camera: CameraSettings, seconds: float) -> list[Frame]:
    frames: list[Frame] = []
    deadline = time.monotonic() + FIRST_FRAME_S
    while len(frames) < FRAMES and time.monotonic() < deadline and not capture.finished:
        if camera.source.trigger is TriggerMode.SOFTWARE:
            # Not connected yet: the deadline decides.
            with contextlib.suppress(CaptureError):
                capture.fire()
        frame = capture.get(_POLL_S)
        if frame is not None:
            if not frames:
                deadline = time.monotonic() + seconds
            frames.append(frame)
    return frames


def _no_frame(camera: CameraSettings, why: str, *, running: bool) -> Finding:
    if running and camera.source.live:
        return doubt("camera", camera.name, f"gives no frame ({why}), and a box is running, which may have it open",
                     "see its state in the box's status, or ask again with the box stopped")  # fmt: skip
    if camera.source.trigger is TriggerMode.HARDWARE:
        return doubt("camera", camera.name, f"gave no frame within {FIRST_FRAME_S:.0f} s without a trigger ({why})",
                     "let parts pass, or pull the trigger line, and ask again")  # fmt: skip
    return wrong("camera", camera.name, f"gives no frame within {FIRST_FRAME_S:.0f} s ({why})",
                 "see its power, its address or device, and its login")  # fmt: skip


def _rate(seen: Seen) -> Iterator[Finding]:
    camera, rate = seen.camera, seen.rate
    if rate is None or camera.source.trigger is not TriggerMode.FREE:
        return
    asked = camera.source.fps
    if asked is not None and rate < (1 - _RATE_TOLERANCE) * asked:
        text = f"gives {rate:.1f} frames/s, {asked:g} were asked for"
        yield doubt("camera", camera.name, text, "see its exposure time (dark scenes slow a camera) and its link")
    counted = camera.frame_rate or asked or DEFAULT_FRAME_RATE
    if camera.mode is Mode.STREAM and abs(rate - counted) > _RATE_TOLERANCE * counted:
        text = f"the false-alarm budget counts with {counted:g} frames/s, the camera gives {rate:.1f}"
        yield doubt("camera", camera.name, text, f"set frame_rate: {rate:.0f} for this camera")


def _exposure(name: str, image: npt.NDArray[np.uint8]) -> Finding:
    brightness, clipped = float(image.mean()), float((image >= _CLIPPED).mean())
    figures = {"brightness": round(brightness, 1), "clipped_share": round(clipped, 4)}
    text = f"mean brightness {brightness:.0f} of 255, {100 * clipped:.1f} % at the upper end"
    if clipped > _CLIPPED_SHARE:
        cure = "shorten the exposure or dim the light: a defect there cannot be seen"
        return doubt("exposure", name, text, cure, **figures)
    if brightness < _DARK_MEAN:
        cure = "light the scene, lengthen the exposure, take the cap off"
        return doubt("exposure", name, text, cure, **figures)
    return fine("exposure", name, text, **figures)


def _region(camera: CameraSettings, width: int, height: int) -> Iterator[Finding]:
    region = camera.region_of_interest
    for shape in (*region.include, *region.exclude):
        points = np.array(shape.outline())
        if points[:, 0].max() > width or points[:, 1].max() > height:
            text = f"a shape of the region of interest reaches beyond the frame of {width} x {height} pixels"
            yield doubt("camera", camera.name, text, "correct region_of_interest; was the camera's size changed?")
            return
