"""The Modbus TCP server, asked by a real client over TCP, and by a peer that speaks no Modbus."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest
from pymodbus.client import ModbusTcpClient
from pymodbus.exceptions import ModbusException

from edge.inspection.modbus import ModbusServer
from edge.inspection.registers import TRIGGER_BASE, BoxState, Registers
from edge.inspection.settings import ModbusSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOON = 20.0
UNIT = 7
READ_BOX = bytes.fromhex("0000 0006 07 04 0000 000A")


class Server:
    """A server with two stations, the first one triggered by a PLC."""

    def __init__(self, **settings: Any) -> None:
        self.heard: list[tuple[int, int]] = []
        self.health = (BoxState.RUNNING, 0)
        self.registers = Registers()
        self.registers.lay_out([("one", lambda *what: self.heard.append(what) or ""), ("two", None)])  # type: ignore[func-returns-value]
        self.modbus = ModbusServer(
            ModbusSettings(**({"port": 0, "unit": UNIT} | settings)),
            registers=self.registers,
            health=lambda: self.health,
        )

    def counter(self, name: str) -> int:
        return int(self.modbus.status()["counters"][name])


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    server = Server(**settings)
    server.modbus.start()
    try:
        yield server
    finally:
        assert server.modbus.stop(SOON)


@contextlib.contextmanager
def client(server: Server) -> Iterator[ModbusTcpClient]:
    with ModbusTcpClient("127.0.0.1", port=server.modbus.port, timeout=SOON, retries=0) as found:
        yield found


@contextlib.contextmanager
def raw(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.modbus.port), timeout=SOON) as found:
        yield found


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # the server's own counters tell nobody


def test_plc_reads_both_kinds_of_registers_and_triggers_a_part() -> None:
    with serving() as server, client(server) as plc:
        answer = plc.write_registers(TRIGGER_BASE, [1, 2, 3], device_id=UNIT)
        assert not answer.isError()
        box = plc.read_input_registers(0, count=10, device_id=UNIT).registers
        assert plc.read_holding_registers(100, count=100, device_id=UNIT).registers[:2] == [3, 0]
        assert plc.readwrite_registers(
            read_address=100, read_count=1, write_address=TRIGGER_BASE, values=[0, 5, 4], device_id=UNIT
        ).registers == [4]
        plc.write_register(TRIGGER_BASE + 2, 5, device_id=UNIT)

    assert box[0] == 1
    assert box[5] == 2
    assert server.heard == [(65_538, 3), (5, 4), (5, 5)]


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda plc: plc.write_register(1, 5, device_id=UNIT), 2),
        (lambda plc: plc.write_registers(110, [5, 6], device_id=UNIT), 2),
        (lambda plc: plc.write_registers(TRIGGER_BASE + 10, [0, 1, 1], device_id=UNIT), 2),
        (lambda plc: plc.write_registers(TRIGGER_BASE + 1, [0, 1, 1], device_id=UNIT), 2),
        (lambda plc: plc.read_input_registers(10, count=1, device_id=UNIT), 2),
        (lambda plc: plc.read_input_registers(199, count=2, device_id=UNIT), 2),
        (lambda plc: plc.read_coils(0, count=1, device_id=UNIT), 1),
        (lambda plc: plc.write_coil(0, True, device_id=UNIT), 1),
        (lambda plc: plc.mask_write_register(address=TRIGGER_BASE, and_mask=1, or_mask=1, device_id=UNIT), 1),
    ],
)
def test_what_cannot_be_granted_has_its_exception_code(ask: Callable[[ModbusTcpClient], Any], code: int) -> None:
    with serving() as server, client(server) as plc:
        answer = ask(plc)

        assert answer.isError()
        assert answer.exception_code == code
        assert plc.read_input_registers(0, count=1, device_id=UNIT).registers == [1]
    assert server.heard == []


def test_box_that_stops_is_busy() -> None:
    with serving() as server, client(server) as plc:
        server.health = (BoxState.STOPPING, 0)
        wait_for(lambda: server.registers.read(2, 1) == [BoxState.STOPPING])

        assert plc.write_registers(TRIGGER_BASE, [0, 1, 1], device_id=UNIT).exception_code == 6


@pytest.mark.parametrize(
    "pdu",
    [
        "04 0000 0000", "04 0000 007E", "04 0000", "04", "10 2710 0001 02", "10 2710 0003 06 0000 0001",
        "10 2710 0003 04 0000 0001 0001", "10 2710 0000 00", "06 2712", "17 0000 0001 2710 0003 06 0000",
        "17 0000 0000 2710 0001 02 0001",
    ],
)  # fmt: skip
def test_request_that_is_cut_or_asks_too_much_is_an_illegal_value(pdu: str) -> None:
    body = bytes.fromhex(pdu)
    with serving() as server, raw(server) as peer:
        peer.sendall(struct.pack(">HHHB", 9, 0, len(body) + 1, UNIT) + body)

        assert peer.recv(300) == struct.pack(">HHHBBB", 9, 0, 3, UNIT, body[0] | 0x80, 3)
    assert server.heard == []


def test_other_unit_is_not_answered() -> None:
    with serving() as server, raw(server) as peer:
        peer.sendall(b"\0\1" + READ_BOX.replace(b"\x07", b"\x08") + b"\0\2" + READ_BOX)

        assert peer.recv(300)[:2] == b"\0\2"
    assert server.counter("other_units") == 1


def test_requests_in_one_packet_and_in_pieces_are_all_answered() -> None:
    with serving() as server, raw(server) as peer:
        stream = b"".join(struct.pack(">H", number) + READ_BOX for number in range(40))
        rng = random.Random(5)
        while stream:
            size = rng.choice([1, 2, 3, 5, 7, 11, 13, 200])
            peer.sendall(stream[:size])
            stream = stream[size:]
        answers = b""
        while len(answers) < 40 * 29:
            answers += peer.recv(4096)

    assert [struct.unpack_from(">H", answers, 29 * number)[0] for number in range(40)] == list(range(40))


def test_heartbeat_counts_on_and_stands_still() -> None:
    with serving() as server, client(server) as plc:

        def heartbeat() -> int:
            return int(plc.read_input_registers(1, count=1, device_id=UNIT).registers[0])

        before = heartbeat()
        wait_for(lambda: heartbeat() != before)
        server.health = (BoxState.UNHEALTHY, 1)
        wait_for(lambda: plc.read_input_registers(2, count=2, device_id=UNIT).registers == [2, 1])
        stopped = heartbeat()
        server.health = (BoxState.UNHEALTHY, 3)
        wait_for(lambda: plc.read_input_registers(3, count=1, device_id=UNIT).registers == [3])
        assert heartbeat() == stopped


def test_garbage_is_disconnected_and_harms_nobody() -> None:
    rng = random.Random(11)
    with serving(max_clients=2) as server, client(server) as plc:
        plc.connect()
        for _ in range(60):
            blob = rng.randbytes(rng.choice([1, 6, 7, 8, 9, 40, 300, 5_000]))
            with raw(server) as peer, contextlib.suppress(OSError):
                peer.sendall(blob)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
            assert plc.read_input_registers(0, count=1, device_id=UNIT).registers == [1]
        # Right headers around random requests: each has an answer, and none triggers by chance of its length.
        with raw(server) as peer:
            for number in range(300):
                body = bytes([rng.choice([3, 4, 6, 16, 23, rng.randrange(256)])]) + rng.randbytes(rng.randrange(30))
                peer.sendall(struct.pack(">HHHB", number, 0, len(body) + 1, UNIT) + body)
                head = peer.recv(7, socket.MSG_WAITALL)
                transaction, protocol, length, unit = struct.unpack(">HHHB", head)
                assert (transaction, protocol, unit) == (number, 0, UNIT)
                assert len(peer.recv(length - 1, socket.MSG_WAITALL)) == length - 1
        assert plc.read_input_registers(0, count=1, device_id=UNIT).registers == [1]
        assert server.counter("bad_frames") > 10
        assert server.modbus.warnings() == []


def test_clients_are_limited_and_one_that_is_in_use_stays(caplog: pytest.LogCaptureFixture) -> None:
    with serving(max_clients=2) as server, raw(server) as first, raw(server) as second:
        wait_for(lambda: server.counter("connections") == 2)
        with raw(server) as third:
            assert third.recv(1) == b""
        for peer in (first, second):
            peer.sendall(b"\0\1" + READ_BOX)
            assert peer.recv(300)
    assert server.counter("refused_connections") == 1
    assert "more than 2 clients" in caplog.text


def test_silent_client_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.inspection.modbus.IN_USE_S", 0.0)
    with serving(max_clients=1) as server, raw(server) as silent:
        wait_for(lambda: server.counter("connections") == 1)
        with raw(server) as other:
            other.sendall(b"\0\1" + READ_BOX)
            assert other.recv(300)
            assert silent.recv(1) == b""


def test_client_that_says_nothing_is_closed() -> None:
    with serving(idle_s=1) as server, raw(server) as silent:
        assert silent.recv(1) == b""
        assert server.modbus.status()["clients"] == 0


def test_address_that_is_taken_is_named_and_served_once_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.inspection.modbus.LONGEST_AGAIN_S", 0.02)
    monkeypatch.setattr("edge.inspection.modbus.AGAIN_S", 0.01)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        second = Server(port=other.getsockname()[1])
        second.modbus.start()
        (warning,) = second.modbus.warnings()
        assert f"127.0.0.1:{other.getsockname()[1]} cannot be listened on" in warning
        assert "choose another port" in warning
        assert second.modbus.status()["port"] == 0
    try:
        wait_for(lambda: second.modbus.port != 0)
        assert second.modbus.warnings() == []
        with client(second) as plc:
            assert plc.read_input_registers(0, count=1, device_id=UNIT).registers == [1]
    finally:
        assert second.modbus.stop(SOON)
    # However often it was tried.
    assert (
        len([one for one in caplog.records if one.name == "edge.inspection.modbus" and one.levelname == "ERROR"]) == 1
    )


def test_server_that_waits_for_its_address_stops() -> None:
    with serving() as server:
        second = Server(port=server.modbus.port)
        second.modbus.start()
        assert second.modbus.stop(SOON)


def test_server_that_never_started_stops() -> None:
    server = Server()
    assert server.modbus.stop(0.1)
    assert server.modbus.stop(0.1)


def test_stop_disconnects_clients_and_complains_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server, client(server) as plc:
        plc.connect()
        plc.read_input_registers(0, count=1, device_id=UNIT)
        assert server.modbus.stop(SOON)
        with pytest.raises((ModbusException, OSError)):
            plc.read_input_registers(0, count=1, device_id=UNIT)
    assert [record for record in caplog.records if record.name == "asyncio"] == []
