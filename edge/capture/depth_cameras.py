"""Depth cameras by their makers' own packages: Intel RealSense (pyrealsense2) and Luxonis OAK (depthai).

Checked against pyrealsense2 2.59 and depthai 2.33 without a device, and never run with one; loaded where asked for.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from edge.capture.depth_sources import points_of
from edge.capture.sense_settings import DepthSourceSettings
from edge.capture.sources import IDLE, Grab, Idle
from edge.errors import CaptureError, MissingExtraError

if TYPE_CHECKING:
    from edge.capture.settings import SourceSettings

_POLL_MS = 200
_DEFAULT_SIZE, _DEFAULT_FPS = (640, 480), 30
_OAK_SIZE = (640, 400)


class RealSenseSource:
    """The depth stream of a RealSense camera (librealsense 2, ``rs2::pipeline``)."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._pipeline: Any = None
        self._scale = 0.0
        self._geometry = DepthSourceSettings()

    def open(self) -> None:
        """Start the depth stream; the device gives scale and geometry itself.

        Raises:
            CaptureError: no such camera, or it lacks the size or rate.
            MissingExtraError: pyrealsense2 is not installed.
        """
        try:
            import pyrealsense2 as rs  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise MissingExtraError("kind realsense needs pyrealsense2; run: pip install pyrealsense2") from error
        self.close()
        settings = self._settings
        config = rs.config()
        if str(settings.device) != "0":
            config.enable_device(str(settings.device))
        width, height = settings.width or _DEFAULT_SIZE[0], settings.height or _DEFAULT_SIZE[1]
        config.enable_stream(rs.stream.depth, width, height, rs.format.z16, round(settings.fps or _DEFAULT_FPS))
        pipeline = rs.pipeline()
        try:
            profile = pipeline.start(config)
            # From here on it streams, and has to be stopped whatever else fails.
            self._pipeline = pipeline
            self._scale = float(profile.get_device().first_depth_sensor().get_depth_scale())
            lens = profile.get_stream(rs.stream.depth).as_video_stream_profile().get_intrinsics()
        except RuntimeError as error:
            raise CaptureError(f"realsense {settings.device}: cannot be opened ({error}); see its cable") from error
        self._geometry = _geometry(f"realsense {settings.device}", lens.fx, lens.fy, lens.ppx, lens.ppy)

    def read(self) -> Grab | Idle:
        """Return the next depth map.

        Raises:
            CaptureError: the camera is gone.
        """
        try:
            arrived, frames = self._pipeline.try_wait_for_frames(_POLL_MS)
        except RuntimeError as error:
            raise CaptureError(f"realsense {self._settings.device}: {error}") from error
        depth = frames.get_depth_frame() if arrived else None
        if not depth:
            return IDLE
        counts = np.asanyarray(depth.get_data())
        return Grab(
            points_of(counts.astype(np.float32) * np.float32(self._scale), self._geometry),
            f"#{depth.get_frame_number()}",
        )

    def close(self) -> None:
        """Stop the stream."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            # One whose device is gone has stopped by itself, and says so (RuntimeError).
            with contextlib.suppress(RuntimeError):
                pipeline.stop()


class OakSource:
    """The stereo depth of an OAK camera (depthai 2, ``StereoDepth`` node), in the frame of its right camera."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._device: Any = None
        self._queue: Any = None
        self._geometry = DepthSourceSettings()

    def open(self) -> None:
        """Start a pipeline of two mono cameras and stereo depth.

        Raises:
            CaptureError: no such camera.
            MissingExtraError: depthai 2 is not installed.
        """
        try:
            import depthai as dai  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise MissingExtraError("kind oak needs depthai 2; run: pip install 'depthai<3'") from error
        if not hasattr(dai.node, "XLinkOut"):
            raise MissingExtraError("kind oak needs depthai 2, another is installed; run: pip install 'depthai<3'")
        self.close()
        pipeline = dai.Pipeline()
        stereo, out = pipeline.create(dai.node.StereoDepth), pipeline.create(dai.node.XLinkOut)
        for socket, port in ((dai.CameraBoardSocket.CAM_B, stereo.left), (dai.CameraBoardSocket.CAM_C, stereo.right)):
            mono = pipeline.create(dai.node.MonoCamera)
            mono.setBoardSocket(socket)
            mono.setResolution(dai.MonoCameraProperties.SensorResolution.THE_400_P)
            mono.setFps(self._settings.fps or _DEFAULT_FPS)
            mono.out.link(port)
        stereo.setLeftRightCheck(True)
        stereo.setDepthAlign(dai.CameraBoardSocket.CAM_C)
        out.setStreamName("depth")
        stereo.depth.link(out.input)
        try:
            self._device = dai.Device(pipeline, dai.DeviceInfo(str(self._settings.device)))
            self._queue = self._device.getOutputQueue(name="depth", maxSize=2, blocking=False)
            lens = self._device.readCalibration().getCameraIntrinsics(dai.CameraBoardSocket.CAM_C, *_OAK_SIZE)
        except RuntimeError as error:
            raise CaptureError(f"oak {self._settings.device}: cannot be opened ({error}); see its cable") from error
        self._geometry = _geometry(f"oak {self._settings.device}", lens[0][0], lens[1][1], lens[0][2], lens[1][2])

    def read(self) -> Grab | Idle:
        """Return the next depth map.

        Raises:
            CaptureError: the camera is gone.
        """
        try:
            frame = self._queue.tryGet()
        except RuntimeError as error:
            raise CaptureError(f"oak {self._settings.device}: {error}") from error
        if frame is None:
            # The queue has no bounded wait in version 2.
            time.sleep(_POLL_MS / 40_000)
            return IDLE
        millimetres = frame.getFrame()
        points = points_of(millimetres.astype(np.float32) * np.float32(0.001), self._geometry)
        return Grab(points, f"#{frame.getSequenceNum()}")

    def close(self) -> None:
        """Let go of the camera."""
        device, self._device, self._queue = self._device, None, None
        if device is not None:
            with contextlib.suppress(RuntimeError):
                device.close()


def _geometry(camera: str, fx: float, fy: float, cx: float, cy: float) -> DepthSourceSettings:
    try:
        return DepthSourceSettings(fx=fx, fy=fy, cx=cx, cy=cy)
    except ValidationError as error:
        raise CaptureError(
            f"{camera}: says focal lengths {fx:g}, {fy:g} and principal point {cx:g}, {cy:g}; calibrate it"
        ) from error
