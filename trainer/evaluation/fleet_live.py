"""Three boxes and an aggregator as processes of this machine, and a PLC that declares their parts good.

It knows the published messages, the settings files and the command line, nothing from inside a box.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from deploy.aggregator.identity import enrol
from edge.alerts.command_messages import AcceptCommand, CommandResult, ShipCommand
from edge.alerts.message import Notice, Status, VerdictMessage, encode
from edge.alerts.settings import parse_broker_url
from edge.alerts.subscriber import Subscriber
from edge.alerts.topics import ACCEPT_VERB, SHIP_VERB, Identity, Kind
from edge.errors import LinewardError
from edge.federation.keys import make_keys, write_keys
from trainer.evaluation.live import lineward_process
from trainer.evaluation.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

SITE = "demo"
FLEET = "demo"
WAIT_SECONDS = 120.0
"""How long any one thing may take on a busy machine."""

_KINDS = frozenset({Kind.VERDICT, Kind.NOTICE, Kind.STATUS, Kind.RESULT})


class FleetFailedError(LinewardError):
    """What was waited for did not happen; the message names it and where to look."""


@dataclass
class BoxSeen:
    """What a subscriber knows of one box.

    Attributes:
        parts: ids of the parts that it has judged.
        declared: of them, those that it was told are good.
        accepted: commands to accept a part that it has obeyed.
        shipped: commands to ship that it has obeyed.
        refusals: why it refused commands.
        status: its last one.
    """

    parts: set[str] = field(default_factory=set)
    declared: set[str] = field(default_factory=set)
    accepted: int = 0
    shipped: int = 0
    refusals: list[str] = field(default_factory=list)
    status: Status | None = None

    @property
    def link(self) -> str:
        """State of its link to the aggregator, as its status says."""
        memory = self._memory
        return str((memory.get("link") or {}).get("state", ""))

    @property
    def fleet_version(self) -> int:
        """Version of the fleet's memory that it judges with."""
        return int(self._memory.get("fleet_version") or 0)

    @property
    def _memory(self) -> dict[str, Any]:
        found = None if self.status is None else self.status.detail.get("memory")
        return found if isinstance(found, dict) else {}


class LiveFleet:
    """An aggregator and boxes that run while the context lasts.

    Args:
        out: folder for settings, keys, logs and states.
        broker: address of the MQTT broker.
        boxes: settings of each box by its name, without site, broker and federation.
        bundle: that all of them run.
        canaries: folder of the aggregator's canaries.
        rounds: settings of the rounds.
        cut_off: name of the box whose line to the aggregator can be cut.
        on_notice: called for each notice.

    Attributes:
        relay: the line of that box.
        boxes: what is known of each box.
        notices: of all boxes and of the aggregator, in order of arrival.
    """

    def __init__(
        self,
        out: Path,
        *,
        broker: str,
        boxes: dict[str, dict[str, Any]],
        bundle: Path,
        canaries: Path,
        rounds: dict[str, Any],
        cut_off: str,
        on_notice: Callable[[Notice], None],
    ) -> None:
        self._out, self._broker, self._settings = out, broker, boxes
        self._on_notice = on_notice
        self._stack = ExitStack()
        self._port = _free_port()
        self.relay = Relay(self._port)
        self._cut_off = cut_off
        self.boxes = {name: BoxSeen() for name in boxes}
        self.notices: list[Notice] = []
        self._aggregator = {
            "listen": f"tcp://127.0.0.1:{self._port}", "key_file": "keys/aggregator.key_secret", "boxes": "enrolled",
            "state_dir": "aggregator", "rounds": {"fleet": FLEET, **rounds}, "canaries": str(canaries),
            "references": [str(bundle)], "broker": {"url": broker}, "site": SITE, "name": "aggregator",
        }  # fmt: skip
        self._subscriber = Subscriber(parse_broker_url(broker), site=SITE, kinds=_KINDS)

    def __enter__(self) -> LiveFleet:  # noqa: PYI034 (Self needs Python 3.11)
        with ExitStack() as stack:
            self._write_settings()
            stack.enter_context(self.relay)
            stack.enter_context(self._subscriber)
            self._subscriber.wait_until_ready(WAIT_SECONDS)
            self._start(stack, "aggregator", "aggregate", "run")
            for name in self._settings:
                self._start(stack, name, "run")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Follow what is published until a condition holds.

        Raises:
            FleetFailedError: it does not come to hold in time.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            received = self._subscriber.receive(0.2)
            if received is not None:
                self._take(received.message)
            if time.monotonic() > deadline:
                raise FleetFailedError(f"waited {WAIT_SECONDS:.0f} s in vain for {what}; see the logs in {self._out}")

    def declare_good(self, parts: dict[str, int]) -> None:
        """Be the PLC: declare so many further parts of each box good as soon as they are judged, and wait for it.

        Raises:
            FleetFailedError: a box does not take them in time.
        """
        goals = {name: self.boxes[name].accepted + count for name, count in parts.items()}

        def done() -> bool:
            for name, goal in goals.items():
                box = self.boxes[name]
                for part in sorted(box.parts - box.declared)[: max(0, goal - len(box.declared))]:
                    box.declared.add(part)
                    command = AcceptCommand(camera="cam-1", part_id=part, id=part)
                    self._send(name, ACCEPT_VERB, encode(command))
            return all(self.boxes[name].accepted >= goal for name, goal in goals.items())

        try:
            self.wait(done, "parts to be judged and taken into the memories")
        except FleetFailedError as error:
            reasons = {reason for box in self.boxes.values() for reason in box.refusals}
            raise FleetFailedError(f"{error}; boxes said: {'; '.join(sorted(reasons)) or 'nothing'}") from error

    def ship(self, *names: str) -> None:
        """Ask boxes to send what they have learned, and wait until they have stored it for sending.

        Raises:
            FleetFailedError: one of them does not.
        """
        goals = {name: self.boxes[name].shipped + 1 for name in names}
        for name in names:
            self._send(name, SHIP_VERB, encode(ShipCommand(id="ship")))
        self.wait(lambda: all(self.boxes[name].shipped >= goal for name, goal in goals.items()), "updates to be made")

    def noticed(self, kind: str, box: str) -> bool:
        """Return whether a box, or the aggregator, has given notice of a kind."""
        return any(notice.kind == kind and notice.box == box for notice in self.notices)

    def _send(self, box: str, verb: str, payload: bytes) -> None:
        self._subscriber.send(Identity(site=SITE, box=box).command(verb), payload)

    def _take(self, message: object) -> None:
        if isinstance(message, Notice):
            self.notices.append(message)
            self._on_notice(message)
            return
        box = self.boxes.get(getattr(message, "box", ""))
        if box is None:
            return
        if isinstance(message, Status):
            box.status = message
        elif isinstance(message, VerdictMessage) and message.part_id is not None:
            box.parts.add(message.part_id)
        elif isinstance(message, CommandResult) and message.ok:
            box.accepted += message.verb == ACCEPT_VERB
            box.shipped += message.verb == SHIP_VERB
        elif isinstance(message, CommandResult):
            box.refusals.append(message.reason)
            # A busy box does not keep every frame; the line shows each part again.
            box.parts.discard(message.id or "")
            box.declared.discard(message.id or "")
            if message.verb == SHIP_VERB:
                raise FleetFailedError(f"box {message.box} does not ship: {message.reason}")

    def _start(self, stack: ExitStack, name: str, *verb: str) -> None:
        config = self._out / f"{name}.yaml"
        stack.enter_context(lineward_process(*verb, "--config", str(config), log=self._out / f"{name}.log"))

    def _write_settings(self) -> None:
        out = self._out
        keys = out / "keys"
        write_keys(keys, make_keys(), name="aggregator")
        for name, settings in self._settings.items():
            pair = make_keys()
            write_keys(keys, pair, name=name, box=f"{SITE}/{name}")
            enrol(out / "enrolled", f"{SITE}/{name}", pair.public)
            port = self.relay.port if name == self._cut_off else self._port
            federation = {
                "fleet": FLEET, "aggregator": f"tcp://127.0.0.1:{port}", "key_file": f"keys/{name}.key_secret",
                "aggregator_key_file": "keys/aggregator.key",
            }  # fmt: skip
            _write_yaml(
                out / f"{name}.yaml",
                {"site": SITE, "box": name, "broker": {"url": self._broker}, "status_every_s": 0.5}
                | settings
                | {"federation": federation},
            )
        _write_yaml(out / "aggregator.yaml", self._aggregator)


def _write_yaml(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
