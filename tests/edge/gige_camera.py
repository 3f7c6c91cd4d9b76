"""A GigE Vision camera of the tests: Aravis' simulated one in a process of its own, on the loopback interface.

GVCP has one port, 3956 (GigE Vision 2.0, 8.2), so there is one such camera per machine at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

ADDRESS = "127.0.0.1"
SERIAL = "GV77"
_CAMERA = """
import ctypes, sys
aravis, gobject = ctypes.CDLL("libaravis-0.8.so.0"), ctypes.CDLL("libgobject-2.0.so.0")
aravis.arv_gv_fake_camera_new.restype = ctypes.c_void_p
camera = ctypes.c_void_p(aravis.arv_gv_fake_camera_new(b"127.0.0.1", sys.argv[1].encode()))
gobject.g_object_set(camera, b"gvsp-lost-ratio", ctypes.c_double(float(sys.argv[2])), None)
print(aravis.arv_gv_fake_camera_is_running(camera), flush=True)
sys.stdin.read()
"""


def missing() -> str:
    """Why there can be no GenICam camera; empty where there can."""
    try:
        ctypes.CDLL("libaravis-0.8.so.0")
    except OSError:
        return "libaravis is not installed (Debian package libaravis-0.8-0)"
    return ""


class GigeCamera:
    """Plugged in while the context lasts; others that want one wait.

    Args:
        lost: share of the packets that never arrive.
    """

    def __init__(self, lost: float = 0.0) -> None:
        self._lost = lost
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._turn = (Path(tempfile.gettempdir()) / "lineward-test-gige.lock").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        self.plug_in()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unplug()
        self._turn.close()

    def plug_in(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CAMERA, SERIAL, f"{self._lost}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout.readline().strip() == b"1", "the simulated camera could not take UDP port 3956"

    def unplug(self) -> None:
        """Like a cable that is pulled: no good-bye."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
