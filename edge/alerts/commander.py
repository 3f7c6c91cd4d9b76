"""Commander: asks a box to do something and waits for its answer. It must not know what commands do."""

from __future__ import annotations

import json
import secrets
import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from edge.alerts.command_messages import COMMANDS, CommandResult
from edge.alerts.commands import CLOCK
from edge.alerts.subscriber import Subscriber
from edge.alerts.topics import Identity, Kind
from edge.alerts.wire import format_utc
from edge.errors import BrokerError, CommandError, UsageError
from edge.settings import explain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from edge.alerts.settings import BrokerSettings


_LOOK_S = 0.2


def ask_for_missing(
    settings: BrokerSettings,
    missing: Mapping[tuple[str, str, str], Sequence[tuple[int, int]]],
    *,
    timeout: float = 10.0,
) -> int:
    """Ask boxes to send again what a subscriber has not got; what they still have follows with ``late`` set.

    Args:
        settings: the broker, with a login that may send commands.
        missing: of :attr:`edge.alerts.subscriber.Subscriber.missing`: ranges by site, box and epoch.
        timeout: seconds to wait for the broker and for each answer.

    Returns:
        How many messages the boxes send again.

    Raises:
        BrokerError: the broker, or one of the boxes, does not answer in time.
        CommandError: a box refuses.
    """
    count = 0
    for (site, box, epoch), ranges in missing.items():
        with Commander(settings, site=site, box=box) as commander:
            for first, last in ranges:
                result = commander.ask("replay", {"epoch": epoch, "from": first, "to": last}, timeout=timeout)
                if not result.ok:
                    raise CommandError(f"{site}/{box} does not replay {first} to {last}: {result.reason}")
                count += result.count
    return count


class Commander:
    """Sends commands to one box; a context manager.

    Args:
        settings: the broker.
        site: of the box.
        box: its name.

    Raises:
        MessageError: a name cannot be part of a topic.
    """

    def __init__(self, settings: BrokerSettings, *, site: str, box: str) -> None:
        self._identity = Identity(site=site, box=box, prefix=settings.prefix)
        self._address = settings.address
        self._subscriber = Subscriber(settings, site=site, box=box, kinds=frozenset({Kind.RESULT}))

    def __enter__(self) -> Commander:  # noqa: PYI034 (Self needs Python 3.11)
        self._subscriber.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._subscriber.stop()

    def ask(
        self,
        verb: str,
        fields: dict[str, Any],
        *,
        key: str | None = None,
        expires_s: float | None = None,
        timeout: float = 10.0,
    ) -> CommandResult:
        """Send a command and wait for the box's answer to it.

        Args:
            verb: ``accept``, ``replay``, ``ship`` ...
            fields: of the command, see docs/formats.md; an ``id`` is drawn.
            key: the box does it once under this key, however often it is asked.
            expires_s: the box does it within so many seconds from now, by both clocks, or not at all.
            timeout: seconds to wait for the broker, and again for the box.

        Raises:
            UsageError: the verb is unknown, or a field does not fit; nothing was sent.
            BrokerError: the broker refuses the command, and it was not done; or it or the box does not answer in time,
                and it may have been done all the same.
        """
        model = COMMANDS.get(verb)
        if model is None:
            raise UsageError(f"command {verb}: unknown; known are {', '.join(sorted(COMMANDS))}")
        number = secrets.token_hex(8)
        given = fields | {"id": number}
        if key is not None:
            given["key"] = key
        if expires_s is not None:
            given["expires_at"] = format_utc(datetime.now(timezone.utc) + timedelta(seconds=expires_s))
        try:
            command = model.model_validate_json(json.dumps(given), by_alias=True, by_name=False)
        except ValidationError as error:
            raise UsageError(f"command {verb}: {explain(error, model)}") from error
        try:
            self._subscriber.wait_until_ready(timeout)
        except BrokerError as error:
            raise BrokerError(f"{self._address}: {error}") from error
        topic = self._identity.command(verb)
        self._subscriber.take_refusal(topic)
        self._subscriber.send(topic, command.model_dump_json(by_alias=True).encode())
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            received = self._subscriber.receive(min(left, _LOOK_S))
            if received is not None and isinstance(received.message, CommandResult) and received.message.id == number:
                return received.message
            if refusal := self._subscriber.take_refusal(topic):
                raise BrokerError(
                    f"{self._address}: the broker does not take {topic}: {refusal}; this login may not send commands, "
                    "take one that may (docs/broker.md)"
                )
        again = "" if command.key is None else f". Asked again with the key {command.key} it does this once at most"
        raise BrokerError(
            f"{self._identity.root}: no answer to {verb} within {timeout:g} s; see whether the box is online with "
            f"`lineward watch --all`, and whether this login may send commands{again}"
        )

    def ask_fresh(
        self, verb: str, fields: dict[str, Any], *, key: str | None = None, timeout: float = 10.0
    ) -> tuple[CommandResult, bool]:
        """As :meth:`ask`, with a key and an expiry as long as the wait; without expiry where the box has no time.

        That is safe for whoever waits: an answer within the wait proves that the box is there, and the key is the same.

        Returns:
            The answer, and whether it is of a command with an expiry.

        Raises:
            UsageError: as :meth:`ask`.
            BrokerError: as :meth:`ask`.
        """
        key = key or secrets.token_hex(16)
        result = self.ask(verb, fields, key=key, expires_s=timeout, timeout=timeout)
        if result.ok or not result.reason.startswith(CLOCK):
            return result, True
        return self.ask(verb, fields, key=key, timeout=timeout), False
