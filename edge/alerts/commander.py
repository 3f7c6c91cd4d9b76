"""Commander: asks a box to do something and waits for its answer. It must not know what commands do."""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from edge.alerts.message import COMMANDS, CommandResult
from edge.alerts.subscriber import Subscriber
from edge.alerts.topics import Identity, Kind
from edge.errors import BrokerError, UsageError
from edge.settings import explain

if TYPE_CHECKING:
    from types import TracebackType

    from edge.alerts.settings import BrokerSettings


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

    def ask(self, verb: str, fields: dict[str, Any], *, timeout: float = 10.0) -> CommandResult:
        """Send a command and wait for the box's answer to it.

        Args:
            verb: ``accept``, ``replay`` or ``ship``.
            fields: of the command, see docs/formats.md; an ``id`` is drawn.
            timeout: seconds to wait for the broker, and again for the box.

        Raises:
            UsageError: the verb is unknown, or a field does not fit; nothing was sent.
            BrokerError: the broker or the box does not answer in time. The command may have been done all the same.
        """
        model = COMMANDS.get(verb)
        if model is None:
            raise UsageError(f"command {verb}: unknown; known are {', '.join(sorted(COMMANDS))}")
        number = secrets.token_hex(8)
        try:
            command = model.model_validate_json(json.dumps(fields | {"id": number}), by_alias=True, by_name=False)
        except ValidationError as error:
            raise UsageError(f"command {verb}: {explain(error, model)}") from error
        try:
            self._subscriber.wait_until_ready(timeout)
        except BrokerError as error:
            raise BrokerError(f"{self._address}: {error}") from error
        self._subscriber.send(self._identity.command(verb), command.model_dump_json(by_alias=True).encode())
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            received = self._subscriber.receive(left)
            if received is None:
                break
            result = received.message
            if isinstance(result, CommandResult) and result.id == number:
                return result
        raise BrokerError(
            f"{self._identity.root}: no answer to {verb} within {timeout:g} s; see whether the box is online with "
            "`lineward watch --all`"
        )
