"""Which host names of a camera's address cannot be resolved: FFmpeg and GStreamer say no more than that it is away."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

NAME_CURE = "check its spelling and this machine's name server, or give the camera's number"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'!]+")


def unresolved_host(text: str) -> str:
    """The first host in the URLs of a text that has no address here; empty where all have one, or none is named.

    Asks the system's resolver and waits for it, as the camera's program did before: call it once that has failed.

    Args:
        text: a URL, or a pipeline with URLs in it.
    """
    for url in _URL.findall(text):
        try:
            host: str | None = urlsplit(url).hostname
        except ValueError:
            continue
        # A file has no host; a stream that is listened for (udp://@239.0.0.1) need not be resolved.
        if not host:
            continue
        try:
            socket.getaddrinfo(host, None)
        except (socket.gaierror, UnicodeError):  # the latter: a label that is empty or too long
            return host
    return ""
