"""The desk where commands come in: read, admitted, handed to whoever does them, answered. It must not know the link."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from edge.alerts.command_messages import CommandMessage, CommandResult
from edge.alerts.commands import id_of
from edge.alerts.message import build, parse
from edge.alerts.topics import check_segment, parse_topic
from edge.errors import LinewardError, MessageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.alerts.commands import Commands
    from edge.alerts.message import AnyMessage
    from edge.alerts.mqtt import Incoming
    from edge.alerts.topics import Identity

CommandHandler: TypeAlias = "Callable[[AnyMessage], dict[str, Any] | None]"
LOG = logging.getLogger("lineward.commands")
# Answers that wait for room in flight; whoever floods a box with commands loses the oldest.
_MAX_RESULTS = 64


class CommandDesk:
    """Handlers by verb, and the answers that are to be published.

    Args:
        identity: of the box.
        commands: decides which are done.
    """

    def __init__(self, identity: Identity, commands: Commands) -> None:
        self.commands = commands
        self.counters = dict.fromkeys(("commands", "commands_failed"), 0)
        self._identity = identity
        self._handlers: dict[str, CommandHandler] = {}
        self._answers: deque[CommandResult] = deque(maxlen=_MAX_RESULTS)

    def on_command(self, verb: str, handler: CommandHandler) -> None:
        """Have commands of a verb done by ``handler``, see :meth:`edge.alerts.publisher.Publisher.on_command`."""
        self._handlers[verb] = handler

    def answer(self, verb: str, values: dict[str, Any]) -> None:
        """Note an answer and keep it to be published. Any thread may.

        Raises:
            MessageError: a field is unknown or has a wrong value.
        """
        self._settle(verb, values)

    def next_answer(self) -> CommandResult | None:
        """The oldest answer that is to be published; None where there is none."""
        return self._answers.popleft() if self._answers else None

    def take(self, event: Incoming) -> None:
        """Do what a message asks for, or say why not. Returns at once, whatever it holds."""
        self.counters["commands"] += 1
        try:
            # `cmd/` has a verb without a character: `cmd/+` matches it (MQTT 5, clause 4.7.1.3), no answer has a topic.
            verb = check_segment(parse_topic(event.topic).leaf, field="verb")
        except MessageError as error:
            LOG.warning("a command without a verb is not answered: %s", error)
            return
        try:
            if verb in self._handlers:
                self._obey(verb, parse(event.topic, event.payload, prefix=self._identity.prefix))
                return
            known = ", ".join(sorted(self._handlers))
            reason = f"unknown command; known are: {known}"
        except MessageError as error:
            reason = str(error)[:500]
        self._answers.append(self._result(verb, ok=False, id=id_of(event.payload), reason=reason))

    def _obey(self, verb: str, command: AnyMessage) -> None:
        assert isinstance(command, CommandMessage)
        admission = self.commands.admit(verb, command)
        if admission.answer is not None:
            self._answers.append(self._result(verb, **admission.answer))
        if admission.command is None:
            return
        number = admission.command.id
        try:
            values = self._handlers[verb](admission.command)  # type: ignore[arg-type]  # each command is an AnyMessage
            if values is not None:
                self._settle(verb, values | {"id": number})
        except LinewardError as error:
            self._settle(verb, {"ok": False, "id": number, "reason": str(error)[:500]})
        except Exception:
            # Whatever a handler does wrong, the box goes on publishing.
            self.counters["commands_failed"] += 1
            LOG.exception("command %s failed", verb)
            self._settle(verb, {"ok": False, "id": number, "reason": "it failed; the box's log says why"})

    def _settle(self, verb: str, values: dict[str, Any]) -> None:
        self._result(verb, **values)  # what cannot be said is not noted
        for answer in self.commands.settle(values):
            self._answers.append(self._result(verb, **answer))

    def _result(self, verb: str, **values: Any) -> CommandResult:  # noqa: ANN401 (checked by the model)
        return build(CommandResult, site=self._identity.site, box=self._identity.box, verb=verb, **values)
