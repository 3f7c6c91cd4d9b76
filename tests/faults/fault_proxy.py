"""A TCP proxy with faults: a slow line, cuts in the middle of what is sent, resets, silence; it counts every byte."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine

# A request that carries data; handshakes and headers are below it.
_BURST_BYTES = 1024
_POINT_BYTES = 16 * 1024
_READ_BYTES = 2048
_LOOK_S = 0.01


@dataclass
class Faults:
    """What the line does to its connections; may be changed while they last.

    Attributes:
        bytes_per_s: in each direction; None for a fast line.
        cut: probability that a burst of more than 1 KiB from the client ends the connection: at a random byte, or at
            the answer, which is lost then.
        swallow: nothing is forwarded any more in either direction, and nobody is told: a half-open connection.
        refuse: new connections are reset.
        hold: nothing is forwarded in either direction until it is False again, then all of it, as TCP does after a
            line has come back; but nothing of a connection that was begun and given up meanwhile.
    """

    bytes_per_s: float | None = None
    cut: float = 0.0
    swallow: bool = False
    refuse: bool = False
    hold: bool = False


@dataclass(eq=False)  # each is only itself
class _Line:
    """One connection: the bytes of the client's current burst, and where it will be cut."""

    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    severed: bool = False
    begun_held: bool = False
    burst: int = 0
    doomed_at: int | None = None
    drawn: bool = False


class FaultProxy:
    """Stands between clients and ``127.0.0.1:port``; use as a context manager.

    Every byte that a client puts on the line counts, whether it arrives or not.
    """

    def __init__(self, port: int, faults: Faults | None = None, *, seed: int = 0) -> None:
        self.faults = faults or Faults()
        self.sent = 0
        self.received = 0
        self.connections = 0
        self.cuts = 0
        self.port = 0
        self._target = port
        self._random = random.Random(seed)
        self._lines: set[_Line] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:  # noqa: PYI034 (Self needs Python 3.11)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def reset(self) -> None:
        """Cut every connection now."""
        self._call(self._reset())

    def sever(self) -> None:
        """End every connection towards the far side only: clients hear nothing of it, then or later."""
        self._call(self._sever())

    def retarget(self, port: int) -> None:
        """Lead new connections elsewhere."""
        self._target = port

    def _call(self, work: Coroutine[object, object, object]) -> object:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _reset(self) -> None:
        for line in list(self._lines):
            self._end(line)

    async def _sever(self) -> None:
        for line in self._lines:
            line.severed = True
            for writer in line.writers[1:]:
                _abort(writer)

    async def _close(self) -> None:
        self._server.close()
        await self._reset()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Line([writer], begun_held=self.faults.hold)
        self._lines.add(line)
        self.connections += 1
        try:
            if self.faults.refuse:
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            line.writers.append(far_writer)
            up = asyncio.create_task(self._pump(line, reader, far_writer, upward=True))
            down = asyncio.create_task(self._pump(line, far_reader, writer, upward=False))
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if line.severed:
                await up  # ends when the client hangs up
            up.cancel()
            down.cancel()
        except OSError:
            pass
        finally:
            self._end(line)

    async def _pump(
        self, line: _Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upward: bool
    ) -> None:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        forward = asyncio.create_task(self._forward(line, queue, writer, upward=upward))
        try:
            # Read as fast as it is sent: what a client has sent counts, however slow the line behind is.
            while data := await reader.read(_READ_BYTES):
                if upward:
                    self.sent += len(data)
                else:
                    self.received += len(data)
                queue.put_nowait(data)
            if line.begun_held and self.faults.hold:
                # A client that gave up before the line was back: over a real one it would never have come through.
                self._end(line)
                return
            queue.put_nowait(b"")
            await forward
        except OSError:
            pass
        finally:
            forward.cancel()

    async def _forward(
        self, line: _Line, queue: asyncio.Queue[bytes], writer: asyncio.StreamWriter, *, upward: bool
    ) -> None:
        while data := await queue.get():
            rate = self.faults.bytes_per_s
            if rate is not None:
                await asyncio.sleep(len(data) / rate)
            if self._is_cut(line, len(data), upward=upward):
                self.cuts += 1
                self._end(line)
                return
            while self.faults.hold and not line.severed:  # noqa: ASYNC110 (set from another thread, without a word)
                await asyncio.sleep(_LOOK_S)
            if self.faults.swallow or line.severed:
                continue
            writer.write(data)
            await writer.drain()

    def _is_cut(self, line: _Line, size: int, *, upward: bool) -> bool:
        if not upward:
            doomed = line.doomed_at is not None
            line.burst, line.doomed_at, line.drawn = 0, None, False
            return doomed
        line.burst += size
        if line.burst > _BURST_BYTES and not line.drawn:
            line.drawn = True
            if self._random.random() < self.faults.cut:
                line.doomed_at = self._random.randrange(_BURST_BYTES, _POINT_BYTES)
        return line.doomed_at is not None and line.burst >= line.doomed_at

    def _end(self, line: _Line) -> None:
        self._lines.discard(line)
        for writer in line.writers:
            _abort(writer)


def _abort(writer: asyncio.StreamWriter) -> None:
    """A reset instead of a farewell, as a line gives none."""
    handle = writer.get_extra_info("socket")
    if handle is not None:
        with contextlib.suppress(OSError):
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
