"""EvidenceClient: lists the evidence of a box and fetches its files, from anywhere that reaches the broker.

What a box says is checked before it touches this machine's disk: names, sizes, sha256.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from typing import TYPE_CHECKING, Any, Final

from edge.alerts.topics import EVIDENCE_VERB
from edge.errors import BrokerError, EvidenceError
from edge.evidence.names import RECORD, check_file, check_reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edge.alerts.commander import Commander

MAX_FILE_BYTES: Final = 64 * 2**20
# A question is harmless to repeat: a chunk may be lost with a connection.
ATTEMPTS: Final = 3


class EvidenceClient:
    """Asks one box for its evidence.

    Args:
        commander: to that box, entered.
        timeout: seconds to wait for each answer.
    """

    def __init__(self, commander: Commander, *, timeout: float = 10.0) -> None:
        self._commander, self._timeout = commander, timeout

    def references(
        self, *, camera: str | None = None, day: str | None = None, limit: int = 50
    ) -> list[tuple[str, int]]:
        """References and bytes of what is kept, newest first.

        Args:
            camera: only of this camera.
            day: only of this day, ``yyyymmdd`` in UTC.
            limit: most to list, up to 500.

        Raises:
            EvidenceError: the box refuses, or answers with something else.
            BrokerError: no answer.
        """
        detail = self._ask({"camera": camera, "day": day, "limit": limit})
        try:
            return [(check_reference(entry["reference"]), int(entry["bytes"])) for entry in detail["evidence"]]
        except (KeyError, TypeError, ValueError) as error:
            raise EvidenceError("evidence: the answer is no list; does the box run another version?") from error

    def files(self, reference: str) -> dict[str, tuple[int, str]]:
        """Size and sha256 of each file of evidence.

        Raises:
            EvidenceError: the box does not have it, or the answer cannot be trusted.
            BrokerError: no answer.
        """
        detail = self._ask({"reference": check_reference(reference)})
        try:
            found = {check_file(name): (int(one["size"]), str(one["sha256"])) for name, one in detail["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvidenceError(f"{reference}: the answer names no files; does the box run another version?") from error
        for name, (size, _) in found.items():
            if not 0 <= size <= MAX_FILE_BYTES:
                raise EvidenceError(f"{reference}/{name}: {size} bytes are over the limit of {MAX_FILE_BYTES}")
        return found

    def fetch(self, reference: str, folder: Path, *, only: Sequence[str] = ()) -> list[Path]:
        """Fetch files of evidence into ``folder/<reference>``; each is put in place whole, once it is verified.

        Args:
            reference: of the evidence.
            folder: made if missing; files that are there already are replaced.
            only: names of the files; all by default.

        Returns:
            The files, the record first.

        Raises:
            EvidenceError: the box does not have it, or a file is not what its record says.
            BrokerError: no answer.
        """
        files = self.files(reference)
        unknown = [name for name in only if name not in files]
        if unknown:
            raise EvidenceError(f"{reference}: has no file {unknown[0]!r}; it has {', '.join(files)}")
        target = folder / reference
        written = []
        for name in sorted(only or files, key=lambda name: (name != RECORD, name)):
            content = self._content(reference, name, *files[name])
            target.mkdir(parents=True, exist_ok=True)
            scratch = target / f".{name}.{os.getpid()}"
            scratch.write_bytes(content)
            scratch.replace(target / name)
            written.append(target / name)
        return written

    def _content(self, reference: str, name: str, size: int, sha256: str) -> bytes:
        content = bytearray()
        while len(content) < size:
            detail = self._ask({"reference": reference, "file": name, "offset": len(content)})
            try:
                chunk = base64.b64decode(detail["data"], validate=True)
            except (KeyError, TypeError, binascii.Error, ValueError) as error:
                raise EvidenceError(f"{reference}/{name}: a chunk cannot be read; fetch it again") from error
            if not chunk or detail.get("offset") != len(content):
                raise EvidenceError(f"{reference}/{name}: ends after {len(content)} of {size} bytes; it is damaged")
            content += chunk
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            raise EvidenceError(f"{reference}/{name}: is not what its record says (sha256); it is damaged on the box")
        return bytes(content)

    def _ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in fields.items() if value is not None}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                result = self._commander.ask(EVIDENCE_VERB, given, timeout=self._timeout)
            except BrokerError:  # noqa: PERF203 (a few tries)
                if attempt == ATTEMPTS:
                    raise
            else:
                if not result.ok:
                    raise EvidenceError(result.reason or "the box refuses without a reason")
                return result.detail
        raise AssertionError  # the last attempt raises or returns
