"""Messages of a round over Flower's Grid, by box name instead of node id. It must not know what the bytes mean."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Message

from deploy.flower import records
from deploy.flower.records import Told
from deploy.flower.rounds import Answered, Failed, Kept
from edge.errors import FederationError
from edge.federation.fields import check_box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flwr.app import RecordDict
    from flwr.serverapp import Grid

    from deploy.flower.exchange import Invitation, Outcome

LOG = logging.getLogger("lineward.flower")

_TICKET_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message under way.

    Attributes:
        box: to which box.
        node: its node id.
        kind: :data:`records.ASK` or :data:`records.TELL`.
        ticket: what the reply must repeat.
    """

    box: str
    node: int
    kind: str
    ticket: str


class GridFleet:
    """The boxes of a Flower federation.

    A box is the node whose key an operator registered under the box's name (``flwr supernode register KEY.pub
    --name SITE/BOX``); SuperLink verifies a signature by that key in every request. A node without a name, with one
    that is no box name, or with one that another node has too, is left alone.

    Args:
        grid: of the ServerApp.
        ttl_s: how long a message may wait for its box and its reply.
    """

    def __init__(self, grid: Grid, *, ttl_s: float) -> None:
        self._grid = grid
        self._ttl_s = ttl_s
        self._nodes: dict[str, int] = {}
        self._sent: dict[str, _Sent] = {}
        self._failed: list[Failed] = []
        self._left_alone: set[str] = set()

    def online(self) -> Sequence[str]:
        """Names of the boxes whose node has sent a sign of life within its interval."""
        nodes = list(self._grid.get_nodes())
        names = Counter(node.name for node in nodes)
        self._nodes.clear()
        for node in nodes:
            problem = _problem(node.name, names[node.name])
            if not problem:
                if node.status == "online":
                    self._nodes[node.name] = node.node_id
            elif (key := f"node {node.node_id}: {problem}") not in self._left_alone:
                self._left_alone.add(key)
                LOG.warning("%s", key)
        return list(self._nodes)

    def ask(self, box: str, invitation: Invitation) -> None:
        """Ask one box for its update."""
        ticket = secrets.token_hex(_TICKET_BYTES)
        self._send(box, records.ASK, ticket, records.ask(invitation, ticket=ticket))

    def tell(self, box: str, outcome: Outcome | None, bank: bytes | None) -> None:
        """Tell one box what became of its update, and give it the bank."""
        ticket = secrets.token_hex(_TICKET_BYTES)
        self._send(box, records.TELL, ticket, records.tell(Told(outcome, bank), ticket=ticket))

    def poll(self) -> Sequence[Answered | Kept | Failed]:
        """Replies that have arrived since the last call."""
        events: list[Answered | Kept | Failed] = [*self._failed]
        self._failed.clear()
        if self._sent:
            for reply in self._grid.pull_messages(list(self._sent)):
                sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
                if sent is not None:
                    events.append(_read(sent, reply))
        return events

    def _send(self, box: str, kind: str, ticket: str, content: RecordDict) -> None:
        node = self._nodes.get(box)
        if node is None:
            self._failed.append(Failed(box, "went offline"))
            return
        message = Message(content, dst_node_id=node, message_type=kind, ttl=self._ttl_s)
        # SuperLink answers with None in the place of a message that it did not take.
        for identity in self._grid.push_messages([message]):
            if identity:
                self._sent[identity] = _Sent(box, node, kind, ticket)
                return
        self._failed.append(Failed(box, "SuperLink did not take the message"))


def _problem(name: str, count: int) -> str:
    if not name:
        return "registered without a name; register its key with --name SITE/BOX"
    try:
        check_box(name)
    except ValueError as error:
        return f"name {name!r}: {error}"
    return f"name {name!r}: {count} nodes have it; unregister all but one" if count > 1 else ""


def _read(sent: _Sent, reply: Message) -> Answered | Kept | Failed:
    if reply.has_error():
        return Failed(sent.box, f"{sent.kind}: {reply.error.reason or reply.error.code}")
    try:
        if reply.metadata.src_node_id != sent.node or not secrets.compare_digest(
            records.read_ticket(reply.content).encode(), sent.ticket.encode()
        ):
            problem = "the reply is not by the node that was asked; look for a stolen key"
            return Failed(sent.box, f"{sent.kind}: {problem}")
        if sent.kind == records.ASK:
            return Answered(sent.box, records.read_answer(reply.content))
        return Kept(sent.box, records.read_kept(reply.content))
    except FederationError as error:
        return Failed(sent.box, f"{sent.kind}: {error}")
