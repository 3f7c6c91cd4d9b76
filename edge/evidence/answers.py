"""What a box answers to ``cmd/evidence``: which evidence it has, its files, and their bytes in chunks.

A pure function of the store: whoever fetches asks for each chunk, so that the box keeps nothing between two questions.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from edge.errors import EvidenceError

if TYPE_CHECKING:
    from edge.alerts.command_messages import EvidenceCommand
    from edge.evidence.store import EvidenceStore

DEFAULT_LISTED = 50


def answer(store: EvidenceStore, command: EvidenceCommand) -> dict[str, Any]:
    """Fields of :class:`edge.alerts.command_messages.CommandResult`.

    Without a reference: ``detail.evidence`` lists what is kept, newest first, and ``count`` is how much there is. With
    one: ``detail.files`` has size and sha256 of each file. With a file: ``detail.data`` is a chunk in base64 that
    begins at ``detail.offset``, and ``count`` its bytes.

    Raises:
        EvidenceError: no such evidence or file; it says which.
    """
    if command.reference is None:
        found, count = store.references(
            camera=command.camera or "", day=command.day or "", limit=command.limit or DEFAULT_LISTED
        )
        listed = [{"reference": reference, "bytes": size} for reference, size in found]
        return {"ok": True, "count": count, "detail": {"evidence": listed}}
    files = store.describe(command.reference)
    if command.file is None:
        return {"ok": True, "count": len(files), "detail": {"reference": command.reference, "files": files}}
    if command.file not in files:
        raise EvidenceError(f"{command.reference}: has no file {command.file[:80]!r}; it has {', '.join(files)}")
    data = store.read(command.reference, command.file, offset=command.offset)
    detail = {
        "reference": command.reference,
        "file": command.file,
        "offset": command.offset,
        **files[command.file],
        "data": base64.b64encode(data).decode("ascii"),
    }
    return {"ok": True, "count": len(data), "detail": detail}
