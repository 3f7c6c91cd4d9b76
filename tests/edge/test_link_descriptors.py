"""A box that loses its broker for weeks must not gather descriptors until a garbage collection comes by."""

from __future__ import annotations

import gc
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest

from edge.alerts.mqtt import Connected, Inbox, Link
from edge.alerts.settings import BrokerSettings, Protocol

if TYPE_CHECKING:
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker


@pytest.fixture
def no_collection() -> object:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.usefixtures("no_collection")
def test_a_closed_link_holds_no_descriptor(mosquitto: Mosquitto) -> None:
    before = descriptors()
    for _ in range(3):
        inbox: Inbox = SimpleQueue()
        link = Link(
            settings=BrokerSettings(url=mosquitto.url), client_id="box", protocol=Protocol.V5, will=None, inbox=inbox
        )
        link.open()
        assert isinstance(inbox.get(timeout=30), Connected)
        link.close(goodbye=True)
        del link
    assert descriptors() == before
