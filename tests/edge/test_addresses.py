"""A camera whose name nobody knows is told from one that refuses."""

from __future__ import annotations

import shutil
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.capture import addresses
from edge.capture.addresses import unresolved_host
from edge.capture.gstreamer import GstreamerSource
from edge.capture.opencv import CameraSource
from edge.capture.settings import SourceSettings
from edge.capture.sources import IDLE
from edge.errors import CaptureError

# No name may have a label of more than 63 letters (RFC 1035, 2.3.4), so that no name server is asked.
NOBODY = "n" * 64


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were asked for; only those that begin with ``known`` have an address."""
    names: list[str] = []

    def resolve(host: str, port: object) -> list[Any]:
        assert port is None
        names.append(host)
        if not host.startswith("known"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [("address",)]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolve)
    return names


@pytest.mark.parametrize(
    ("text", "host", "asks"),
    [
        ("rtsp://user:p@known/1", "", ["known"]),
        ("rtsp://user:p%40ss@nobody.example:554/1?x=rtsp", "nobody.example", ["nobody.example"]),
        ("rtspsrc location=rtsp://known/1 ! fakesink location=http://Nobody/2", "nobody", ["known", "nobody"]),
        ('rtspsrc location="rtsp://nobody" latency=0', "nobody", ["nobody"]),
        ("file:///dev/video0 http://[::bad", "", []),
        ("udp://:5000", "", []),
        ("videotestsrc ! tee name=x", "", []),
    ],
)
def test_first_name_without_address_is_found(asked: list[str], text: str, host: str, asks: list[str]) -> None:
    assert unresolved_host(text) == host
    assert asked == asks


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addresses.socket, "getaddrinfo", lambda *_: [])
        assert unresolved_host(text) == ""
        assert unresolved_host(f"rtsp://{text}") == ""


def test_camera_of_an_unknown_name_says_so_and_no_password() -> None:
    source = CameraSource(f"rtsp://admin:hunter2@{NOBODY}/1")
    with pytest.raises(CaptureError, match=f"the name '{NOBODY}' cannot be resolved; check its spelling") as caught:
        source.open()
    assert "hunter2" not in str(caught.value)


@pytest.mark.skipif(
    shutil.which("gst-launch-1.0") is None,
    reason="gst-launch-1.0 is not installed (Debian packages gstreamer1.0-tools, -plugins-base, -plugins-good)",
)
def test_pipeline_to_an_unknown_name_says_so() -> None:
    pipeline = f"rtspsrc location=rtsp://admin:hunter2@{NOBODY}/1 ! decodebin"
    source = GstreamerSource(SourceSettings(kind="gstreamer", pipeline=pipeline), buffers=3)
    source.open()
    try:
        with pytest.raises(CaptureError, match=f"the name '{NOBODY}' cannot be resolved; check its spelling"):
            next(grab for grab in iter(source.read, None) if grab is not IDLE)
    finally:
        source.close()
