"""References of evidence: what an alert carries, and the folder below the evidence's root that it names.

Pure text; whatever comes from outside passes through here before it becomes part of a path.
"""

from __future__ import annotations

import hashlib
import re
from datetime import timezone
from typing import TYPE_CHECKING
from urllib.parse import quote

from edge.errors import EvidenceError

if TYPE_CHECKING:
    from edge.frames import AnomalyEvent, Verdict

RECORD = "event.json"
MAX_REFERENCE = 256
# A file name has at most 255 bytes (ext4, NAME_MAX); a camera's name may have 200 characters of four bytes each.
_MAX_CAMERA = 120
_CAMERA = re.compile(r"[A-Za-z0-9_%-][A-Za-z0-9_.%~-]{0,139}")
_DAY = re.compile(r"[0-9]{8}")
_EVIDENCE = re.compile(r"[0-9a-f]{1,32}(-[0-9]{1,20})?")
_FILE = re.compile(r"[a-z0-9][a-z0-9-]{0,30}\.(jpg|png|json|npy)")


def camera_folder(camera: str) -> str:
    """A camera's name as the name of a folder: letters, digits and ``_ - . %``, no two cameras the same."""
    name = quote(camera, safe="").replace("~", "%7E")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) > _MAX_CAMERA:
        digest = hashlib.sha256(camera.encode()).hexdigest()[:16]
        name = f"{name[:100]}~{digest}"
    return name


def event_reference(event: AnomalyEvent) -> str:
    """``<camera>/<yyyymmdd>/<event id>`` of the frame that began the event, UTC."""
    day = event.captured_at.astimezone(timezone.utc)
    return f"{camera_folder(event.camera)}/{day:%Y%m%d}/{event.event_id}"


def part_reference(verdict: Verdict) -> str:
    """``<camera>/<yyyymmdd>/<hhmmssffffff>-<frame number>``: numbers start anew with the box, times do not."""
    moment = verdict.captured_at.astimezone(timezone.utc)
    return f"{camera_folder(verdict.camera)}/{moment:%Y%m%d}/{moment:%H%M%S%f}-{verdict.camera_seq}"


def is_reference(text: str) -> bool:
    """Whether a text has the form of a reference; such a text is a path of three names, none of them ``..``."""
    parts = text.split("/")
    return (
        len(parts) == 3  # noqa: PLR2004 (camera, day, evidence)
        and all(rule.fullmatch(part) for rule, part in zip((_CAMERA, _DAY, _EVIDENCE), parts, strict=True))
    )


def check_reference(text: str) -> str:
    """A reference, returned as it came.

    Raises:
        EvidenceError: it does not have the form of one.
    """
    if not is_reference(text):
        raise EvidenceError(f"reference {text[:80]!r}: write it as in an alert, <camera>/<yyyymmdd>/<event>")
    return text


def check_file(name: str) -> str:
    """The name of a file of evidence, returned as it came.

    Raises:
        EvidenceError: no such file can be part of evidence.
    """
    if not _FILE.fullmatch(name):
        raise EvidenceError(f"file {name[:80]!r}: no file of evidence has such a name; `event.json` lists them")
    return name
