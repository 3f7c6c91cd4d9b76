"""ModbusServer: serves the registers to PLCs over Modbus TCP, in a thread with an event loop of its own.

Knows frames, connections and exception codes; what the registers mean is in registers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pymodbus.constants import ExcCodes
from pymodbus.pdu import ExceptionResponse
from pymodbus.pdu.register_message import (
    ReadHoldingRegistersRequest,
    ReadInputRegistersRequest,
    ReadWriteMultipleRegistersRequest,
    WriteMultipleRegistersRequest,
    WriteSingleRegisterRequest,
)

from edge.inspection.registers import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pymodbus.pdu import ModbusPDU

    from edge.inspection.registers import BoxState, Registers
    from edge.inspection.settings import ModbusSettings

_LOG = logging.getLogger(__name__)
BEAT_S = 0.1
# The rest of a frame whose header came, and the taking of an answer.
FRAME_S = 5.0
START_S = 5.0
# Between two attempts to listen, then doubled up to the longest: who holds the port may be the box that ran before.
AGAIN_S = 0.5
LONGEST_AGAIN_S = 8.0
# A connection that is silent for less is in use, and does not make room for another.
IN_USE_S = 2.0
# Clients see their connections closed before the loop ends.
HANG_UP_S = 0.2
_HEADER = struct.Struct(">HHHB")
# Modbus Messaging on TCP/IP Implementation Guide V1.0b, 3.1.3: protocol 0; the length counts unit and PDU, of which
# the latter is 1 to 253 bytes.
_PROTOCOL = 0
_MIN_LENGTH, _MAX_LENGTH = 2, 254
_REQUESTS: dict[int, type[ModbusPDU]] = {
    request.function_code: request
    for request in (
        ReadHoldingRegistersRequest,
        ReadInputRegistersRequest,
        WriteSingleRegisterRequest,
        WriteMultipleRegistersRequest,
        ReadWriteMultipleRegistersRequest,
    )
}
_CODES = {Refused.ADDRESS: ExcCodes.ILLEGAL_ADDRESS, Refused.BUSY: ExcCodes.DEVICE_BUSY}


class _Data:
    """The registers as pymodbus's requests ask for them. Input and holding registers are one table."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers

    async def async_getValues(  # noqa: N802 (pymodbus's name)
        self, _unit: int, _function: int, address: int, count: int = 1
    ) -> list[int] | ExcCodes:
        found = self._registers.read(address, count)
        return _CODES[found] if isinstance(found, Refused) else found

    async def async_setValues(  # noqa: N802 (pymodbus's name)
        self, _unit: int, _function: int, address: int, values: Sequence[int]
    ) -> ExcCodes | None:
        refused = self._registers.write(address, values)
        return None if refused is None else _CODES[refused]


@dataclass(slots=True, eq=False)
class _Client:
    writer: asyncio.StreamWriter
    heard_s: float


class ModbusServer:
    """A Modbus TCP server (Modbus Application Protocol V1.1b3: function codes 3, 4, 6, 16 and 23).

    pymodbus decodes requests and encodes answers. Its own server is not used: it drops a request that arrives together
    with the one before it, and keeps reading from a peer whose bytes are no Modbus; here a connection is a stream of
    frames, each answered before the next is read, and one with a wrong header is closed.

    Args:
        settings: address, unit and limits.
        registers: that are served.
        health: the box's state and troubles; asked ten times a second for the heartbeat.
    """

    def __init__(
        self, settings: ModbusSettings, *, registers: Registers, health: Callable[[], tuple[BoxState, int]]
    ) -> None:
        self._settings = settings
        self._registers = registers
        self._health = health
        # pymodbus's type is its own context; all that its requests call is in ours.
        self._data = cast("Any", _Data(registers))
        self._clients: set[_Client] = set()
        self._talks: set[asyncio.Task[None]] = set()
        self._counts = dict.fromkeys(
            ("requests", "refused_requests", "other_units", "bad_frames", "connections", "refused_connections"), 0
        )
        self._failure = self._waits_for_port = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inspection-modbus", daemon=True)
        self.port = 0

    def start(self) -> None:
        """Listen; where the address is taken, try again until it is free: a PLC must not keep a box from judging."""
        self._thread.start()
        self._ready.wait(START_S)

    def stop(self, timeout: float) -> bool:
        """Close all connections and end; whether that was done in time. May be called without a start, and twice."""
        if self._thread.ident is None:
            return True
        loop, ending = self._loop, self._ending
        if loop is not None and ending is not None and self._thread.is_alive():
            try:
                loop.call_soon_threadsafe(ending.set)
            except RuntimeError:  # the loop has closed since
                return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def status(self) -> dict[str, Any]:
        """Address, clients and counters."""
        return {"port": self.port, "clients": len(self._clients), "counters": dict(self._counts)}

    def warnings(self) -> list[str]:
        """What an operator should know; nothing while a PLC can connect."""
        if self._failure:
            return [f"modbus: the server has ended: {self._failure}"]
        return [self._waits_for_port] if self._waits_for_port else []

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001 (the thread's rim; without it nobody would see the end)
            _LOG.exception("modbus: the server failed")
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        server = await self._listen(self._ending)
        if server is None:
            return
        beating = asyncio.create_task(self._beat())
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        try:
            await asyncio.wait({beating, asyncio.create_task(self._ending.wait())}, return_when="FIRST_COMPLETED")
            if beating.done():
                # A heartbeat that has failed for good ends the service: a PLC then sees both go.
                beating.result()
        finally:
            beating.cancel()
            # The last state, for whoever reads once more; a heartbeat that stands still says the same.
            self._registers.beat(*self._health())
            server.close()
            for client in tuple(self._clients):
                client.writer.close()
            if self._talks:
                await asyncio.wait(self._talks, timeout=HANG_UP_S)

    async def _listen(self, ending: asyncio.Event) -> asyncio.Server | None:
        """The listening server; None where the box stops before its address is free."""
        host, port, pause = self._settings.host, self._settings.port, AGAIN_S
        while not ending.is_set():
            try:
                server = await asyncio.start_server(self._talk, host, port, limit=1024, backlog=16)
            except OSError as error:
                trouble = (
                    f"modbus: {host}:{port} cannot be listened on ({error.strerror or error}); no PLC can read the "
                    "box until it can; choose another port, or an address of this machine"
                )
                if trouble != self._waits_for_port:
                    _LOG.error("%s", trouble)
                self._waits_for_port = trouble
                self._ready.set()
            else:
                self._waits_for_port = ""
                _LOG.info("modbus: listening on %s:%d", host, server.sockets[0].getsockname()[1])
                return server
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ending.wait(), pause)
            pause = min(2 * pause, LONGEST_AGAIN_S)
        return None

    async def _beat(self) -> None:
        while True:
            self._registers.beat(*self._health())
            await asyncio.sleep(BEAT_S)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        task.add_done_callback(self._talks.discard)
        client = _Client(writer, time.monotonic())
        if not self._has_room():
            self._counts["refused_connections"] += 1
            if self._counts["refused_connections"] == 1:
                _LOG.warning("modbus: more than %d clients; further ones are refused", self._settings.max_clients)
            writer.close()
            return
        self._counts["connections"] += 1
        self._clients.add(client)
        try:
            while await self._exchange(client, reader):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            # It hung up, or says nothing any more.
            pass
        finally:
            self._clients.discard(client)
            writer.close()

    def _has_room(self) -> bool:
        """Whether one more client may stay; the one that is silent for longest makes room where it is not in use."""
        if len(self._clients) < self._settings.max_clients:
            return True
        idle = min(self._clients, key=lambda client: client.heard_s)
        if time.monotonic() - idle.heard_s < IN_USE_S:
            return False
        self._clients.discard(idle)
        idle.writer.close()
        return True

    async def _exchange(self, client: _Client, reader: asyncio.StreamReader) -> bool:
        """Answer one request; False where the peer does not speak Modbus."""
        head = await asyncio.wait_for(reader.readexactly(_HEADER.size), self._settings.idle_s)
        transaction, protocol, length, unit = _HEADER.unpack(head)
        if protocol != _PROTOCOL or not _MIN_LENGTH <= length <= _MAX_LENGTH:
            self._counts["bad_frames"] += 1
            if self._counts["bad_frames"] == 1:
                _LOG.warning("modbus: a client sends what is no Modbus; it is disconnected")
            return False
        body = await asyncio.wait_for(reader.readexactly(length - 1), FRAME_S)
        client.heard_s = time.monotonic()
        if unit != self._settings.unit:
            # As on a serial line, where another device would answer.
            self._counts["other_units"] += 1
            return True
        answer = await self._answer(body)
        self._counts["requests"] += 1
        payload = bytes([answer.function_code]) + answer.encode()
        client.writer.write(_HEADER.pack(transaction, _PROTOCOL, len(payload) + 1, unit) + payload)
        await asyncio.wait_for(client.writer.drain(), FRAME_S)
        return True

    async def _answer(self, body: bytes) -> ModbusPDU:
        code = body[0]
        if code not in _REQUESTS:
            self._counts["refused_requests"] += 1
            return ExceptionResponse(code & 0x7F, ExcCodes.ILLEGAL_FUNCTION)
        request = _REQUESTS[code]()
        try:
            request.decode(body[1:])
        except (ValueError, IndexError, struct.error):
            self._counts["refused_requests"] += 1
            return ExceptionResponse(code, ExcCodes.ILLEGAL_VALUE)
        answer = await request.datastore_update(self._data, self._settings.unit)
        self._counts["refused_requests"] += answer.isError()
        return answer
