"""An RTSP camera of the tests: ffmpeg encodes, this hands its packets to clients over TCP (RFC 2326, 10.12)."""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

LOGIN = "admin:hunter2"
_H264 = ["-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-g", "5", "-pix_fmt", "yuv420p"]
# RFC 2435 has no room for other Huffman tables.
_JPEG = ["-c:v", "mjpeg", "-huffman", "default", "-pix_fmt", "yuvj420p", "-force_duplicated_matrix", "1"]


def missing() -> str:
    """Why there can be none; empty where there can."""
    return "" if shutil.which("ffmpeg") else "ffmpeg is not installed (Debian package ffmpeg)"


class RtspCamera:
    """One stream at ``url``; asks for a login, and can be unplugged and plugged in again at the same port.

    Args:
        folder: for its description.
        size: of its pictures.
        jpeg: send Motion JPEG in place of H.264.
    """

    def __init__(self, folder: Path, size: str = "64x48", *, jpeg: bool = False) -> None:
        self.size = size
        self._codec = _JPEG if jpeg else _H264
        # The last line that ffmpeg writes of each.
        self._last_line = "m=video" if jpeg else "a=fmtp"
        self._sdp = folder / "stream.sdp"
        self._port = 0
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._players: list[socket.socket] = []
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.plug_in()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unplug()

    @property
    def url(self) -> str:
        return f"rtsp://{LOGIN}@127.0.0.1:{self._port}/live"

    def plug_in(self) -> None:
        self._stop.clear()
        self._sdp.unlink(missing_ok=True)
        self._packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._packets.bind(("127.0.0.1", 0))
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._encoder = subprocess.Popen(
            [
                "ffmpeg", "-loglevel", "error", "-re", "-f", "lavfi", "-i", f"testsrc=size={self.size}:rate=25",
                *self._codec, "-threads", "1", "-sdp_file", str(self._sdp),
                "-f", "rtp", f"rtp://127.0.0.1:{self._packets.getsockname()[1]}",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        for target in (self._forward, self._accept):
            thread = threading.Thread(target=target, daemon=True)
            self._threads.append(thread)
            thread.start()

    def unplug(self) -> None:
        self._stop.set()
        self._encoder.kill()
        self._encoder.wait()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        self._packets.close()
        self._threads, self._players, self._connections = [], [], []

    def _forward(self) -> None:
        self._packets.settimeout(0.1)
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                packet = self._packets.recv(65536)
                with self._lock:
                    for player in list(self._players):
                        # One that has left is none of ours.
                        with contextlib.suppress(OSError):
                            player.sendall(b"$\x00" + len(packet).to_bytes(2, "big") + packet)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._stop.is_set():
                connection, _ = self._listener.accept()
                with self._lock:
                    self._connections.append(connection)
                thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            while (request := _request(lines)) is not None:
                verb, headers = request
                with self._lock:
                    connection.sendall(self._answer(verb, headers))
                    if verb == "PLAY":
                        self._players.append(connection)
                    if verb == "TEARDOWN":
                        return

    def _answer(self, verb: str, headers: dict[str, str]) -> bytes:
        status, more, body = "200 OK", {}, b""
        login = "Basic " + base64.b64encode(LOGIN.encode()).decode()
        if verb == "OPTIONS":
            more["Public"] = "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"
        elif headers.get("authorization") != login:
            status, more["WWW-Authenticate"] = "401 Unauthorized", 'Basic realm="camera"'
        elif verb == "DESCRIBE":
            body = self._description()
            more |= {"Content-Type": "application/sdp", "Content-Length": str(len(body)), "Content-Base": self._base}
        elif verb == "SETUP":
            more |= {"Transport": "RTP/AVP/TCP;unicast;interleaved=0-1", "Session": "1"}
        else:
            more["Session"] = "1"
        head = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        return f"RTSP/1.0 {status}\r\nCSeq: {headers['cseq']}\r\n{head}\r\n".encode() + body

    @property
    def _base(self) -> str:
        return f"rtsp://127.0.0.1:{self._port}/live/"

    def _description(self) -> bytes:
        lines: list[str] = []
        waited = threading.Event()
        while not any(line.startswith(self._last_line) for line in lines):
            # ffmpeg writes it with its first packet, and tells nobody.
            waited.wait(0.02)
            with contextlib.suppress(OSError):
                lines = self._sdp.read_text().splitlines()
            if self._stop.is_set():
                raise OSError("unplugged")
        media = next(index for index, line in enumerate(lines) if line.startswith("m=video"))
        lines[media] = "m=video 0 " + lines[media].split(" ", 2)[2]
        wanted = [line for line in lines if line[:2] in {"v=", "o=", "s=", "c=", "t=", "m=", "a="}]
        return "\r\n".join([*wanted, "a=control:track0", ""]).encode()


def _request(lines: object) -> tuple[str, dict[str, str]] | None:
    """The next request; packets that a client sends in between are skipped."""
    first = lines.read(1)
    while first == b"$":
        header = lines.read(3)
        lines.read(int.from_bytes(header[1:], "big"))
        first = lines.read(1)
    text = (first + lines.readline()).decode("ascii", "replace").strip()
    if not text:
        return None
    headers = {}
    while line := lines.readline().decode("ascii", "replace").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return text.split()[0], headers
