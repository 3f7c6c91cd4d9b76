"""Counters, percentiles, heartbeats."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from edge.health.metrics import Metrics
from edge.health.watchdog import NS_PER_S, Watchdog, clock_synchronised, notify_systemd

if TYPE_CHECKING:
    from pathlib import Path


def test_counters_add_up() -> None:
    metrics = Metrics()
    metrics.count("judged")
    metrics.count("judged", 2)

    assert metrics.counts() == {"judged": 3}
    assert metrics.value("never") == 0


def test_percentiles_speak_of_the_recent_window() -> None:
    metrics = Metrics(window=100)
    for value in [9999.0] * 50 + list(range(1, 101)):
        metrics.observe({"inference": float(value)})

    figures = metrics.percentiles()["inference"]

    assert figures["p50"] == pytest.approx(50.5)
    assert figures["p99"] == pytest.approx(99.01)
    assert figures["max"] == 100


def test_no_latencies_no_percentiles() -> None:
    assert Metrics().percentiles() == {}


def test_watchdog_names_silent_loops() -> None:
    now = [0]
    watchdog = Watchdog(limit_s=5, clock_ns=lambda: now[0])
    watchdog.beat("judge")
    watchdog.beat("status")
    now[0] = 4 * NS_PER_S
    watchdog.beat("status")
    now[0] = 6 * NS_PER_S

    assert watchdog.stuck() == ("judge",)
    watchdog.forget("judge")
    assert watchdog.stuck() == ()


def test_systemd_hears_of_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(address))
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))

        assert notify_systemd("READY=1")
        assert server.recv(64) == b"READY=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all"])
def test_absent_service_manager_is_no_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)

    assert not notify_systemd("READY=1")


def test_clock_state_is_known_or_unknown() -> None:
    assert clock_synchronised() in (True, False, None)


def test_service_manager_that_does_not_read_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(address))
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))
        monkeypatch.setattr("edge.health.watchdog.NOTIFY_TIMEOUT_S", 0.01)

        assert not all(notify_systemd("WATCHDOG=1") for _ in range(1000))
