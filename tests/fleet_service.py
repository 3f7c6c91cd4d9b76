"""An aggregator for tests: its settings in a folder, the service in a thread, boxes enrolled, commands run."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from typer.testing import CliRunner

from deploy.aggregator.cli import app
from deploy.aggregator.identity import enrol
from deploy.aggregator.service import Service
from deploy.aggregator.settings import load_settings
from edge.federation.keys import KeyPair, make_keys, read_key_pair, write_keys
from tests.federation_link import FLEET, make_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from deploy.aggregator.settings import AggregatorSettings
    from edge.federation.client import FederationClient
    from edge.federation.update import MemoryUpdate


@dataclass(frozen=True)
class Opinion:
    accepted: bool = True
    reasons: tuple[str, ...] = ()


class Suspicious:
    """A gate that holds back the boxes it is told to."""

    def __init__(self, *boxes: str) -> None:
        self.boxes = set(boxes)

    def __call__(self, update: MemoryUpdate, **_others: object) -> Opinion:
        return Opinion(accepted=False, reasons=("it pulls canaries",)) if update.box in self.boxes else Opinion()


class Aggregator:
    """Files and keys of an aggregator; :meth:`start` serves them in a thread."""

    def __init__(self, folder: Path, *, gate: Any = None, **settings: Any) -> None:
        self.folder = folder
        self.gate = gate  # None: the real ones, which are what the settings say
        (folder / "boxes").mkdir(parents=True)
        _, secret = write_keys(folder, make_keys(), name="aggregator")
        self.keys = read_key_pair(secret)
        self.config = folder / "aggregator.yaml"
        self.values: dict[str, Any] = {
            "listen": "tcp://127.0.0.1:0",
            "key_file": "aggregator.key_secret",
            "boxes": "boxes",
            "state_dir": "state",
            "rounds": {"fleet": FLEET, "close_at": 2, "min_boxes": 1, "period_s": 60.0, "min_frames": 8.0},
            "merge": {"rows": 32},
        }
        self.values.update(settings)
        self.write()
        self._service: Service | None = None
        self._thread: threading.Thread | None = None

    def write(self) -> None:
        self.config.write_text(yaml.safe_dump(self.values))

    @property
    def settings(self) -> AggregatorSettings:
        return load_settings(self.config)

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    def start(self) -> None:
        self._service = Service(self.settings, gate=self.gate)
        self._thread = threading.Thread(target=self._service.run, daemon=True)
        self._thread.start()
        assert self._service.started.wait(10)
        # The next start listens at the same port, as an aggregator does.
        self.values["listen"] = self._service.endpoint
        self.write()

    def stop(self) -> None:
        if self._thread is not None:
            self.service.request_stop()
            self._thread.join(5)
            assert not self._thread.is_alive()
            self._thread = None

    def __enter__(self) -> Aggregator:  # noqa: PYI034 (Self needs Python 3.11)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def command(self, *words: str) -> str:
        """Run a verb of ``lineward aggregate`` and return what it prints; its error is raised."""
        result = CliRunner().invoke(app, [*words, "--config", str(self.config)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    def wait_for_event(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """An event is stored after the answer that goes with it has been sent."""
        deadline = time.monotonic() + 5
        while True:
            for event in json.loads(self.command("status", "--json"))["events"]:
                if what(event):
                    return dict(event)
            assert time.monotonic() < deadline

    def enrol(self, box: str) -> KeyPair:
        public, secret = write_keys(self.folder / "keys" / box, make_keys(), name="box", box=box)
        self.command("enrol", box, "--public", str(public))
        keys = read_key_pair(secret)
        # A bare socket knocks once; the folder is read twice a second.
        deadline = time.monotonic() + 5
        while self._thread is not None and keys.public not in self.service._registry.boxes.names:
            assert time.monotonic() < deadline
            self.service._registry.refresh()
        return keys

    def client(self, keys: KeyPair, box: str, **options: Any) -> FederationClient:
        return make_client(
            self.folder, keys, box, self.service.endpoint, server_key=self.keys.public, **options
        )  # fmt: skip


def wait_for(client: FederationClient, what: Callable[[], object], seconds: float = 10.0) -> None:
    assert client.wait_for(what, seconds), (client.state, client.counters, client.last_error)


@contextlib.contextmanager
def merging(folder: Path, boxes: Sequence[str], *, rows: int, soon: float) -> Iterator[Service]:
    """A service in ``folder/aggregator`` that makes a bank of two boxes' updates at once; keys of boxes in ``folder``.

    Args:
        folder: of the test.
        boxes: of site ``plant``, enrolled.
        rows: of the bank.
        soon: seconds to wait for it at the begin and at the end.
    """
    home = folder / "aggregator"
    write_keys(home, make_keys(), name="aggregator")
    for box in boxes:
        keys = make_keys()
        write_keys(folder, keys, name=box)
        enrol(home / "boxes", f"plant/{box}", keys.public)
    settings = {
        "listen": "tcp://127.0.0.1:0", "key_file": "aggregator.key_secret", "boxes": "boxes", "state_dir": "state",
        "rounds": {"fleet": "f", "close_at": 2, "min_boxes": 2, "min_frames": 1}, "merge": {"rows": rows},
    }  # fmt: skip
    (home / "aggregator.yaml").write_text(yaml.safe_dump(settings))
    service = Service(load_settings(home / "aggregator.yaml"))
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        assert service.started.wait(soon)
        yield service
    finally:
        service.request_stop()
        thread.join(soon)
