"""GivenThresholds: thresholds that were given to a running box, kept on disk across restarts.

It must not know how they are given nor whether they hold.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge.durable_files import replace_file
from edge.errors import StoreError
from edge.judgement.kept_file import put_damaged_aside, read_kept
from edge.judgement.threshold import RunTimeThreshold  # noqa: TC001 (pydantic needs it at run time)

if TYPE_CHECKING:
    from pathlib import Path

_LOG = logging.getLogger(__name__)
THRESHOLDS_FILE = "thresholds.json"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["lineward.thresholds/1"] = Field("lineward.thresholds/1", alias="schema")
    cameras: dict[str, RunTimeThreshold]


def place(camera: str, product: str) -> str:
    """Name a camera, or one product at it: a camera's name has no slash."""
    return f"{camera}/{product}" if product else camera


class GivenThresholds:
    """One threshold per camera and product, in one file that is replaced whole. Safe to call from several threads.

    A file that is damaged is put aside and its thresholds are forgotten: budgets decide again, and ``damage`` says so.

    Args:
        path: of the file.

    Attributes:
        damage: what was found damaged or unreadable at the opening; empty where nothing was.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cameras: dict[str, RunTimeThreshold] = {}
        self.damage = ""
        try:
            self._cameras = self._read()
        except (OSError, ValueError) as error:
            self.damage = self._put_aside(error)
            _LOG.error("%s", self.damage)

    def of(self, camera: str, product: str = "") -> RunTimeThreshold | None:
        """Return what was given for a camera, whether it holds now or not; None where nothing was.

        Args:
            camera: its name.
            product: of a bundle for several; empty for what was given without one.
        """
        with self._lock:
            return self._cameras.get(place(camera, product))

    def all(self) -> dict[str, RunTimeThreshold]:
        """Return what was given, by :func:`place`."""
        with self._lock:
            return dict(self._cameras)

    def put(self, camera: str, given: RunTimeThreshold) -> None:
        """Keep a threshold in place of the one before; on disk when this returns.

        Raises:
            StoreError: it cannot be written; the one before stays.
        """
        with self._lock:
            cameras = self._cameras | {place(camera, given.product or ""): given}
            content = _File(schema="lineward.thresholds/1", cameras=cameras).model_dump_json(by_alias=True, indent=1)
            try:
                replace_file(self._path, content.encode() + b"\n")
            except OSError as error:
                raise StoreError(
                    f"{self._path}: the threshold cannot be kept ({error.strerror}); make room, or let this user write"
                ) from error
            self._cameras = cameras

    def _read(self) -> dict[str, RunTimeThreshold]:
        kept = read_kept(self._path, _File)
        return {} if kept is None else kept.cameras

    def _put_aside(self, error: Exception) -> str:
        lies = put_damaged_aside(self._path, error)
        return f"thresholds given at run time cannot be read and are forgotten, give them again: {lies}: {error}"
