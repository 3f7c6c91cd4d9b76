"""What a box says over one connection: who it is, its updates, and its wish for a bank. No threads, no retries."""

from __future__ import annotations

import hashlib
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.errors import FederationError
from edge.federation.connection import Connection, LinkDownError, LinkKind
from edge.federation.messages import (
    Chunk,
    Fetch,
    Hello,
    Nothing,
    Offer,
    Part,
    Progress,
    Receipt,
    Refused,
    Resume,
    Welcome,
    build,
    encode_message,
    parse_reply,
)
from edge.federation.refusals import Refusal
from edge.federation.spool import Download, Spool
from edge.federation.wire import Limits, decode_bank

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.federation.messages import Reply, Request
    from edge.federation.pace import Pace
    from edge.federation.spool import Upload
    from edge.federation.update import FleetBank

_STALLS = 3  # answers in a row that ask for no further byte


@dataclass(frozen=True, slots=True)
class Member:
    """Who a box is to its fleet; the fields are those of :class:`edge.federation.messages.Hello`."""

    fleet: str
    box: str
    product: str
    subclass: str
    embedding_id: str

    @property
    def pool(self) -> str:
        """Names what is fetched for it, in the spool."""
        return "\n".join((self.embedding_id, self.product, self.subclass, self.fleet))  # noqa: FLY002 (no name has one)

    def check_bank(self, payload: bytes, version: int, limits: Limits) -> FleetBank:
        """Return the bank that the bytes are.

        Raises:
            FederationError: they are none, or one of another fleet, embedding or version.
        """
        bank = decode_bank(payload, limits)
        if bank.fleet != self.fleet:
            raise FederationError(Refusal.WRONG_FLEET, f"bank: is of fleet {bank.fleet!r}, not of {self.fleet!r}")
        if bank.embedding_id != self.embedding_id:
            raise FederationError(Refusal.WRONG_EMBEDDING, "bank: its rows are of another embedding than this bundle's")
        if bank.version != version:
            raise FederationError(Refusal.MALFORMED, f"bank: is version {bank.version}, {version} was asked for")
        return bank


class Session:
    """The requests of a box; a refusal comes back as a FederationError with the aggregator's code and reason.

    Args:
        connection: an open one.
        member: who the box is.
        spool: where a bank is kept while it arrives.
        limits: of a bank.
        pace: how large chunks are.
        count: told of ``bytes_sent`` and ``bytes_received``.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        member: Member,
        spool: Spool,
        limits: Limits,
        pace: Pace,
        count: Callable[[str, int], None],
    ) -> None:
        self._connection = connection
        self._member = member
        self._spool = spool
        self._limits = limits
        self._pace = pace
        self._count = count
        self._ids = itertools.count(1)

    def hello(self, have_version: int) -> Welcome:
        """Say who this box is and which bank it has.

        Raises:
            FederationError: the aggregator refuses.
            LinkDownError: the connection ends, or somebody answers in another language.
        """
        member = self._member
        hello = build(
            Hello,
            id=next(self._ids),
            fleet=member.fleet,
            box=member.box,
            product=member.product,
            subclass=member.subclass,
            embedding_id=member.embedding_id,
            have_version=have_version,
        )
        reply, _ = self._ask(hello)
        if not isinstance(reply, Welcome):
            raise self._unexpected(reply)
        return reply

    def send(self, upload: Upload, welcome: Welcome) -> Receipt:
        """Send an update, from where a former connection ended, and return its receipt.

        Raises:
            FederationError: the aggregator refuses it.
            LinkDownError: as :meth:`hello`.
        """
        offer = build(
            Offer,
            id=next(self._ids),
            embedding_id=upload.embedding_id,
            product=upload.product,
            round=upload.round,
            sha256=upload.sha256,
            size=len(upload.payload),
        )
        reply, _ = self._ask(offer)
        stalled = 0
        while not isinstance(reply, Receipt):
            if not isinstance(reply, Resume | Progress):
                raise self._unexpected(reply)
            offset = reply.offset
            body = upload.payload[offset : offset + self._pace.within(welcome.max_chunk)]
            if not body or stalled > _STALLS:
                raise FederationError(Refusal.BAD_OFFSET, f"the aggregator asks for byte {offset} and goes no further")
            reply = self._send_chunk(build(Chunk, id=next(self._ids), sha256=upload.sha256, offset=offset), body)
            stalled = stalled + 1 if isinstance(reply, Progress) and reply.offset <= offset else 0
        return reply

    def fetch(self, version: int) -> FleetBank:
        """Bring a bank into the spool and return it; what has arrived stays there when the connection ends.

        Raises:
            FederationError: it is not there, or not what was announced.
            LinkDownError: as :meth:`hello`.
            StoreError: it cannot be stored.
        """
        pool = self._member.pool
        bank = self._spool.download(pool)
        if bank is None or bank.version != version:
            bank = Download(version, "", 0)
        while not bank.size or bank.have < bank.size:
            bank = self._fetch_part(bank)
        payload = self._spool.arrived()
        if hashlib.sha256(payload).hexdigest() != bank.sha256:
            self._spool.abandon()
            raise FederationError(Refusal.BAD_HASH, f"bank {version}: the bytes are not those that were announced")
        try:
            found = self._member.check_bank(payload, version, self._limits)
        except FederationError:
            self._spool.abandon()
            raise
        self._spool.keep_bank(pool, version, payload)
        return found

    def _send_chunk(self, chunk: Chunk, body: bytes) -> Reply:
        began = time.monotonic()
        try:
            reply, _ = self._ask(chunk, body)
        except LinkDownError:
            self._pace.lost()
            raise
        self._pace.arrived(len(body), time.monotonic() - began)
        self._count("bytes_sent", len(body))
        return reply

    def _fetch_part(self, bank: Download) -> Download:
        fetch = build(
            Fetch,
            id=next(self._ids),
            embedding_id=self._member.embedding_id,
            product=self._member.product,
            version=bank.version,
            offset=bank.have,
        )
        reply, body = self._ask(fetch)
        if isinstance(reply, Nothing):
            self._spool.abandon()
            raise FederationError(Refusal.BUSY, f"bank {bank.version} is not there any more; the newest is asked for")
        if not isinstance(reply, Part):
            raise self._unexpected(reply)
        if reply.size > self._limits.max_bytes:
            raise FederationError(Refusal.TOO_LARGE, f"bank {bank.version}: {reply.size} bytes are over the limit here")
        if not bank.size:
            bank = Download(bank.version, reply.sha256, reply.size)
        if (reply.version, reply.sha256, reply.size, reply.offset) != (bank.version, bank.sha256, bank.size, bank.have):
            self._spool.abandon()
            raise FederationError(Refusal.BAD_HASH, f"bank {bank.version}: another one was sent; it is fetched anew")
        self._count("bytes_received", len(body))
        return self._spool.take_part(self._member.pool, bank, body)

    def _ask(self, message: Request, body: bytes = b"") -> tuple[Reply, bytes]:
        frames = self._connection.request(encode_message(message, body))
        while True:
            try:
                reply, answer = parse_reply(frames)
            except FederationError as error:
                raise LinkDownError(LinkKind.UNREACHABLE, f"the aggregator's answer: {error}") from error
            if reply.id == message.id or (isinstance(reply, Refused) and not reply.id):
                break
            frames = self._connection.receive()
        if isinstance(reply, Refused):
            raise FederationError(reply.refusal, reply.reason)
        return reply, answer

    @staticmethod
    def _unexpected(reply: Reply) -> LinkDownError:
        return LinkDownError(LinkKind.UNREACHABLE, f"the aggregator answers {reply.kind}, which was not asked")
