"""Signals as they come in: files, TCP, ZeroMQ, a serial port; with losses, other rates and other channels."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import tty
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import ValidationError

from edge.alerts.mqtt import Incoming, Lost
from edge.capture.building import build_source
from edge.capture.capture import CameraState, Capture
from edge.capture.settings import SourceSettings
from edge.capture.signal_file import FileTransport
from edge.capture.signal_links import MqttTransport, ZmqTransport
from edge.capture.signal_rate import RateCheck
from edge.capture.signal_source import SignalSource
from edge.capture.signal_wire import Chunk, pack, to_json, to_text
from edge.capture.sources import ALIVE, IDLE, Grab
from edge.errors import CaptureError
from tests.edge.tiny_senses import bearing, signal_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edge.frames import Frame
    from edge.inputs import SignalLayout
    from tests.mosquitto_process import Mosquitto

NS = 1_000_000_000


class Scripted:
    """A transport that gives what it was made with, then nothing, then its end."""

    paced = True
    broken = 0

    def __init__(self, steps: Sequence[list[Chunk] | CaptureError | None]) -> None:
        self.steps = list(steps)
        self.opened = 0

    def open(self) -> None:
        self.opened += 1

    def read(self) -> list[Chunk] | None:
        step = self.steps.pop(0) if self.steps else []
        if isinstance(step, CaptureError):
            raise step
        return step

    def close(self) -> None:
        pass


def chunks_of(samples: np.ndarray, size: int, *, rate_hz: float | None = 400.0) -> list[list[Chunk]]:
    return [[Chunk(at, samples[at : at + size], rate_hz)] for at in range(0, len(samples), size)]


def test_windows_are_frames_of_channels_by_samples_at_the_time_of_their_last_sample() -> None:
    samples = bearing(1)
    clock = iter(range(100, 10_000, 100))
    source = SignalSource(Scripted(chunks_of(samples, 50)), signal_layout(), clock=lambda: next(clock))
    source.open()
    found = [source.read() for _ in range(8)]
    assert found[:3] == [ALIVE, ALIVE, ALIVE]
    first = found[3]
    assert isinstance(first, Grab)
    np.testing.assert_array_equal(first.image, samples[:200].T)
    assert (first.captured_ns, first.name, first.refusal) == (400, "samples 0-199", "")
    assert source.read() is IDLE


def test_channels_are_picked_by_name_and_scaled_into_the_unit() -> None:
    samples = np.arange(1200, dtype=np.float32).reshape(400, 3)
    source = SignalSource(
        Scripted([[Chunk(0, samples)]]), signal_layout(), channels=("fan end", "speed", "drive end"), scale=0.5
    )
    source.open()
    grab = source.read()
    assert isinstance(grab, Grab)
    np.testing.assert_array_equal(grab.image, samples[:200, [2, 0]].T * 0.5)


@pytest.mark.parametrize(
    ("names", "count", "words"),
    [
        ((), 3, "3 channels, the bundle judges 2"),
        (("drive end", "other"), 2, "lacks channel fan end"),
        (("a",), 2, "names 1"),
    ],
)
def test_other_channels_are_refused(names: tuple[str, ...], count: int, words: str) -> None:
    source = SignalSource(Scripted([[Chunk(0, np.zeros((9, count), np.float32))]]), signal_layout(), channels=names)
    source.open()
    with pytest.raises(CaptureError, match=words):
        source.read()


@pytest.mark.parametrize(("rate_hz", "refused"), [(400.0, False), (403.9, False), (404.1, True), (360.0, True)])
def test_window_of_a_stream_with_another_rate_is_refused_with_a_reason(rate_hz: float, refused: bool) -> None:  # noqa: FBT001
    source = SignalSource(Scripted(chunks_of(bearing(0.5), 200, rate_hz=rate_hz)), signal_layout())
    source.open()
    grab = source.read()
    assert isinstance(grab, Grab)
    assert bool(grab.refusal) is refused
    assert ("the bundle judges 400" in grab.refusal) is refused


def test_window_that_holds_samples_of_another_rate_is_refused_whoever_completes_it() -> None:
    samples = bearing(1)
    chunks = [Chunk(0, samples[:199], 360.0), Chunk(199, samples[199:], 400.0)]
    source = SignalSource(Scripted([chunks, None]), signal_layout())
    source.open()
    first, second, third = (source.read() for _ in range(3))
    assert isinstance(first, Grab)
    assert isinstance(second, Grab)
    assert isinstance(third, Grab)
    assert "360" in first.refusal
    assert "360" in second.refusal  # samples 100 to 299
    assert (third.name, third.refusal) == ("samples 200-399", "")


def test_sender_that_begins_anew_at_the_right_rate_is_judged_from_there() -> None:
    samples = bearing(1)
    chunks = [Chunk(5000, samples[:300], 360.0), Chunk(0, samples[:200], 400.0)]
    source = SignalSource(Scripted([chunks]), signal_layout())
    source.open()
    found = [source.read() for _ in range(4)]
    shown = [(grab.name, bool(grab.refusal)) for grab in found if isinstance(grab, Grab)]
    assert shown[-1] == ("samples 0-199", False)
    assert [refused for _, refused in shown[:-1]] == [True] * (len(shown) - 1)


@pytest.mark.parametrize(("paced", "wanted"), [(True, [8.5, 8.75, 9.0, 9.25, 9.5]), (False, [9.5] * 5)])
def test_windows_of_one_long_chunk_were_captured_one_after_the_other(paced: bool, wanted: list[float]) -> None:  # noqa: FBT001
    transport = Scripted([[Chunk(0, bearing(2)[:600], 400.0)]])
    transport.paced = paced
    source = SignalSource(transport, signal_layout(), clock=lambda: round(9.5 * NS))
    source.open()
    found = [source.read() for _ in range(5)]
    assert [grab.captured_ns / NS for grab in found if isinstance(grab, Grab)] == wanted


def test_time_never_runs_backwards_where_chunks_come_in_a_burst() -> None:
    samples = bearing(4)
    steps = [[Chunk(0, samples[:600], 400.0), Chunk(600, samples[600:1200], 400.0), Chunk(9000, samples[:400], 400.0)]]
    source = SignalSource(Scripted(steps), signal_layout(), clock=lambda: 9 * NS)
    source.open()
    found = [source.read() for _ in range(20)]
    times = [grab.captured_ns for grab in found if isinstance(grab, Grab) and grab.captured_ns is not None]
    assert times == sorted(times)
    assert times[-1] == 9 * NS


@pytest.mark.parametrize(("share", "told"), [(1.0, False), (1.005, False), (0.985, True), (1.02, True)])
def test_measured_rate_that_is_off_is_told(share: float, told: bool) -> None:  # noqa: FBT001
    check = RateCheck(400.0)
    for step in range(25 * 12):
        check.saw(round(step * 16 * share), step * NS // 25)
    assert bool(check.remark) is told


def test_rate_is_not_measured_before_there_is_enough_or_where_nobody_paces() -> None:
    check, replayed = RateCheck(400.0), RateCheck(400.0, paced=False)
    for step in range(25 * 9):
        check.saw(step * 99, step * NS // 25)
    for step in range(25 * 20):
        replayed.saw(step * 99, step * NS // 25)
    assert (check.remark, replayed.remark) == ("", "")


def test_samples_lost_between_two_connections_are_counted_by_their_numbers() -> None:
    samples = bearing(1)
    broken = CaptureError("gone")
    steps = [[Chunk(0, samples[:120])], broken, [Chunk(150, samples[150:300])]]
    source = SignalSource(Scripted(steps), signal_layout())
    source.open()
    assert source.read() is ALIVE
    with pytest.raises(CaptureError):
        source.read()
    source.close()
    source.open()
    grab = source.read()
    assert isinstance(grab, Grab)
    assert np.flatnonzero(np.isnan(grab.image[0])).tolist() == list(range(120, 150))
    assert source.counts["lost"] == 30


def test_gap_is_one_window_that_is_not_judged_for_all_that_it_spoilt() -> None:
    samples = bearing(3)
    layout = signal_layout().model_copy(update={"hop": 10})
    source = SignalSource(Scripted([[Chunk(0, samples[:200]), Chunk(900, samples[:200])], None]), layout)
    source.open()
    found = [grab for grab in iter(source.read, None) if isinstance(grab, Grab)]
    shown = [(grab.name, grab.refusal) for grab in found]
    assert shown[0] == ("samples 0-199", "")
    assert shown[1] == ("samples 10-209", "")  # 5 % lost, as may be
    assert shown[2] == ("samples 20-399", "19 windows lost too much to one gap; see the link to the sensor")
    assert shown[3] == ("samples 900-1099", "")
    counts = source.counts
    assert counts["received"] + counts["lost"] == 1100 == counts["windowed"] + counts["skipped"]


# -- the real transports -------------------------------------------------------------------------------------------


def write_record(folder: Path, samples: np.ndarray, *, rate_hz: float = 400.0, names: Sequence[str]) -> str:
    wfdb = pytest.importorskip("wfdb", reason="needs wfdb: pip install 'lineward[signals]'")
    wfdb.wrsamp(
        "record", fs=rate_hz, units=["g"] * samples.shape[1], sig_name=list(names), p_signal=samples.astype(np.float64),
        fmt=["16"] * samples.shape[1], write_dir=str(folder),
    )  # fmt: skip
    return str(folder / "record")


def frames_of(settings: SourceSettings, count: int, layout: SignalLayout) -> tuple[list[Frame], Capture]:
    capture = Capture(name="spindle", settings=settings, make_source=lambda: build_source(settings, layout))
    capture.start()
    found: list[Frame] = []
    while len(found) < count and not capture.finished:
        frame = capture.get(10)
        if frame is None:
            break
        found.append(frame)
    return found, capture


def test_wfdb_record_is_judged_whole(tmp_path: Path) -> None:
    samples = bearing(2.1)
    layout = signal_layout()
    path = write_record(tmp_path, samples, names=("drive end", "fan end"))
    settings = SourceSettings(kind="signal_file", path=path, signal={"speed": None})
    found, capture = frames_of(settings, 99, layout)
    capture.stop()
    assert [frame.name for frame in found][-1] == "samples 640-839"
    assert len(found) == 8
    np.testing.assert_allclose(found[0].image, samples[:200].T, atol=1e-3)
    counts = capture.source_counts
    assert (counts["received"], counts["windowed"], counts["unwindowed"]) == (840, 840, 0)


def test_wfdb_record_is_replayed_at_its_pace_times_the_speed(tmp_path: Path) -> None:
    path = write_record(tmp_path, bearing(2), names=("drive end", "fan end"))
    now = [0]

    def sleep(seconds: float) -> None:
        now[0] += round(seconds * NS)

    transport = FileTransport(path, speed=2.0, clock=lambda: now[0], sleep=sleep)
    transport.open()
    given = 0
    while (chunks := transport.read()) is not None:
        given += sum(len(chunk.samples) for chunk in chunks)
        assert given <= now[0] / NS * 800 + 1
    assert given == 800
    assert now[0] == pytest.approx(1.0 * NS, rel=0.05)


def test_npz_recording_is_judged_whole(tmp_path: Path) -> None:
    samples = bearing(2.1)
    path = str(tmp_path / "spindle.npz")
    np.savez(path, signal=samples.T, rate_hz=400.0, channels=["drive end", "fan end"], unit="g")
    settings = SourceSettings(kind="signal_file", path=path, signal={"speed": None})
    found, capture = frames_of(settings, 99, signal_layout())
    capture.stop()
    assert len(found) == 8
    np.testing.assert_array_equal(found[7].image, samples[640:840].T)


@pytest.mark.parametrize(("length", "wanted"), [(500, [0, 100, 200, 300]), (530, [0, 100, 200, 300, 330]), (150, [])])
def test_window_of_a_looped_recording_never_spans_its_end_and_its_begin(
    tmp_path: Path, length: int, wanted: list[int]
) -> None:
    samples = np.arange(2 * length, dtype=np.float32).reshape(length, 2)
    np.savez(tmp_path / "a.npz", signal=samples.T, rate_hz=400.0, channels=["drive end", "fan end"], unit="g")
    transport = FileTransport(str(tmp_path / "a.npz"), speed=None, loop=True)
    source = SignalSource(transport, signal_layout())
    source.open()
    found: list[Grab] = []
    while source.counts["received"] < 5 * length:
        grab = source.read()
        found += [grab] if isinstance(grab, Grab) else []
    assert bool(found) is bool(wanted)
    passes = [found[at : at + len(wanted)] for at in range(0, 3 * len(wanted), max(1, len(wanted)))]
    for turn, grabs in enumerate(passes):
        assert [grab.name for grab in grabs] == [
            f"samples {turn * length + at}-{turn * length + at + 199}" for at in wanted
        ]
        for grab, at in zip(grabs, wanted, strict=True):
            np.testing.assert_array_equal(grab.image, samples[at : at + 200].T)
    counts = source.counts
    assert (counts["lost"], counts["repeated"], counts["restarts"]) == (0, 0, 0)
    assert counts["received"] == counts["windowed"] + counts["unwindowed"] + counts["pending"]


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"signal": np.zeros(3), "rate_hz": 400.0, "channels": ["a"]},
        {"signal": np.zeros((1, 3)), "rate_hz": np.inf, "channels": ["a"]},
        {"signal": np.array([["no", "number"]]), "rate_hz": 400.0, "channels": ["a"]},
    ],
)
def test_npz_that_is_no_recording_says_so(tmp_path: Path, arrays: dict[str, object]) -> None:
    np.savez(tmp_path / "none.npz", **arrays)
    with pytest.raises(CaptureError, match=r"none\.npz"):
        FileTransport(str(tmp_path / "none.npz")).open()


@pytest.mark.parametrize("header", ["r 2 400 520\n", "r 0 400 520\n", "\n"])
def test_header_of_a_record_that_says_too_little_is_refused(tmp_path: Path, header: str) -> None:
    pytest.importorskip("wfdb", reason="needs wfdb: pip install 'lineward[signals]'")
    (tmp_path / "r.hea").write_text(header)
    with pytest.raises(CaptureError, match=r"r\.hea"):
        FileTransport(str(tmp_path / "r")).open()


def test_missing_record_says_so(tmp_path: Path) -> None:
    pytest.importorskip("wfdb", reason="needs wfdb: pip install 'lineward[signals]'")
    with pytest.raises(CaptureError, match="WFDB"):
        FileTransport(str(tmp_path / "none")).open()


@contextmanager
def tcp_sender(*sessions: bytes) -> Iterator[int]:
    """A server that gives each connection its bytes, one after the other, and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for data in sessions:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            with peer:
                peer.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize("form", [pack, to_json, to_text])
def test_tcp_stream_goes_on_after_the_sender_hung_up(form: Callable[[Chunk], bytes]) -> None:
    samples = bearing(1)
    first, second = Chunk(0, samples[:150], 400.0), Chunk(160, samples[160:400], 400.0)
    with tcp_sender(form(first) + b"", form(second)) as port:
        settings = SourceSettings(kind="signal_tcp", url=f"tcp://127.0.0.1:{port}")
        found, capture = frames_of(settings, 3, signal_layout())
        counts = capture.source_counts
        capture.stop()
    assert [frame.name for frame in found] == ["samples 0-199", "samples 100-299", "samples 200-399"]
    assert np.isnan(found[0].image).sum() == 20
    assert (counts["received"], counts["lost"]) == (390, 10)
    np.testing.assert_allclose(found[2].image, samples[200:400].T, rtol=1e-5)


def test_broken_line_of_a_tcp_stream_is_counted_and_its_samples_are_lost() -> None:
    samples = bearing(1)
    lines = to_text(Chunk(0, samples)).splitlines(keepends=True)
    lines[100] = b"S 10\xff0 0.1 0.2\n"
    with tcp_sender(b"".join(lines)) as port:
        settings = SourceSettings(kind="signal_tcp", url=f"tcp://127.0.0.1:{port}")
        found, capture = frames_of(settings, 1, signal_layout())
        counts = capture.source_counts
        capture.stop()
    assert np.flatnonzero(np.isnan(found[0].image[0])).tolist() == [100]
    assert (counts["broken"], counts["lost"]) == (1, 1)


def test_zeromq_publisher_is_heard_by_its_prefix() -> None:
    import zmq

    samples = bearing(0.5)
    publisher = zmq.Context.instance().socket(zmq.PUB)
    port = publisher.bind_to_random_port("tcp://127.0.0.1")
    settings = SourceSettings(kind="signal_zmq", url=f"tcp://127.0.0.1:{port}", signal={"topic": "press"})
    capture = Capture(name="press", settings=settings, make_source=lambda: build_source(settings, signal_layout()))
    try:
        capture.start()
        frame, first = None, 0
        # A subscription takes its time; what is sent before is nobody's. The stream goes on until a window is whole.
        while frame is None and first < 400_000:
            publisher.send_multipart([b"other", pack(Chunk(first, 0 * samples, 400.0))])
            publisher.send_multipart([b"press", pack(Chunk(first, samples, 400.0))])
            first += len(samples)
            frame = capture.get(0.05)
        assert frame is not None
        np.testing.assert_array_equal(frame.image, samples.T)
    finally:
        capture.stop()
        publisher.close(0)


def test_zeromq_messages_that_nobody_reads_stay_with_their_publisher() -> None:
    import zmq

    publisher = zmq.Context.instance().socket(zmq.XPUB)
    publisher.setsockopt(zmq.SNDHWM, 1)
    publisher.setsockopt(zmq.SNDTIMEO, 300)
    publisher.setsockopt(zmq.XPUB_NODROP, 1)
    port = publisher.bind_to_random_port("tcp://127.0.0.1")
    transport = ZmqTransport(f"tcp://127.0.0.1:{port}", "")
    message, sent = pack(Chunk(0, np.zeros((2**19, 2), np.float32))), 0
    try:
        transport.open()
        assert publisher.recv() == b"\x01"  # the subscription
        with suppress(zmq.Again):
            while sent < 40:
                publisher.send(message)
                sent += 1
        # Two wait to be read; what else was taken is in the buffers of sockets.
        assert sent < 30
        assert len(transport.read()) == 1
    finally:
        transport.close()
        publisher.close(0)


@pytest.mark.parametrize("count", [1, 3])
def test_messages_that_a_sender_repeats_are_counted_and_not_judged_again(count: int) -> None:
    settings = SourceSettings(kind="signal_mqtt", url="mqtt://localhost", signal={"topic": "plant/press"})
    transport = MqttTransport(settings)
    transport._link = SimpleNamespace()  # type: ignore[assignment]  # of which reading needs nothing
    samples = bearing(5)
    messages = [pack(Chunk(at, samples[at : at + 500], 400.0)) for at in range(0, 500 * count, 500)]
    source = SignalSource(transport, signal_layout())
    for message in 2 * messages:
        transport._inbox.put(Incoming("plant/press", message, retained=False))
    found: list[Grab] = []
    while (grab := source.read()) is not IDLE:
        found += [grab] if isinstance(grab, Grab) else []
    assert [grab.name for grab in found] == [f"samples {at}-{at + 199}" for at in range(0, 500 * count - 199, 100)]
    counts = source.counts
    assert (counts["received"], counts["repeated"], counts["restarts"]) == (500 * count, 500 * count, 0)


def test_messages_that_come_faster_than_they_are_read_are_counted_and_fill_no_memory() -> None:
    settings = SourceSettings(kind="signal_mqtt", url="mqtt://localhost", signal={"topic": "plant/press"})
    transport = MqttTransport(settings)
    inbox = transport._inbox
    for _ in range(100):
        inbox.put(Incoming("plant/press", bytes(2**20), retained=False))
    assert transport.broken == 100 - inbox.qsize()
    assert 15 <= inbox.qsize() <= 16
    inbox.put(Lost("the connection was lost"))
    while isinstance(inbox.get(), Incoming):
        pass
    inbox.put(Incoming("plant/press", b"1", retained=False))
    assert inbox.qsize() == 1


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        ({"kind": "signal_tcp", "url": "tcp://host:99999"}, "write tcp://host:port"),
        ({"kind": "signal_tcp", "url": "tcp://host"}, "write tcp://host:port"),
        ({"kind": "signal_mqtt", "url": "mqtt://host:99999"}, "write mqtt://host:port"),
        ({"kind": "signal_mqtt", "url": "mqtt://anna:secret@host"}, "signal.username"),
        ({"kind": "signal_mqtt", "url": "mqtt://host", "password_file": "/x"}, "needs username"),
        ({"kind": "signal_mqtt", "url": "mqtt://host", "ca_file": "/x"}, "mqtts://"),
    ],
)
def test_address_that_cannot_be_connected_to_is_refused_in_the_settings(words: dict[str, str], cure: str) -> None:
    place = {"kind": words.pop("kind"), "url": words.pop("url")}
    signal = {"topic": "t", **words} if place["kind"] == "signal_mqtt" else words
    with pytest.raises(ValidationError, match=cure) as refused:
        SourceSettings.model_validate({**place, "signal": signal})
    assert "secret" not in str(refused.value)


@pytest.mark.broker
def test_mqtt_topic_is_heard_and_found_again_after_the_broker_died(mosquitto: Mosquitto) -> None:
    samples = bearing(1)
    settings = SourceSettings(
        kind="signal_mqtt", url=mosquitto.url, signal={"topic": "plant/press"}, reconnect_seconds=0.5
    )
    capture = Capture(name="press", settings=settings, make_source=lambda: build_source(settings, signal_layout()))
    publish(mosquitto, pack(Chunk(0, samples[:1], 400.0)), retain=True)
    try:
        capture.start()
        for begin, end in ((10, 210), (210, 410)):
            frame = None
            while frame is None:
                # A subscription takes its time: the same numbers again are left out.
                publish(mosquitto, to_json(Chunk(begin, np.resize(samples, (end - begin, 2)), 400.0)))
                frame = capture.get(0.2)
            if begin == 10:
                # What was retained is of another time.
                assert frame.name == "samples 10-209"
                publish(mosquitto, b"rubbish")
                mosquitto.restart()
        assert capture.source_counts["lost"] == 0
    finally:
        capture.stop()


def publish(broker: Mosquitto, payload: bytes, *, retain: bool = False) -> None:
    words = ["mosquitto_pub", "-p", str(broker.port), "-t", "plant/press", "-s", *(["-r"] if retain else [])]
    subprocess.run(words, input=payload, check=True)


def test_serial_port_is_read_from_the_first_whole_line(monkeypatch: pytest.MonkeyPatch) -> None:
    serial = pytest.importorskip("serial", reason="needs pyserial: pip install 'lineward[signals]'")
    opened = threading.Event()

    class Port(serial.Serial):  # type: ignore[misc,name-defined]  # pyserial has no types
        def open(self) -> None:
            super().open()
            opened.set()

    monkeypatch.setattr(serial, "Serial", Port)
    samples = bearing(0.5)
    controller, port = os.openpty()
    tty.setraw(port)
    settings = SourceSettings(kind="signal_serial", device=os.ttyname(port))
    capture = Capture(name="pump", settings=settings, make_source=lambda: build_source(settings, signal_layout()))
    text = b"9.5 3.25\n" + to_text(Chunk(0, samples))
    writer = threading.Thread(target=lambda: os.write(controller, text), daemon=True)
    try:
        capture.start()
        # What came before the port was open is thrown away.
        assert opened.wait(10)
        writer.start()
        frame = capture.get(10)
        assert frame is not None
        np.testing.assert_allclose(frame.image, samples.T, rtol=1e-5)
        assert capture.source_counts["broken"] == 0
    finally:
        capture.stop()
        if writer.ident is not None:
            writer.join(5)
        os.close(controller)
        os.close(port)


def test_silent_stream_stalls_and_streams_again() -> None:
    gate = threading.Event()
    samples = bearing(1)

    class Silent(Scripted):
        def read(self) -> list[Chunk] | None:
            if self.steps or gate.is_set():
                return super().read()
            gate.wait(0.02)
            return []

    transport = Silent(chunks_of(samples[:200], 100))
    settings = SourceSettings(kind="signal_tcp", url="tcp://127.0.0.1:9", stall_seconds=0.2)
    capture = Capture(name="fan", settings=settings, make_source=lambda: SignalSource(transport, signal_layout()))
    capture.start()
    try:
        assert capture.get(10) is not None
        while capture.state is CameraState.STREAMING:
            gate.wait(0.02)
        assert capture.state is CameraState.STALLED
        transport.steps = [[Chunk(200, samples[200:230])]]
        while capture.state is CameraState.STALLED:
            gate.wait(0.02)
        assert capture.state is CameraState.STREAMING
    finally:
        gate.set()
        capture.stop()
