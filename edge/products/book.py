"""RecipeBook: which product each camera of a box runs, kept on disk across restarts; the one owner of recipes.

It must not know who changes them nor which bundle judges.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from edge.alerts.wire import Utc  # noqa: TC001 (pydantic needs it at run time)
from edge.durable_files import replace_file
from edge.errors import StoreError
from edge.judgement.kept_file import put_damaged_aside, read_kept
from edge.products.recipes import RecipeHistory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_LOG = logging.getLogger(__name__)
RECIPES_FILE = "recipes.json"
_FORMAT: Literal["lineward.recipes/1"] = "lineward.recipes/1"


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field(max_length=200)
    since: Utc


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["lineward.recipes/1"] = Field(alias="schema")
    cameras: dict[str, _Kept]


class Recipe(NamedTuple):
    """Of one camera.

    Attributes:
        name: of the product; empty where the router chooses.
        since: from which moment of capture on, UTC.
        since_ns: the same, monotonic; before every frame where it was given in an earlier run.
    """

    name: str
    since: datetime
    since_ns: int


class RecipeBook:
    """One recipe per camera, in one file that is replaced whole. Safe to call from several threads.

    A file that is damaged is put aside and its recipes are forgotten: routers choose again, and cameras whose bundle
    has none judge nothing until somebody says what runs. ``damage`` says so.

    Args:
        path: of the file.
        clock_ns: monotonic, the one that frames are captured by.

    Attributes:
        damage: what was found damaged or unreadable at the opening; empty where nothing was.
    """

    def __init__(self, path: Path, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._path, self._clock_ns = path, clock_ns
        self._lock = threading.Lock()
        self._histories: dict[str, RecipeHistory] = {}
        self._cameras: dict[str, _Kept] = {}
        self.damage = ""
        try:
            kept = read_kept(path, _File)
        except (OSError, ValueError) as error:
            lies = put_damaged_aside(path, error)
            self.damage = f"recipes cannot be read and are forgotten, give them again: {lies}: {error}"
            _LOG.error("%s", self.damage)
        else:
            self._cameras = {} if kept is None else kept.cameras
        for camera, one in self._cameras.items():
            self.history(camera).begin_with(one.recipe)

    def history(self, camera: str) -> RecipeHistory:
        """Return the recipes of a camera, which go on changing; the same object at each call."""
        return self._histories.setdefault(camera, RecipeHistory(clock_ns=self._clock_ns))

    def of(self, camera: str) -> tuple[str, datetime | None]:
        """Return the recipe of a camera, empty for none, and when it was given; None where none ever was."""
        kept = self._cameras.get(camera)
        return (self.history(camera).now, None) if kept is None else (kept.recipe, kept.since)

    def put(self, cameras: Sequence[str], name: str) -> Recipe:
        """Have a recipe hold for frames that cameras capture from now on; on disk when this returns, and before.

        A box that is killed meanwhile comes back with the recipe that its next frame would have had.

        Args:
            cameras: one name at least.
            name: of the product; empty to let the router choose.

        Returns:
            The recipe, and when the last of the cameras has it.

        Raises:
            StoreError: it cannot be written; the ones before stay.
        """
        with self._lock:
            now = datetime.now(timezone.utc)
            kept = self._cameras | {camera: _Kept(recipe=name, since=now) for camera in cameras}
            content = _File(schema=_FORMAT, cameras=kept).model_dump_json(by_alias=True, indent=1)
            try:
                replace_file(self._path, content.encode() + b"\n")
            except OSError as error:
                raise StoreError(
                    f"{self._path}: the recipe cannot be kept ({error.strerror}); make room, or let this user write"
                ) from error
            self._cameras = kept
            since_ns = max(self.history(camera).set(name) for camera in cameras)
            return Recipe(name, datetime.now(timezone.utc), since_ns)
