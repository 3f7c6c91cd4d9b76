"""Where a box's update comes from and its bank goes to, on the box. It must not know Flower, rounds or sockets."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from edge.errors import DataError, FederationError
from edge.federation.folder_link import BANK, INVITATION, OUTCOME, UPDATE, write_whole
from edge.federation.refusals import Refusal
from edge.federation.wire import Limits, decode_bank

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the aggregator says when it asks for an update.

    Attributes:
        fleet: name of the fleet.
        rounds: number of the open round by pool (``<embedding_id>`` or ``<embedding_id>/<product>``); empty before
            the first update of all.
        max_update_bytes: what it takes.
    """

    fleet: str
    rounds: Mapping[str, int]
    max_update_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the update that a box gave.

    Attributes:
        sha256: 64 hex digits, of the update's bytes.
        counted_in_round: the round that it counts for, stored before this was said; 0 where it was refused.
        refused: why, or None.
        reason: the same for people; empty where it was taken.
    """

    sha256: str
    counted_in_round: int = 0
    refused: Refusal | None = None
    reason: str = ""


class Exchange(Protocol):
    """A box's side. Every call may come again with the same content: a message may be delivered twice."""

    def update(self, invitation: Invitation) -> bytes | None:
        """The bytes of the update to share (:func:`edge.federation.wire.encode_update`), or None for none."""

    def settle(self, outcome: Outcome) -> None:
        """Take note of what became of the update; from here on it may be dropped, unless it can be sent again."""

    def store(self, bank: bytes) -> int:
        """Keep a bank (:func:`edge.federation.wire.encode_bank`) durably and return the version that is kept."""


class FolderExchange:
    """The Flower client's side of the folder that it shares with the box, whose side is a FolderLink.

    The box writes ``update.bin`` (into a scratch file first, then renamed) and reads the rest: ``invitation.json``
    with the open rounds, ``outcome.json`` with what became of the update, ``bank.bin`` with the newest fleet memory.

    Args:
        folder: exists; on a file system with atomic rename.
        limits: what is taken from the aggregator.

    Raises:
        DataError: the folder is missing.
    """

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: not a folder; make it, or correct the node's `exchange`")
        self._folder = folder
        self._limits = limits or Limits()

    def update(self, invitation: Invitation) -> bytes | None:
        """The content of ``update.bin``; None where there is none.

        Raises:
            FederationError: ``too_large``; nothing is read.
            DataError: the folder cannot be read or written.
        """
        self._write(INVITATION, _json({**asdict(invitation), "rounds": dict(invitation.rounds)}))
        path = self._folder / UPDATE
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > invitation.max_update_bytes:
                    limit = invitation.max_update_bytes
                    raise FederationError(Refusal.TOO_LARGE, f"{path}: {size} bytes, the aggregator takes {limit}")
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error

    def settle(self, outcome: Outcome) -> None:
        """Write ``outcome.json``; the update stays, for the box may want to make the next one from what it says.

        Raises:
            DataError: the folder cannot be written.
        """
        text = {
            "sha256": outcome.sha256,
            "counted_in_round": outcome.counted_in_round,
            "refused": outcome.refused.value if outcome.refused else None,
            "reason": outcome.reason,
        }
        self._write(OUTCOME, _json(text))

    def store(self, bank: bytes) -> int:
        """Write ``bank.bin`` unless a newer bank of the same pool lies there.

        Raises:
            FederationError: the bytes are no bank; the file is as it was.
            DataError: the folder cannot be written.
        """
        new = decode_bank(bank, self._limits)
        try:
            old = decode_bank((self._folder / BANK).read_bytes(), self._limits)
        except (FileNotFoundError, FederationError):
            old = None  # a damaged file is replaced
        if old is not None and old.pool == new.pool and old.version > new.version:
            return old.version
        self._write(BANK, bank)
        return new.version

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self._folder / name, content)


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, sort_keys=True) + "\n").encode()
