"""Aravis 0.8 (GigE Vision and USB3 Vision) by ctypes: devices, features, streams. Knows no frames and no settings.

Debian's package is libaravis-0.8-0; GObject introspection is not needed. Names are those of Aravis and GenICam SFNC.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import CaptureError

if TYPE_CHECKING:
    import numpy.typing as npt

_LIBRARY = "libaravis-0.8.so.0"
_SUCCESS = 0  # ArvBufferStatus
_STATUS = {
    -1: "unknown", 1: "cleared", 2: "time-out", 3: "missing packets", 4: "wrong packet id", 5: "another size",
    6: "still filling", 7: "aborted", 8: "no image",
}  # fmt: skip
_PATH = ctypes.c_void_p
_TEXT = ctypes.c_char_p
_NUMBER = ctypes.c_int
_LONG = ctypes.c_int64
_REAL = ctypes.c_double
_ERROR = ctypes.c_void_p
# name -> (result, arguments), from the headers of Aravis 0.8.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "arv_enable_interface": (None, (_TEXT,)),
    "arv_update_device_list": (None, ()),
    "arv_get_n_devices": (ctypes.c_uint, ()),
    "arv_get_device_id": (_TEXT, (ctypes.c_uint,)),
    "arv_get_device_serial_nbr": (_TEXT, (ctypes.c_uint,)),
    "arv_get_device_model": (_TEXT, (ctypes.c_uint,)),
    "arv_get_device_vendor": (_TEXT, (ctypes.c_uint,)),
    "arv_get_device_address": (_TEXT, (ctypes.c_uint,)),
    "arv_camera_new": (_PATH, (_TEXT, _ERROR)),
    "arv_camera_get_device": (_PATH, (_PATH,)),
    "arv_camera_is_gv_device": (_NUMBER, (_PATH,)),
    "arv_camera_is_feature_available": (_NUMBER, (_PATH, _TEXT, _ERROR)),
    "arv_camera_get_integer": (_LONG, (_PATH, _TEXT, _ERROR)),
    "arv_camera_set_integer": (None, (_PATH, _TEXT, _LONG, _ERROR)),
    "arv_camera_get_float": (_REAL, (_PATH, _TEXT, _ERROR)),
    "arv_camera_set_float": (None, (_PATH, _TEXT, _REAL, _ERROR)),
    "arv_camera_get_string": (_TEXT, (_PATH, _TEXT, _ERROR)),
    "arv_camera_set_string": (None, (_PATH, _TEXT, _TEXT, _ERROR)),
    "arv_camera_execute_command": (None, (_PATH, _TEXT, _ERROR)),
    "arv_camera_set_region": (None, (_PATH, _NUMBER, _NUMBER, _NUMBER, _NUMBER, _ERROR)),
    "arv_camera_set_frame_rate": (None, (_PATH, _REAL, _ERROR)),
    "arv_camera_get_frame_rate": (_REAL, (_PATH, _ERROR)),
    "arv_camera_set_exposure_time": (None, (_PATH, _REAL, _ERROR)),
    "arv_camera_get_exposure_time": (_REAL, (_PATH, _ERROR)),
    "arv_camera_set_gain": (None, (_PATH, _REAL, _ERROR)),
    "arv_camera_get_gain": (_REAL, (_PATH, _ERROR)),
    "arv_camera_clear_triggers": (None, (_PATH, _ERROR)),
    "arv_camera_get_payload": (ctypes.c_uint, (_PATH, _ERROR)),
    "arv_camera_gv_set_packet_size": (None, (_PATH, _NUMBER, _ERROR)),
    "arv_camera_gv_set_packet_delay": (None, (_PATH, _LONG, _ERROR)),
    "arv_camera_gv_auto_packet_size": (ctypes.c_uint, (_PATH, _ERROR)),
    "arv_camera_create_stream": (_PATH, (_PATH, _PATH, _PATH, _ERROR)),
    "arv_camera_start_acquisition": (None, (_PATH, _ERROR)),
    "arv_camera_stop_acquisition": (None, (_PATH, _ERROR)),
    "arv_camera_software_trigger": (None, (_PATH, _ERROR)),
    "arv_gv_device_is_controller": (_NUMBER, (_PATH,)),
    "arv_stream_push_buffer": (None, (_PATH, _PATH)),
    "arv_stream_timeout_pop_buffer": (_PATH, (_PATH, ctypes.c_uint64)),
    "arv_buffer_new_allocate": (_PATH, (ctypes.c_size_t,)),
    "arv_buffer_get_status": (_NUMBER, (_PATH,)),
    "arv_buffer_get_data": (_PATH, (_PATH, ctypes.POINTER(ctypes.c_size_t))),
    "arv_buffer_get_image_width": (_NUMBER, (_PATH,)),
    "arv_buffer_get_image_height": (_NUMBER, (_PATH,)),
    "arv_buffer_get_image_pixel_format": (ctypes.c_uint32, (_PATH,)),
    "arv_buffer_get_frame_id": (ctypes.c_uint64, (_PATH,)),
}


class _GError(ctypes.Structure):
    _fields_ = (("domain", ctypes.c_uint32), ("code", _NUMBER), ("message", _TEXT))


@dataclass(frozen=True, slots=True)
class Device:
    """A camera that answered, as Aravis names it.

    Attributes:
        id: what :class:`Camera` takes.
        serial: serial number; may be empty.
        vendor: maker.
        model: of the maker.
        address: IP address or USB path; may be empty.
    """

    id: str
    serial: str
    vendor: str
    model: str
    address: str


@dataclass(frozen=True, slots=True)
class Image:
    """One stream buffer, valid until the next call of :meth:`Camera.pop`.

    Attributes:
        data: uint8 [bytes], as the camera sent it.
        width: pixels.
        height: pixels.
        pixel_format: PFNC code.
        frame_id: the camera's own count.
    """

    data: npt.NDArray[np.uint8]
    width: int
    height: int
    pixel_format: int
    frame_id: int


class IncompleteError(CaptureError):
    """A buffer came back without a whole image."""


class Library:
    """The functions of libaravis with their signatures; errors become :class:`CaptureError`."""

    def __init__(self) -> None:
        try:
            self._aravis = ctypes.CDLL(_LIBRARY)
            self._gobject = ctypes.CDLL("libgobject-2.0.so.0")
            self._glib = ctypes.CDLL("libglib-2.0.so.0")
        except OSError as error:
            raise CaptureError(f"{_LIBRARY} is not installed; install the Debian package libaravis-0.8-0") from error
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._aravis, name)
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        self._gobject.g_object_unref.argtypes = (_PATH,)
        self._glib.g_error_free.argtypes = (_PATH,)
        # The device list is one for the whole process, and is read by index.
        self._list_lock = threading.Lock()

    def call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 (C functions of many types)
        """Call a function that reports no error."""
        return self._functions[name](*arguments)

    def attempt(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 (as above)
        """Call a function whose last argument is a GError.

        Raises:
            CaptureError: what Aravis says went wrong.
        """
        error = ctypes.POINTER(_GError)()
        result = self._functions[name](*arguments, ctypes.byref(error))
        if error:
            message = (error.contents.message or b"unknown error").decode("utf-8", "replace")
            self._glib.g_error_free(error)
            raise CaptureError(message)
        return result

    def unref(self, thing: int) -> None:
        """Let go of an object."""
        self._gobject.g_object_unref(thing)

    def devices(self, *, fake: bool = False) -> tuple[Device, ...]:
        """Ask on all networks and USB ports which cameras there are; takes about a second with GigE Vision.

        Args:
            fake: list Aravis' own simulated camera too.
        """
        with self._list_lock:
            if fake:
                self.call("arv_enable_interface", b"Fake")
            self.call("arv_update_device_list")
            names = ("id", "serial_nbr", "vendor", "model", "address")
            found = [
                [(self.call(f"arv_get_device_{name}", index) or b"").decode("utf-8", "replace") for name in names]
                for index in range(self.call("arv_get_n_devices"))
            ]
        return tuple(Device(*texts) for texts in found)


@functools.cache
def library() -> Library:
    """Return libaravis, loaded once.

    Raises:
        CaptureError: it is not installed.
    """
    return Library()


class Camera:
    """One open camera and, once started, its stream.

    Opened, read and closed by one thread; :meth:`trigger` may be called from any.

    Args:
        device: id as in :attr:`Device.id`, or IP address.

    Raises:
        CaptureError: it does not answer, or another program controls it.
    """

    def __init__(self, device: str) -> None:
        self._library = library()
        self._stream: int | None = None
        self._popped: int | None = None
        self._camera: int | None = self._library.attempt("arv_camera_new", device.encode())
        if not self._camera:
            raise CaptureError("does not answer")
        # A camera must not be let go of while another thread triggers it.
        self._lock = threading.Lock()

    @property
    def controlled(self) -> bool:
        """Whether this program still controls it. A USB3 Vision camera cannot be taken over."""
        if not self._library.call("arv_camera_is_gv_device", self._camera):
            return True
        device = self._library.call("arv_camera_get_device", self._camera)
        return bool(self._library.call("arv_gv_device_is_controller", device))

    @property
    def is_gige(self) -> bool:
        """Whether it is a GigE Vision camera."""
        return bool(self._library.call("arv_camera_is_gv_device", self._camera))

    def has(self, feature: str) -> bool:
        """Whether a feature is there and can be used now."""
        return bool(self.ask("is_feature_available", feature.encode()))

    def ask(self, function: str, *arguments: Any) -> Any:  # noqa: ANN401 (C functions of many types)
        """Call ``arv_camera_<function>``.

        Raises:
            CaptureError: what Aravis says went wrong.
        """
        return self._library.attempt(f"arv_camera_{function}", self._camera, *arguments)

    def set_text(self, feature: str, value: str) -> None:
        """Set an enumeration.

        Raises:
            CaptureError: the camera has no such feature or value.
        """
        self.ask("set_string", feature.encode(), value.encode())

    def text(self, feature: str) -> str:
        """Read an enumeration or text.

        Raises:
            CaptureError: the camera has no such feature.
        """
        return (self.ask("get_string", feature.encode()) or b"").decode("utf-8", "replace")

    def start(self, buffers: int) -> None:
        """Make the stream with its buffers, and begin to acquire.

        Raises:
            CaptureError: the camera refuses, or there is no memory.
        """
        payload = self.ask("get_payload")
        self._stream = self.ask("create_stream", None, None)
        for _ in range(buffers):
            # The stream owns them from here on, wherever they are.
            self._library.call(
                "arv_stream_push_buffer", self._stream, self._library.call("arv_buffer_new_allocate", payload)
            )
        self.ask("start_acquisition")

    def pop(self, timeout_s: float) -> Image | None:
        """Wait for the next image; the one before goes back to the stream.

        Returns:
            The image; None when the time is up.

        Raises:
            IncompleteError: packets of it are missing.
        """
        call = self._library.call
        self._push_back()
        buffer = call("arv_stream_timeout_pop_buffer", self._stream, round(timeout_s * 1e6))
        if not buffer:
            return None
        self._popped = buffer
        status = call("arv_buffer_get_status", buffer)
        if status != _SUCCESS:
            raise IncompleteError(f"an incomplete image came: {_STATUS.get(status, f'status {status}')}")
        size = ctypes.c_size_t()
        address = call("arv_buffer_get_data", buffer, ctypes.byref(size))
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(address))
        return Image(
            data=data,
            width=call("arv_buffer_get_image_width", buffer),
            height=call("arv_buffer_get_image_height", buffer),
            pixel_format=call("arv_buffer_get_image_pixel_format", buffer),
            frame_id=call("arv_buffer_get_frame_id", buffer),
        )

    def trigger(self) -> None:
        """Execute TriggerSoftware (GenICam SFNC).

        Raises:
            CaptureError: the camera is closed, does not answer or refuses.
        """
        with self._lock:
            if self._camera is None:
                raise CaptureError("is not connected")
            self.ask("software_trigger")

    def close(self, *, away: bool = False) -> None:
        """Stop and let go; may be called twice.

        Args:
            away: it does not answer; it is not told to stop, which would take 5 s of retries.
        """
        with self._lock:
            camera, stream = self._camera, self._stream
            if camera is None:
                return
            if stream is not None:
                self._push_back()
                if not away:
                    # It may be away all the same; then there is nothing left to stop.
                    with contextlib.suppress(CaptureError):
                        self.ask("stop_acquisition")
                self._library.unref(stream)
            self._camera = self._stream = None
            self._library.unref(camera)

    def _push_back(self) -> None:
        if self._popped is not None:
            self._library.call("arv_stream_push_buffer", self._stream, self._popped)
            self._popped = None
