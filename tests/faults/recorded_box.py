"""``lineward``, with every message that its outbox accepts noted in the history that ``LINEWARD_HISTORY`` names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge.alerts.message import Alert, Notice, VerdictMessage, parse
from edge.alerts.outbox import Draft, Outbox
from edge.cli import main
from tests.faults.history import Kind, Recorder
from tests.faults.listener import content_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.alerts.outbox import Make

VARIABLE = "LINEWARD_HISTORY"


def record(history: Path) -> None:
    """Have every outbox of this process note what it is given, and what it has accepted once append has returned."""
    recorder = Recorder(history)
    original = Outbox.append_many

    def append_many(self: Outbox, drafts: Sequence[Draft]) -> list[int]:
        made: dict[int, tuple[str, str, str]] = {}

        def noting(topic: str, make: Make) -> Make:
            def note(epoch: str, seq: int) -> bytes:
                payload = make(epoch, seq)
                message = parse(topic, payload)
                assert isinstance(message, Alert | VerdictMessage | Notice)
                made[seq] = (message.box, epoch, content_of(message))
                recorder.note(Kind.ATTEMPTED, made[seq][0], epoch=epoch, seq=seq, content=made[seq][2])
                return payload

            return note

        noted = [Draft(draft.topic, noting(draft.topic, draft.make), draft.priority) for draft in drafts]
        seqs = original(self, noted)
        for seq in seqs:
            box, epoch, content = made[seq]
            recorder.note(Kind.ENQUEUED, box, epoch=epoch, seq=seq, content=content)
        return seqs

    Outbox.append_many = append_many  # type: ignore[method-assign]


if __name__ == "__main__":
    record(Path(os.environ[VARIABLE]))
    main()
