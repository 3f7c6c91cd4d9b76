"""The HTTP address where Prometheus reads a box's figures, and where others ask whether it is well.

Slow or many clients wait for each other here, never the box: few threads, one rendering a second at most.
"""

from __future__ import annotations

import http.server
import logging
import socket
import threading
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from edge.health.exposition import Figures, families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from edge.health.settings import MetricsSettings

_LOG = logging.getLogger(__name__)
MAX_CLIENTS = 8
# Of a client that says nothing or reads nothing.
CLIENT_TIMEOUT_S = 5.0
# Prometheus reads every few seconds; whoever asks more often gets the same page again.
PAGE_AGE_S = 1.0
_POLL_S = 0.1
# Another try where the address is taken.
_AGAIN_S = 3.0


class MetricsServer:
    """Serves ``/metrics`` and ``/healthz``. A part of the box.

    ``/metrics`` is Prometheus' text format or OpenMetrics, as the client asks. ``/healthz`` answers 200 ``ok``, or 503
    with one reason a line.

    Args:
        settings: the address.
        figures: of the box; called in a thread of the server, at most once a second.
        troubles: why the box is not well, empty while it is; as above, for each request.
    """

    name = "metrics"

    def __init__(
        self, settings: MetricsSettings, *, figures: Callable[[], Figures], troubles: Callable[[], list[str]]
    ) -> None:
        self._settings = settings
        self._troubles = troubles
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_BoxCollector(figures))
        ProcessCollector(registry=self._registry)
        self._lock = threading.Lock()
        self._pages: dict[str, tuple[float, bytes]] = {}
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._listening = threading.Event()
        self._stopping = threading.Event()
        self._trouble = ""

    @property
    def port(self) -> int:
        """That it listens on; 0 before the start."""
        return 0 if self._server is None else int(self._server.server_address[1])

    def start(self) -> None:
        """Listen; where the address is taken, try again every few seconds: figures must not keep a box from judging."""
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        if self._listen():
            self._listening.set()
        self._thread.start()

    def _run(self) -> None:
        while not self._listening.is_set():
            if self._stopping.wait(_AGAIN_S):
                return
            if self._listen():
                self._listening.set()
        if self._server is not None and not self._stopping.is_set():
            self._server.serve_forever(_POLL_S)

    def _listen(self) -> bool:
        host, port = self._settings.host, self._settings.port
        try:
            self._server = _Server((host, port), self)
        except OSError as error:
            trouble = (
                f"metrics: {host}:{port} cannot be listened on ({error.strerror}); choose another port, or an address "
                "of this machine"
            )
            if trouble != self._trouble:
                _LOG.error("%s", trouble)
            self._trouble = trouble
            return False
        self._trouble = ""
        _LOG.info("metrics at http://%s:%d/metrics", host, self.port)
        return True

    def request_stop(self) -> None:
        """Begin to end; stop does the rest."""
        self._stopping.set()

    def stop(self, timeout: float) -> bool:
        """End; clients that still read are left behind."""
        self._stopping.set()
        if self._thread is None:
            return True
        if self._server is None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        ending = threading.Thread(target=self._server.shutdown, name="metrics-stop", daemon=True)
        ending.start()
        self._thread.join(timeout)
        self._server.server_close()
        return not self._thread.is_alive()

    def status(self) -> dict[str, Any]:
        """Say where it listens and how many were turned away."""
        server = self._server
        return {} if server is None else {"port": self.port, "turned_away": server.turned_away}

    def warnings(self) -> list[str]:
        """Why nobody can read; empty while it listens."""
        return [self._trouble] if self._trouble else []

    def page(self, accept: str) -> tuple[bytes, str]:
        """Return the page in the format that an Accept header asks for, and its type."""
        encoder, kind = choose_encoder(accept)
        with self._lock:
            at, page = self._pages.get(kind, (float("-inf"), b""))
            if time.monotonic() - at > PAGE_AGE_S:
                page = encoder(self._registry)
                self._pages[kind] = (time.monotonic(), page)
        return page, kind

    def health(self) -> tuple[bytes, HTTPStatus]:
        """Return the answer of ``/healthz``."""
        troubles = self._troubles()
        if not troubles:
            return b"ok\n", HTTPStatus.OK
        return ("\n".join(troubles) + "\n").encode(), HTTPStatus.SERVICE_UNAVAILABLE


class _BoxCollector(Collector):
    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        yield from families(self._figures())


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], part: MetricsServer) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.part = part
        self.turned_away = 0
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (socketserver's signature)
        if not self._places.acquire(blocking=False):
            self.turned_away += 1
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (as above)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 (as above)
        _LOG.debug("metrics: a client of %s went away", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = CLIENT_TIMEOUT_S
    server: _Server
    server_version = "lineward"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.split("?", 1)[0]
        if path == "/metrics":
            page, kind = self.server.part.page(self.headers.get("Accept", ""))
            self._answer(HTTPStatus.OK, page, kind)
        elif path == "/healthz":
            page, status = self.server.part.health()
            self._answer(status, page, "text/plain; charset=utf-8")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"/metrics or /healthz\n", "text/plain; charset=utf-8")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        _LOG.debug("metrics: " + format, *args)

    def _answer(self, status: HTTPStatus, page: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)
