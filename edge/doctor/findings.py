"""Finding: what one check saw. It must not know any check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from edge.capture.settings import redact
from edge.errors import LinewardError


class Level(str, Enum):
    """``fail``: a box would not do its work; ``warn``: it would, and somebody should know; ``ok``."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw of one thing.

    Attributes:
        check: its name, such as ``camera``.
        subject: of what, such as a camera's name; may be empty.
        level: how bad it is.
        text: what was seen, for people.
        cure: what to do; empty where nothing is to be done.
        figures: what was measured, as JSON values.
    """

    check: str
    subject: str
    level: Level
    text: str
    cure: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"level": self.level.value}

    @property
    def line(self) -> str:
        """The finding in one line."""
        what = f"{self.check} {self.subject}".strip()
        cure = f"  -> {self.cure}" if self.cure else ""
        return f"{self.level.value:4}  {what}: {self.text}{cure}"


Check = Callable[[], Iterator[Finding]]


def fine(check: str, subject: str, text: str, **figures: Any) -> Finding:  # noqa: ANN401 (JSON)
    """All is well."""
    return Finding(check, subject, Level.OK, text, figures=figures)


def doubt(check: str, subject: str, text: str, cure: str, **figures: Any) -> Finding:  # noqa: ANN401 (JSON)
    """A box would work, and somebody should know."""
    return Finding(check, subject, Level.WARN, text, cure, figures)


def wrong(check: str, subject: str, text: str, cure: str, **figures: Any) -> Finding:  # noqa: ANN401 (JSON)
    """A box would not do its work."""
    return Finding(check, subject, Level.FAIL, text, cure, figures)


def of_error(check: str, subject: str, error: LinewardError) -> Finding:
    """An error of ours as a finding: what follows its last semicolon is the cure."""
    text, _, cure = redact(str(error)).rpartition("; ")
    return wrong(check, subject, text or cure, cure if text else "see the message")


def isolated(check: str, subject: str, look: Check) -> Iterator[Finding]:
    """Yield what a check finds; one that breaks down is a finding itself and spoils no other."""
    try:
        yield from look()
    except LinewardError as error:
        yield of_error(check, subject, error)
    except Exception as error:  # noqa: BLE001 (a check's rim: the others still have something to say)
        yield wrong(
            check,
            subject,
            f"the check broke down: {redact(f'{type(error).__name__}: {error}')}",
            "report this as a defect",
        )
