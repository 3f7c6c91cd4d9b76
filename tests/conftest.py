"""What the whole suite shares: how it treats a missing broker and missing evaluation images."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.mosquitto_process import Mosquitto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INSTALL_MOSQUITTO = "apt-get install mosquitto (Debian, Ubuntu) or brew install mosquitto"

# An example that takes long on a busy machine is no failure; the rest is as it was, also under CI.
settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shutil.which("mosquitto") is not None or os.environ.get("CI") == "true":
        return
    skip = pytest.mark.skip(reason=f"no mosquitto on the path: {INSTALL_MOSQUITTO}")
    for item in items:
        if item.get_closest_marker("broker"):
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("broker") and shutil.which("mosquitto") is None:
        pytest.fail(f"CI=true and no mosquitto on the path: {INSTALL_MOSQUITTO}", pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Of the reports: what processes of their own have collected is not known here.
    reports = terminalreporter.stats.get("skipped", ())
    skipped = sum(INSTALL_MOSQUITTO in str(report.longrepr) for report in reports)
    if skipped:
        terminalreporter.section("mosquitto is missing", red=True, bold=True)
        terminalreporter.line(f"{skipped} tests were skipped. Install it and run again: {INSTALL_MOSQUITTO}", red=True)


@pytest.fixture
def make_mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Mosquitto]]:
    """Starts brokers; see :class:`mosquitto_process.Mosquitto` for what can be asked for."""
    brokers: list[Mosquitto] = []

    def make(**options: Any) -> Mosquitto:
        broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"), **options)
        brokers.append(broker)
        broker.start()
        return broker

    yield make
    for broker in brokers:
        broker.stop()


@pytest.fixture
def mosquitto(make_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    """A broker without login and persistence, already running."""
    return make_mosquitto()


@pytest.fixture(autouse=True)
def _umask_is_given_back() -> Iterator[None]:
    """`lineward run` sets it for its process; called inside a test, that is the process of all tests."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
