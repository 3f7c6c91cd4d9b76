"""What Prometheus reads over HTTP, and that whoever reads cannot disturb the box."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from edge.health.exposition import Figures
from edge.health.metrics import BUCKETS_MS, Metrics
from edge.health.metrics_server import MAX_CLIENTS, MetricsServer
from edge.health.settings import MetricsSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

SOON = 10
STATUS = {
    "uptime_ms": 1500,
    "versions": {"lineward": "0.1.0", "paho-mqtt": "2.1.0"},
    "product": "tile",
    "bundle": {"id": "ab" * 32, "method": "memory"},
    "memory": {"version": 3, "fleet": 2},
    "engine": "openvino",
    "precision": "int8",
    "cameras": {
        "cam-1": {
            "state": "streaming", "queued": 2, "threshold": {"value": 1.25},
            "threshold_version": 5,
            "counters": {"captured": 12, "judged": 10, "nok": 1, "not_judged": 0, "dropped": 2, "corrupt": 0,
                         "reconnects": 1, "events": 1},
        },
        "cam-2": {"state": "disabled", "queued": None, "threshold": None, "counters": {}},
    },
    "drops": {"frames_dropped": 2, "messages_lost": 1},
    "detail": {
        "adaptation": {
            "cameras": {
                "cam-1": {
                    "phase": "frozen", "version": 14, "shift": 3.25, "bound": 8.0, "alarm_rate": 0.4, "drifting": True,
                    "at_bound": False, "frames": {"accepted": 120, "frozen": 7, "unknown": 0},
                },
            },
        },
    },
    "warnings": ("one", "two"),
    "clock_synced": True,
}  # fmt: skip


def figures(metrics: Metrics | None = None, **changes: Any) -> Figures:
    values = {
        "site": "plant", "box": "box1", "status": STATUS, "stages": (metrics or Metrics()).histograms(),
        "outbox": {"depth": 4, "bytes": 4096, "dropped": 7, "acknowledged": 5},
        "link": {"connected": 1, "published": 9}, "healthy": True,
    }  # fmt: skip
    return Figures(**(values | changes))


@contextlib.contextmanager
def serving(made: Any = figures, troubles: Any = list) -> Iterator[MetricsServer]:
    server = MetricsServer(MetricsSettings(port=0), figures=made, troubles=troubles)
    server.start()
    try:
        yield server
    finally:
        assert server.stop(SOON)


def get(server: MetricsServer, path: str, **headers: str) -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SOON) as answer:
            return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers["Content-Type"]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_what_the_box_says() -> None:
    metrics = Metrics()
    for milliseconds in (0.5, 7, 7, 99999):
        metrics.observe({"inference": milliseconds})
    with serving(lambda: figures(metrics)) as server:
        status, text, kind = get(server, "/metrics")

    found = samples(text)
    stage = ("stage", "inference")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert found["lineward_stage_duration_seconds_count", (stage,)] == 4
    assert found["lineward_stage_duration_seconds_sum", (stage,)] == pytest.approx(100.0135)
    assert found["lineward_stage_duration_seconds_bucket", (("le", "0.005"), stage)] == 1
    assert found["lineward_stage_duration_seconds_bucket", (("le", "0.01"), stage)] == 3
    assert found["lineward_stage_duration_seconds_bucket", (("le", "+Inf"), stage)] == 4
    camera = ("camera", "cam-1")
    assert found["lineward_frames_captured_total", (camera,)] == 12
    assert found["lineward_frames_dropped_total", (camera,)] == 2
    assert found["lineward_queue_depth", (camera,)] == 2
    assert found["lineward_threshold", (camera,)] == 1.25
    assert found["lineward_threshold_version", (camera,)] == 5
    assert found["lineward_moments_version", (camera,)] == 14
    assert found["lineward_adaptation_shift", (camera,)] == 3.25
    assert found["lineward_adaptation_drifting", (camera,)] == 1
    assert found["lineward_adaptation_frames_total", (camera, ("fate", "accepted"))] == 120
    assert found["lineward_adaptation_phase", (camera, ("lineward_adaptation_phase", "frozen"))] == 1
    assert found["lineward_adaptation_phase", (camera, ("lineward_adaptation_phase", "following"))] == 0
    assert found["lineward_camera_state", (camera, ("lineward_camera_state", "streaming"))] == 1
    assert found["lineward_camera_state", (camera, ("lineward_camera_state", "stalled"))] == 0
    assert found["lineward_camera_state", (("camera", "cam-2"), ("lineward_camera_state", "disabled"))] == 1
    assert found["lineward_outbox_depth", ()] == 4
    assert found["lineward_outbox_dropped_total", ()] == 7
    assert found["lineward_broker_connected", ()] == 1
    assert found["lineward_engine_info", (("engine", "openvino"), ("precision", "int8"))] == 1
    assert found["lineward_memory_version", ()] == 3
    assert found["lineward_counts_total", (("what", "messages_lost"),)] == 1
    assert found["lineward_warnings", ()] == 2
    assert found["process_resident_memory_bytes", ()] > 1e6
    assert found["process_open_fds", ()] > 3


def test_box_that_has_nothing_to_say_yet_can_be_read() -> None:
    with serving(lambda: Figures(site="s", box="b")) as server:
        status, text, _ = get(server, "/metrics")

    assert status == 200
    assert samples(text)["lineward_healthy", ()] == 0


def test_openmetrics_is_given_to_whom_asks_for_it() -> None:
    with serving() as server:
        _, text, kind = get(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")

    assert kind.startswith("application/openmetrics-text")
    assert text.rstrip().endswith("# EOF")


def test_healthz_names_the_reasons() -> None:
    troubles: list[str] = []
    with serving(troubles=lambda: troubles) as server:
        well = get(server, "/healthz")
        troubles.append("judge of cam-1: stuck")
        ill = get(server, "/healthz")
        elsewhere = get(server, "/")

    assert well[:2] == (200, "ok\n")
    assert ill[:2] == (503, "judge of cam-1: stuck\n")
    assert elsewhere[0] == 404


def test_many_readers_cost_one_rendering() -> None:
    made = []

    def count() -> Figures:
        made.append(1)
        return figures()

    with serving(count) as server:
        pages = [get(server, "/metrics")[1] for _ in range(5)]

    assert len(made) == 1
    assert len(set(pages)) == 1


def test_clients_that_say_nothing_are_bounded_and_the_server_ends_without_them() -> None:
    with contextlib.ExitStack() as clients, serving() as server:
        threads = threading.active_count()
        for _ in range(3 * MAX_CLIENTS):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), SOON))
            client.sendall(b"GET /met")
        turned_away = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), SOON))
        turned_away.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert turned_away.recv(100) == b""

        assert threading.active_count() <= threads + MAX_CLIENTS
        assert server.status()["turned_away"] == 2 * MAX_CLIENTS + 1


def test_taken_port_is_named_and_listened_on_once_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.health.metrics_server._AGAIN_S", 0.02)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = MetricsServer(MetricsSettings(port=port), figures=figures, troubles=list)
        server.start()

        assert f"127.0.0.1:{port}" in server.warnings()[0]
        assert "choose another port" in server.warnings()[0]
    assert server._listening.wait(SOON)
    try:
        assert "lineward" in get(server, "/metrics")[1]
        assert server.warnings() == []
    finally:
        assert server.stop(SOON)


def test_server_that_waits_for_its_port_stops() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = MetricsServer(MetricsSettings(port=other.getsockname()[1]), figures=figures, troubles=list)
        server.start()

        assert server.stop(SOON)


@given(st.lists(st.floats(0, 1e5, allow_nan=False)))
def test_histogram_counts_every_latency_once(values: list[float]) -> None:
    metrics = Metrics(window=1)
    for value in values:
        metrics.observe({"store": value})

    histograms = metrics.histograms()

    if not values:
        assert histograms == {}
        return
    histogram = histograms["store"]
    assert histogram.count == len(values)
    assert histogram.sum_s == pytest.approx(sum(values) / 1e3)
    for bound_ms, (bound_s, count) in zip(BUCKETS_MS, histogram.buckets, strict=False):
        assert bound_s == bound_ms / 1e3
        assert count == sum(value <= bound_ms for value in values)
