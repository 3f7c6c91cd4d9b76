"""FolderLink: a link to the fleet by way of a folder that another program carries on from. No sockets, no threads.

For fleets whose rounds run under another engine than ours; that engine's client on the box has the other side.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edge.durable_files import replace_file
from edge.errors import DataError, FederationError
from edge.federation.connection import LinkKind, LinkState
from edge.federation.fields import Count, Digest, Positive  # noqa: TC001 (pydantic needs them at run time)
from edge.federation.refusals import Refusal
from edge.federation.wire import Limits, decode_bank, encode_update

if TYPE_CHECKING:
    from pathlib import Path

    from edge.federation.update import FleetBank, MemoryUpdate

LOG = logging.getLogger("lineward.federation")
UPDATE = "update.bin"
BANK = "bank.bin"
INVITATION = "invitation.json"
OUTCOME = "outcome.json"
_MAX_TEXT_BYTES = 2**20
_Stamp = tuple[int, int, int]
_M = TypeVar("_M", bound=BaseModel)


class InvitationFile(BaseModel):
    """``invitation.json``: what the aggregator said when it last asked; ``rounds`` has the open round by pool."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    fleet: str
    rounds: dict[str, Positive]
    max_update_bytes: Positive


class OutcomeFile(BaseModel):
    """``outcome.json``: what became of the update of this hash; ``refused`` is a code, ``reason`` is for people."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    sha256: Digest
    counted_in_round: Count
    refused: str | None
    reason: str


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place in one step, on disk before it is visible.

    Raises:
        DataError: it cannot be written; what was there is as it was.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or correct its folder") from error


class FolderLink:
    """A box's link to its fleet; see :class:`edge.federation.link.FleetLink` for what its user may expect.

    Only the newest update waits in the folder: it holds what those before it held.

    Args:
        folder: shared with the engine's client on this box.
        fleet: name of the fleet; banks of another are not taken.
        product: what this box judges.
        embedding_id: 64 hex digits; banks of another space are not taken.
        limits: of a bank.

    Raises:
        DataError: the folder is missing.
    """

    def __init__(
        self, folder: Path, *, fleet: str, product: str, embedding_id: str, limits: Limits | None = None
    ) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: not a folder; make it, writable for the box and for its SuperNode")
        self._folder = folder
        self._fleet = fleet
        self._pools = (f"{embedding_id}/{product}", embedding_id)
        self._limits = limits or Limits()
        self._stamps: dict[str, _Stamp] = {}
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._invited = 0
        self._bank: FleetBank | None = None
        self._returned = 0
        self._trouble = ""
        self._connected = False

    def start(self) -> None:
        """Take in what lies in the folder."""
        self._look()

    def stop(self, timeout: float) -> None:
        """Nothing runs, so nothing ends; what is not fetched stays in the folder."""

    def submit(self, update: MemoryUpdate) -> None:
        """Put an update into the folder, in place of the former; on disk when this returns.

        Raises:
            FederationError: it cannot be encoded.
            DataError: it cannot be stored.
        """
        self._look()
        path = self._folder / UPDATE
        self._counts["given_up"] += path.exists()
        write_whole(path, encode_update(update))

    def poll_bank(self) -> FleetBank | None:
        """Return the newest fleet memory where this object has not returned it before, else None."""
        self._look()
        if self._bank is None or self._bank.version == self._returned:
            return None
        self._returned = self._bank.version
        return self._bank

    @property
    def round(self) -> int:
        """The round that an update made now should name: the open one as far as it is known here."""
        self._look()
        return max(1, self._invited, 0 if self._bank is None else self._bank.round + 1)

    @property
    def state(self) -> LinkState:
        """``connected`` once the engine's client wrote here; ``refused`` where the aggregator serves no such box."""
        self._look()
        if self._trouble:
            return LinkState(LinkKind.REFUSED, self._trouble)
        return LinkState(LinkKind.CONNECTED if self._connected else LinkKind.CONNECTING)

    @property
    def counters(self) -> dict[str, Any]:
        """Since the start, for the status; names as in :class:`edge.federation.client.FederationClient`."""
        self._look()
        counts = {name: self._counts[name] for name in ("receipts", "banks", "given_up")}
        version = 0 if self._bank is None else self._bank.version
        return {**counts, "refused": dict(self._refusals), "round": self.round_said, "bank_version": version}

    @property
    def round_said(self) -> int:
        """The round that the aggregator said last; 0 before."""
        return self._invited

    def _look(self) -> None:
        """Take in what has changed since the last look."""
        if (found := self._changed(INVITATION)) is not None:
            self._take_invitation(found)
        if (found := self._changed(OUTCOME)) is not None:
            self._take_outcome(found)
        if (found := self._changed(BANK)) is not None:
            self._take_bank(found)

    def _changed(self, name: str) -> bytes | None:
        """The content of a file that is not the one that was read last."""
        try:
            with (self._folder / name).open("rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                if self._stamps.get(name) == stamp:
                    return None
                self._stamps[name] = stamp
                most = self._limits.max_bytes if name == BANK else _MAX_TEXT_BYTES
                return file.read(most + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            LOG.warning("%s: cannot be read (%s)", self._folder / name, error.strerror)
            return None

    def _take_invitation(self, content: bytes) -> None:
        said = _parse(InvitationFile, content, INVITATION)
        if said is not None:
            self._connected = True
            self._invited = next((said.rounds[pool] for pool in self._pools if pool in said.rounds), self._invited)

    def _take_outcome(self, content: bytes) -> None:
        said = _parse(OutcomeFile, content, OUTCOME)
        if said is None:
            return
        self._connected = True
        path = self._folder / UPDATE
        code = None if said.refused is None else _refusal(said.refused)
        if code is None:
            self._counts["receipts"] += 1
        else:
            self._refusals[code.value] += 1
        self._trouble = f"{code.value}: {said.reason}" if code in _STANDS_STILL else ""
        if code is None or code.final:
            try:
                if hashlib.sha256(path.read_bytes()).hexdigest() == said.sha256:
                    path.unlink()
            except OSError as error:  # gone already, or the next outcome says it again
                LOG.debug("%s: %s", path, error)

    def _take_bank(self, content: bytes) -> None:
        try:
            bank = decode_bank(content, self._limits)
        except FederationError as error:
            LOG.warning("%s: %s", self._folder / BANK, error)
            return
        if (bank.fleet, bank.pool in self._pools) != (self._fleet, True):
            LOG.warning("%s: a bank of fleet %s and pool %s is not taken", self._folder / BANK, bank.fleet, bank.pool)
            return
        self._counts["banks"] += 1
        self._bank = bank


_STANDS_STILL = frozenset(
    {
        Refusal.REVOKED,
        Refusal.UNKNOWN_BOX,
        Refusal.STOLEN_NAME,
        Refusal.WRONG_FLEET,
        Refusal.WRONG_EMBEDDING,
        Refusal.WRONG_PRODUCT,
    }
)


def _refusal(code: str) -> Refusal:
    try:
        return Refusal(code)
    except ValueError:
        return Refusal.OTHER


def _parse(model: type[_M], content: bytes, name: str) -> _M | None:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        LOG.warning("%s: %s: %s", name, ".".join(map(str, first["loc"])), first["msg"])
        return None
