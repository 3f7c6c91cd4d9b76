"""GigE Vision and USB3 Vision cameras (GenICam) through Aravis: settings to features, pixel formats to BGR.

It must not know queues, threads or reconnecting.
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from edge.capture.aravis import Camera, IncompleteError, library
from edge.capture.buffers import BufferPool
from edge.capture.settings import GENICAM_FORMATS, TriggerMode
from edge.capture.sources import IDLE, TIMEOUT_S, CorruptFrameError, Grab, Idle
from edge.errors import CaptureError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.capture.aravis import Image
    from edge.capture.settings import SourceSettings

_POLL_S = 0.2
# How often a silent camera is asked whether it is still there.
_LOOK_S = 1.0
_TOLERANCE = 0.02
_FAKE = "Fake_"
_CHANNELS = 3


class _Format(NamedTuple):
    """A PFNC pixel format: bytes per pixel, and OpenCV's code to BGR, None where it is BGR already."""

    bytes: int
    code: int | None


# OpenCV names a Bayer pattern by its second row, from the second pixel on: its BG is PFNC's RG, RGGB.
FORMATS = {
    0x01080001: _Format(1, cv2.COLOR_GRAY2BGR),  # Mono8
    0x01080008: _Format(1, cv2.COLOR_BayerGB2BGR),  # BayerGR8
    0x01080009: _Format(1, cv2.COLOR_BayerBG2BGR),  # BayerRG8
    0x0108000A: _Format(1, cv2.COLOR_BayerGR2BGR),  # BayerGB8
    0x0108000B: _Format(1, cv2.COLOR_BayerRG2BGR),  # BayerBG8
    0x02180014: _Format(3, cv2.COLOR_RGB2BGR),  # RGB8
    0x02180015: _Format(3, None),  # BGR8
    0x02100032: _Format(2, cv2.COLOR_YUV2BGR_YUY2),  # YUV422_8
    0x0210001F: _Format(2, cv2.COLOR_YUV2BGR_UYVY),  # YUV422_8_UYVY
}
"""GenICam PFNC code -> how it becomes BGR."""


def to_bgr(image: Image, out: npt.NDArray[np.uint8]) -> None:
    """Turn an image as the camera sent it into BGR.

    Args:
        image: of a format of :data:`FORMATS`.
        out: uint8 [height, width, 3], filled.

    Raises:
        CaptureError: another format.
        CorruptFrameError: fewer bytes than its size asks for.
    """
    known = FORMATS.get(image.pixel_format)
    if known is None:
        raise CaptureError(
            f"gives pixel format 0x{image.pixel_format:08X}, which is not read; set pixel_format to one of "
            f"{', '.join(GENICAM_FORMATS)}"
        )
    needed = image.height * image.width * known.bytes
    if image.data.size < needed:
        raise CorruptFrameError(f"{image.data.size} bytes came, {needed} are needed", name=f"{image.frame_id}")
    shape = (image.height, image.width) if known.bytes == 1 else (image.height, image.width, known.bytes)
    pixels = image.data[:needed].reshape(shape)
    if known.code is None:
        np.copyto(out, pixels)
    else:
        cv2.cvtColor(pixels, known.code, dst=out)


class GenicamSource:
    """Frames of one camera, by its id, serial number or IP address.

    Args:
        settings: kind genicam.
        buffers: frames kept for re-use.
    """

    def __init__(self, settings: SourceSettings, *, buffers: int) -> None:
        self._settings = settings
        self._device = str(settings.device)
        self._pool = BufferPool(buffers)
        self._silence_s = max(TIMEOUT_S, settings.stall_seconds)
        self._camera: Camera | None = None
        self._heard = self._looked = 0.0
        self._fired: float | None = None
        self._away = False
        self._remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"GenicamSource({self._device})"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the camera gives other than asked for."""
        return self._remarks

    def open(self) -> None:
        """Find the camera, set its features and begin to acquire.

        Raises:
            CaptureError: Aravis is not installed, the camera does not answer, another program controls it, or it
                refuses a feature.
        """
        self.close()
        camera = self._connect()
        try:
            self._remarks = tuple(_set_features(camera, self._settings))
            camera.start(self._settings.genicam.buffers)
        except CaptureError as error:
            camera.close()
            raise CaptureError(f"camera {self._device}: {error}") from error
        self._camera = camera
        self._heard = self._looked = time.monotonic()
        self._fired = None
        self._away = False

    def read(self) -> Grab | Idle | None:
        """Return the next frame; IDLE after a fifth of a second without one.

        Raises:
            CorruptFrameError: packets of the image are missing.
            CaptureError: the camera is away, is controlled by another program, or is silent though frames are due.
        """
        camera = self._camera
        if camera is None:
            return None
        try:
            image = camera.pop(_POLL_S)
        except IncompleteError as error:
            self._heard = time.monotonic()
            raise CorruptFrameError(f"camera {self._device}: {error}", name="") from error
        if image is None:
            self._look_after(camera)
            return IDLE
        self._heard = time.monotonic()
        self._fired = None
        bgr = self._pool.take((image.height, image.width, _CHANNELS))
        try:
            to_bgr(image, bgr)
        except CorruptFrameError:
            raise
        except CaptureError as error:
            raise CaptureError(f"camera {self._device}: {error}") from error
        return Grab(bgr, f"{image.frame_id}")

    def fire(self) -> None:
        """Execute TriggerSoftware; returns when the camera has acknowledged it.

        Raises:
            CaptureError: the camera is not connected, does not answer or refuses.
        """
        camera = self._camera
        if camera is None:
            raise CaptureError(f"camera {self._device}: is not connected; its state says why")
        if self._fired is None:
            self._fired = time.monotonic()
        try:
            camera.trigger()
        except CaptureError as error:
            raise CaptureError(f"camera {self._device}: {error}") from error

    def close(self) -> None:
        """Stop the camera and let go of it; may be called twice."""
        camera, self._camera = self._camera, None
        self._pool.clear()
        if camera is not None:
            camera.close(away=self._away)

    def _connect(self) -> Camera:
        found = self._device
        fake = found.startswith(_FAKE)
        refusal = "does not answer"
        if fake:
            library().call("arv_enable_interface", b"Fake")
        try:
            return Camera(found)
        except CaptureError as error:
            refusal = str(error)
        # Aravis opens by id and address; a serial number alone is looked up, which takes a second.
        for device in () if _is_address(found) else library().devices(fake=fake):
            if found in (device.serial, device.id):
                try:
                    return Camera(device.id)
                except CaptureError as error:
                    refusal = str(error)
        raise CaptureError(
            f"camera {found}: {refusal}; check its power, cable and address (`arv-tool-0.8` lists those that answer)"
        )

    def _look_after(self, camera: Camera) -> None:
        """No frame came: is the camera still ours, and are frames due?"""
        now = time.monotonic()
        since = self._heard if self._settings.trigger is TriggerMode.FREE else self._fired
        if since is not None and now - max(since, self._heard) >= self._silence_s:
            raise CaptureError(f"camera {self._device}: gives no frame for {self._silence_s:g} s")
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        if not camera.controlled:
            self._away = True
            raise CaptureError(f"camera {self._device}: control was lost, it was away or another program took it")
        try:
            # One register, so that a camera that is away shows though no frame is due.
            camera.ask("get_payload")
        except CaptureError as error:
            self._away = True
            raise CaptureError(f"camera {self._device}: does not answer any more ({error})") from error


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _set_features(camera: Camera, settings: SourceSettings) -> list[str]:
    """Set what the settings name, in an order that cameras accept: format and window before rate and exposure.

    Returns:
        A remark for each value that the camera rounded by more than 2 %.
    """
    asked = settings.genicam
    if camera.has("AcquisitionMode"):
        camera.set_text("AcquisitionMode", "Continuous")
    if settings.pixel_format is not None:
        camera.set_text("PixelFormat", settings.pixel_format)
    remarks = _set_window(camera, settings)
    if asked.exposure_us is not None:
        if camera.has("ExposureAuto"):
            camera.set_text("ExposureAuto", "Off")
        camera.ask("set_exposure_time", asked.exposure_us)
        remarks += _rounded("exposure_us", asked.exposure_us, camera.ask("get_exposure_time"))
    if asked.gain is not None:
        if camera.has("GainAuto"):
            camera.set_text("GainAuto", "Off")
        camera.ask("set_gain", asked.gain)
        remarks += _rounded("gain", asked.gain, camera.ask("get_gain"))
    camera.ask("clear_triggers")
    if settings.trigger is TriggerMode.FREE:
        if settings.fps is not None:
            camera.ask("set_frame_rate", settings.fps)
            remarks += _rounded("fps", settings.fps, camera.ask("get_frame_rate"))
    else:
        _set_trigger(camera, settings)
    if camera.is_gige:
        _set_packets(camera, settings)
    return remarks


def _set_window(camera: Camera, settings: SourceSettings) -> list[str]:
    asked = settings.genicam
    if settings.width is None and settings.height is None and not (asked.offset_x or asked.offset_y):
        return []
    # Offsets first to nothing: a window must never reach beyond the sensor on the way.
    wanted = (settings.width or -1, settings.height or -1)
    camera.ask("set_region", 0, 0, *wanted)
    if asked.offset_x or asked.offset_y:
        camera.ask("set_region", asked.offset_x, asked.offset_y, *wanted)
    names = {"Width": settings.width, "Height": settings.height, "OffsetX": asked.offset_x, "OffsetY": asked.offset_y}
    remarks = []
    for name, value in names.items():
        if value and (given := camera.ask("get_integer", name.encode())) != value:
            remarks.append(f"{name} {value} was asked for, the camera gives {given}")
    return remarks


def _set_trigger(camera: Camera, settings: SourceSettings) -> None:
    """GenICam SFNC, Acquisition Control: one frame per start-of-frame trigger."""
    asked = settings.genicam
    software = settings.trigger is TriggerMode.SOFTWARE
    camera.set_text("TriggerSelector", "FrameStart")
    # The source before the mode: a line that floats would give frames in between.
    camera.set_text("TriggerSource", "Software" if software else asked.trigger_source)
    if not software and camera.has("TriggerActivation"):
        camera.set_text("TriggerActivation", asked.trigger_activation)
    if asked.trigger_delay_us is not None:
        camera.ask("set_float", b"TriggerDelay", asked.trigger_delay_us)
    camera.set_text("TriggerMode", "On")


def _set_packets(camera: Camera, settings: SourceSettings) -> None:
    asked = settings.genicam
    if asked.packet_size is None:
        camera.ask("gv_auto_packet_size")
    else:
        camera.ask("gv_set_packet_size", asked.packet_size)
    if asked.packet_delay_ns is not None:
        camera.ask("gv_set_packet_delay", asked.packet_delay_ns)


def _rounded(name: str, asked: float, given: float) -> list[str]:
    if abs(given - asked) <= _TOLERANCE * abs(asked):
        return []
    return [f"{name} {asked:g} was asked for, the camera gives {given:g}"]
