"""A broker for demonstrations and tests on one machine: mosquitto where it is installed, else amqtt.

It listens on this machine only and asks for no login. Not for production.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.errors import BrokerError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

_HOST = "127.0.0.1"
_START_S = 15.0


class EmbeddedBroker:
    """A broker on a free port of the loopback interface, for as long as the context lasts.

    Args:
        program: ``mosquitto`` or ``amqtt``; by default mosquitto where it is on the path, else amqtt.

    Raises:
        MissingExtraError: neither is installed.
        BrokerError: it does not start; the message holds what it said.
    """

    def __init__(self, program: str | None = None) -> None:
        self.program = program or _choose()
        if self.program not in {"mosquitto", "amqtt"}:
            raise BrokerError(f"embedded broker {self.program!r} is unknown; choose mosquitto or amqtt")
        if not _is_installed(self.program):
            raise MissingExtraError(f"{self.program} is not installed; {_CURE}")
        self.port = 0
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """``mqtt://127.0.0.1:port``, once started."""
        return f"mqtt://{_HOST}:{self.port}"

    def __enter__(self) -> EmbeddedBroker:  # noqa: PYI034 (Self needs Python 3.11)
        with contextlib.ExitStack() as stack:
            self.port = _free_port()
            if self.program == "mosquitto":
                self._start_mosquitto(stack)
            else:
                stack.callback(_Amqtt(self.port).stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start_mosquitto(self, stack: contextlib.ExitStack) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lineward-broker-")))
        settings, said = folder / "mosquitto.conf", folder / "mosquitto.log"
        # The QoS 1 window of a subscriber that lags behind is bounded by default; a demonstration loses nothing.
        settings.write_text(
            f"listener {self.port} {_HOST}\nallow_anonymous true\nset_tcp_nodelay true\nmax_queued_messages 0\n",
            encoding="utf-8",
        )
        program = shutil.which("mosquitto")
        assert program is not None
        log = stack.enter_context(said.open("wb"))
        process = subprocess.Popen([program, "-c", str(settings)], stdout=log, stderr=log)  # noqa: S603 (found above)
        stack.callback(_end, process)
        deadline = time.monotonic() + _START_S
        while not _answers(self.port):
            if process.poll() is not None or time.monotonic() > deadline:
                text = said.read_text(encoding="utf-8", errors="replace")[-500:]
                raise BrokerError(f"mosquitto does not start on port {self.port}: {text.strip() or 'it says nothing'}")
            time.sleep(0.02)


_CURE = "run: apt-get install mosquitto, or pip install 'lineward[demo]', which brings amqtt"


def _choose() -> str:
    for program in ("mosquitto", "amqtt"):
        if _is_installed(program):
            return program
    raise MissingExtraError(f"no MQTT broker is installed; {_CURE}")


def _is_installed(program: str) -> bool:
    if program == "mosquitto":
        return shutil.which("mosquitto") is not None
    return importlib.util.find_spec("amqtt") is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=0.5):
            return True
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Amqtt:
    """The pure Python broker, in an event loop and thread of its own."""

    def __init__(self, port: int) -> None:
        from amqtt.broker import Broker  # noqa: PLC0415 (optional)

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="amqtt", daemon=True)
        self._thread.start()
        # Its defaults would add a plugin that publishes on $SYS every few seconds.
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"{_HOST}:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        self._broker = self._call(self._make(Broker, config))
        try:
            self._call(self._broker.start())
        except Exception as error:
            self._end_loop()
            raise BrokerError(f"amqtt does not start on port {port}: {error}") from error

    def stop(self) -> None:
        """Shut the broker and its loop down."""
        try:
            self._call(self._broker.shutdown())
        finally:
            self._end_loop()

    @staticmethod
    async def _make(factory: Any, config: dict[str, Any]) -> Any:  # noqa: ANN401 (amqtt is untyped here)
        # A broker binds to the loop that runs while it is made.
        return factory(config)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 (whatever the coroutine gives)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_S)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_S)
        self._loop.close()
