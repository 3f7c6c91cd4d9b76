"""ThresholdVersions: counts, per camera, product and across restarts, how often the threshold in force has changed.

It must not know why one changes: what a judge says of itself is compared with what it said before.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from edge.durable_files import replace_file
from edge.judgement.given_thresholds import place
from edge.judgement.kept_file import put_damaged_aside, read_kept

if TYPE_CHECKING:
    from pathlib import Path

    from edge.judgement.threshold import Threshold
    from edge.judgement.verdicts import Judge

_LOG = logging.getLogger(__name__)
VERSIONS_FILE = "threshold_versions.json"
_FORMAT: Literal["lineward.threshold_versions/1"] = "lineward.threshold_versions/1"


class _Counted(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(ge=0, le=2**62)
    of: str = Field(pattern=r"^[0-9a-f]{32}$")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["lineward.threshold_versions/1"] = Field(_FORMAT, alias="schema")
    cameras: dict[str, _Counted]


class _Met(NamedTuple):
    """What a camera's last frame met: the same objects again mean the same threshold, without a look at its values."""

    judge: Judge
    threshold: Threshold
    version: int


class ThresholdVersions:
    """One count per camera and product, in one file that is replaced whole. Safe to call from several threads.

    A count is on disk before a message names it: a box that is killed comes back with it. Where the disk refuses it
    goes on in memory, is written with the next change or by :meth:`save`, and ``trouble`` says so.

    Args:
        path: of the file.

    Attributes:
        damage: what was found damaged at the opening; counts then begin where no earlier one can have been.
        trouble: why the counts are not on disk; empty where they are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._met: dict[str, _Met] = {}
        self._first = 0
        self._cameras: dict[str, _Counted] = {}
        self.damage = self.trouble = ""
        try:
            self._cameras = self._read()
        except (OSError, ValueError) as error:
            self.damage = self._put_aside(error)
            # Seconds since 1970 are above any count of changes, so no number is given twice.
            self._first = int(time.time())
            _LOG.error("%s", self.damage)

    def number(self, camera: str, judge: Judge) -> int:
        """Return the version of the threshold that a frame has met; in the camera's thread.

        Bundle, memory, region, mask, smallest area, who set it, its value and the levels around it make a threshold:
        where one of them is another than at the last call, it is another. That costs a write to disk.

        Args:
            camera: its name.
            judge: that has judged the frame.
        """
        # A change of product is none of the threshold: each has a count of its own.
        camera = place(camera, judge.product)
        met, threshold = self._met.get(camera), judge.threshold
        if met is not None and met.judge is judge and met.threshold is threshold:
            return met.version
        of = _digest(judge)
        with self._lock:
            known = self._cameras.get(camera)
            if known is None or known.of != of:
                version = self._first if known is None else known.version + 1
                self._cameras = self._cameras | {camera: _Counted(version=version, of=of)}
                self._write()
            else:
                version = known.version
        self._met[camera] = _Met(judge, threshold, version)
        return version

    def of(self, camera: str, product: str = "") -> int:
        """Return the version of the threshold that a camera's last frame met, in this run or an earlier one.

        Args:
            camera: its name.
            product: of a bundle for several.
        """
        known = self._cameras.get(place(camera, product))
        return self._first if known is None else known.version

    def save(self) -> None:
        """Write again what could not be written."""
        with self._lock:
            if self.trouble:
                self._write()

    def _write(self) -> None:
        content = _File(schema=_FORMAT, cameras=self._cameras).model_dump_json(by_alias=True, indent=1)
        try:
            replace_file(self._path, content.encode() + b"\n")
        except OSError as error:
            if not self.trouble:
                _LOG.error("%s: counts of threshold changes cannot be kept (%s)", self._path, error.strerror)
            self.trouble = (
                f"{self._path}: counts of threshold changes cannot be kept ({error.strerror}); make room, or let this "
                "user write"
            )
        else:
            self.trouble = ""

    def _read(self) -> dict[str, _Counted]:
        kept = read_kept(self._path, _File)
        return {} if kept is None else kept.cameras

    def _put_aside(self, error: Exception) -> str:
        lies = put_damaged_aside(self._path, error)
        return f"counts of threshold changes cannot be read, and begin at another number: {lies}: {error}"


def _digest(judge: Judge) -> str:
    values = (judge.threshold.value, judge.enter_level, judge.leave_level)
    names = (judge.bundle_id, str(judge.memory_version), judge.scope, judge.threshold_source)
    return hashlib.sha256("\n".join((*names, *(float(one).hex() for one in values))).encode()).hexdigest()[:32]
