"""Log lines of a service on stderr: for people, or one JSON object per line; with priorities where journald reads them.

It must not know what is logged; it hides the credentials of every URL, whoever wrote them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING, TextIO

from edge.capture.settings import redact

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# journald stamps and ranks each line itself.
_JOURNAL_TEXT = "%(name)s: %(message)s"
# syslog(3): 2 critical, 3 error, 4 warning, 6 informational, 7 debug.
_PRIORITY = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7
_CAMERA = "camera %s"


class LogFormat(str, Enum):
    """``text`` for people, ``json`` for collectors: one object per line."""

    TEXT = "text"
    JSON = "json"


class TextFormatter(logging.Formatter):
    """Lines for people, without credentials of URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines."""
        return redact(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ``ts`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, and what is known.

    ``camera`` is there where the line speaks of a camera: where its message begins with ``camera %s``, or where it was
    logged with ``extra={"camera": name}``. ``exception`` holds a traceback.

    Args:
        fields: in every object, such as ``site`` and ``box``.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        ts = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        found: dict[str, object] = {
            "ts": ts.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
            **self._fields,
        }
        camera = _camera(record)
        if camera:
            found["camera"] = camera
        if record.exc_info:
            found["exception"] = redact(self.formatException(record.exc_info))
        # Escaped: no character of a file name may break a line or the stream.
        return json.dumps(found)


class _Priorities(logging.Formatter):
    """Puts a priority such as ``<4>`` before each line, as sd-daemon(3) has it."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        number = next((number for level, number in _PRIORITY if record.levelno >= level), _DEBUG_PRIORITY)
        return "\n".join(f"<{number}>{line}" for line in self._inner.format(record).splitlines())


def configure_logs(
    level: int,
    *,
    form: LogFormat = LogFormat.TEXT,
    stream: TextIO | None = None,
    fields: Mapping[str, str] | None = None,
) -> None:
    """Have everything that is logged written to a stream; nothing changes where a host program has arranged its own.

    Args:
        level: the least that is written, as in :mod:`logging`.
        form: text or JSON.
        stream: stderr where None. Where journald reads it, each line begins with its priority.
        fields: in every JSON object.
    """
    stream = sys.stderr if stream is None else stream
    journal = _is_journal(stream)
    formatter: logging.Formatter
    if form is LogFormat.JSON:
        formatter = JsonFormatter(fields or {})
    else:
        formatter = TextFormatter(_JOURNAL_TEXT if journal else _TEXT)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Priorities(formatter) if journal else formatter)
    logging.basicConfig(level=level, handlers=[handler])


def _is_journal(stream: TextIO) -> bool:
    """Whether a stream is the one that JOURNAL_STREAM names by device and inode (systemd.exec(5))."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _camera(record: logging.LogRecord) -> str:
    given = getattr(record, "camera", None)
    if given is None and isinstance(record.args, tuple) and record.args and str(record.msg).startswith(_CAMERA):
        given = record.args[0]
    return "" if given is None else str(given)
