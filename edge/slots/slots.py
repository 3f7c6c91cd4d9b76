"""Slots: two folders for bundles, a link to the one that serves, and a note of what is on trial.

At every point of a change the link leads to a whole bundle. It must not know engines, cameras or brokers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.bundle import Bundle
from edge.durable_files import rename_durably, replace_file, sync_folder, sync_tree
from edge.errors import BundleError, SlotError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_LOG = logging.getLogger(__name__)
CURRENT = "current"
NAMES = ("a", "b")
NOTE = "slots.json"
_LOCK = ".lock"
_INCOMING = ".incoming-"
_OUTGOING = ".outgoing-"
_MAX_BAD = 64

Name = Literal["a", "b"]


class Trial(BaseModel):
    """A bundle that serves but has not yet shown that it can.

    Attributes:
        id: of the bundle.
        slot: where it lies.
        back_to: the slot to go back to.
        begun: when it was switched to, UTC.
        starts: starts of a box with it that have not ended in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=64, max_length=64)
    slot: Name
    back_to: Name
    begun: datetime
    starts: int = Field(0, ge=0)


class Bad(BaseModel):
    """A bundle that was taken back, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=64, max_length=64)
    reason: str = Field(max_length=1024)
    at: datetime


class _Note(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    trial: Trial | None = None
    bad: tuple[Bad, ...] = Field((), max_length=_MAX_BAD)


@dataclass(frozen=True, slots=True)
class SlotState:
    """What the slots hold.

    Attributes:
        serving: the slot that the link leads to; None before the first bundle.
        bundles: ids by slot of those that are whole; "" for a slot whose bundle is damaged.
        trial: of the serving bundle, if it has one to pass.
        bad: bundles that were taken back, the newest last.
    """

    serving: Name | None
    bundles: dict[str, str]
    trial: Trial | None
    bad: tuple[Bad, ...]


class Slots:
    """The two slots of one box: folders ``a`` and ``b``, and the link ``current`` that its settings name as bundle.

    Changes hold a lock on the folder; readers need none.

    Args:
        root: the folder; made by the first :meth:`install`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def of(cls, bundle: Path) -> Slots | None:
        """Return the slots that a settings' bundle path stands in; None where it is a plain folder."""
        return cls(bundle.parent) if bundle.name == CURRENT and (bundle.is_symlink() or not bundle.exists()) else None

    @property
    def current(self) -> Path:
        """The link that a box's settings name as its bundle."""
        return self.root / CURRENT

    def serving(self) -> Name | None:
        """Return the slot that the link leads to; None where there is no link yet.

        Raises:
            SlotError: the link leads elsewhere.
        """
        try:
            target = str(self.current.readlink())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SlotError(
                f"{self.current}: is no link ({error.strerror}); slots need a folder of their own"
            ) from error
        for name in NAMES:
            if target == name:
                return name  # type: ignore[return-value]  # mypy does not narrow to the two names
        raise SlotError(f"{self.current}: leads to {target}, not to a or b; remove the link and install a bundle")

    def state(self) -> SlotState:
        """Read and verify both slots.

        Raises:
            SlotError: the link or the note cannot be read.
        """
        note = self._note()
        bundles = {}
        for name in NAMES:
            if (self.root / name).is_dir():
                try:
                    bundles[name] = Bundle.open(self.root / name).id
                except BundleError:
                    bundles[name] = ""
        return SlotState(serving=self.serving(), bundles=bundles, trial=self._trial(note), bad=note.bad)

    def trial(self) -> Trial | None:
        """Return the trial that the serving bundle has to pass; None where it has passed.

        Raises:
            SlotError: the link or the note cannot be read.
        """
        return self._trial(self._note())

    def install(
        self, source: Path, *, examine: Callable[[Path, Path | None], None], allow_bad: bool = False
    ) -> Trial | None:
        """Copy a bundle into the free slot, examine it there, and switch to it on trial.

        Args:
            source: folder of the bundle; it stays as it is.
            examine: called with the copy and the bundle that serves now; what it raises leaves all as it was.
            allow_bad: take a bundle that was taken back before.

        Returns:
            The trial; None where nothing served before, so that there is nothing to go back to.

        Raises:
            BundleError: the source or its copy is damaged.
            SlotError: it serves already, was taken back before, another trial is on, another change is under way, or
                the disk refuses.
        """
        wanted = Bundle.open(source)
        with self._locked():
            note, serving = self._note(), self.serving()
            trial = self._trial(note)
            if trial is not None:
                raise SlotError(f"{self.root}: bundle {trial.id[:12]} is on trial; confirm it or roll it back first")
            if not allow_bad and any(bad.id == wanted.id for bad in note.bad):
                reason = next(bad.reason for bad in reversed(note.bad) if bad.id == wanted.id)
                raise SlotError(
                    f"{source}: was taken back before ({reason}); export a better one, or insist with --force"
                )
            if serving is not None and self._id(serving) == wanted.id:
                raise SlotError(f"{source}: serves already")
            target: Name = "b" if serving == "a" else "a"
            incoming = self._copy(source)
            try:
                _check_same(Bundle.open(incoming), wanted)
                examine(incoming, None if serving is None else self.root / serving)
            except BaseException:
                shutil.rmtree(incoming, ignore_errors=True)
                raise
            self._place(incoming, target)
            begun = datetime.now(timezone.utc)
            trial = None if serving is None else Trial(id=wanted.id, slot=target, back_to=serving, begun=begun)
            # The note first: a trial of a bundle that does not serve yet means nothing, a switch without a trial
            # could not be taken back.
            self._write(note.model_copy(update={"trial": trial}))
            self._switch(target)
            return trial

    def confirm(self) -> str | None:
        """End the trial: the serving bundle stays. Returns its id; None where none was on trial.

        Raises:
            SlotError: as :meth:`install`.
        """
        with self._locked():
            note = self._note()
            trial = self._trial(note)
            if note.trial is not None:
                self._write(note.model_copy(update={"trial": None}))
            return None if trial is None else trial.id

    def roll_back(self, reason: str) -> str:
        """Go back to the other slot, and remember the bundle that served as bad.

        Args:
            reason: why, for people.

        Returns:
            Id of the bundle that serves now.

        Raises:
            SlotError: the other slot holds no whole bundle, or as :meth:`install`.
        """
        with self._locked():
            note, serving = self._note(), self.serving()
            if serving is None:
                raise SlotError(f"{self.root}: nothing serves; install a bundle")
            back: Name = "b" if serving == "a" else "a"
            try:
                found = Bundle.open(self.root / back).id
            except BundleError as error:
                raise SlotError(f"{self.root}: there is nothing to go back to ({error}); install a bundle") from error
            now = datetime.now(timezone.utc)
            bad = [*note.bad, Bad(id=self._id(serving), reason=reason[:1024], at=now)]
            # The switch first: were the trial forgotten before it, a power cut would leave the bad bundle confirmed.
            self._switch(back)
            self._write(_Note(bad=tuple(bad[-_MAX_BAD:])))
            _LOG.warning("%s: went back to bundle %s: %s", self.root, found[:12], reason)
            return found

    def count_start(self, by: int) -> int:
        """Count a start (+1) or an end in order (-1) of a box whose bundle is on trial; returns the count.

        Raises:
            SlotError: as :meth:`install`.
        """
        with self._locked():
            note = self._note()
            trial = self._trial(note)
            if trial is None:
                return 0
            starts = max(0, trial.starts + by)
            self._write(note.model_copy(update={"trial": trial.model_copy(update={"starts": starts})}))
            return starts

    def _trial(self, note: _Note) -> Trial | None:
        """A trial counts while its bundle serves; a note from before a switch that never came does not."""
        return note.trial if note.trial is not None and note.trial.slot == self.serving() else None

    def _id(self, name: str) -> str:
        try:
            return Bundle.open(self.root / name).id
        except BundleError:
            # Damaged: it has no id any more, and is certainly not the one that is asked for.
            return "0" * 64

    def _copy(self, source: Path) -> Path:
        incoming = self.root / f"{_INCOMING}{secrets.token_hex(4)}"
        try:
            shutil.copytree(source, incoming, copy_function=shutil.copyfile)
            sync_tree(incoming)
        except (OSError, shutil.Error) as error:
            shutil.rmtree(incoming, ignore_errors=True)
            raise SlotError(f"{self.root}: the bundle cannot be copied ({error}); free space there") from error
        return incoming

    def _place(self, incoming: Path, target: Name) -> None:
        place = self.root / target
        outgoing = self.root / f"{_OUTGOING}{secrets.token_hex(4)}"
        with self._disk_errors():
            if place.exists():
                rename_durably(place, outgoing)
            rename_durably(incoming, place)
        shutil.rmtree(outgoing, ignore_errors=True)

    def _switch(self, target: Name) -> None:
        link = self.root / f".{CURRENT}-{secrets.token_hex(4)}"
        with self._disk_errors():
            link.symlink_to(target)  # relative, so that the folder may be moved
            rename_durably(link, self.current)

    def _note(self) -> _Note:
        path = self.root / NOTE
        try:
            return _Note.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Note()
        except (OSError, ValidationError) as error:
            raise SlotError(
                f"{path}: cannot be read ({type(error).__name__}); remove it, no bundle depends on it"
            ) from error

    def _write(self, note: _Note) -> None:
        content = json.dumps(note.model_dump(mode="json"), indent=1).encode()
        with self._disk_errors():
            replace_file(self.root / NOTE, content)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SlotError(
                f"{self.root}: cannot be changed ({error.strerror}); see its space and permissions"
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock, with what a killed change left behind cleared away."""
        with self._disk_errors():
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SlotError(f"{self.root}: another change is under way; try again when it has ended") from error
            self._clear()
            yield
        finally:
            os.close(handle)

    def _clear(self) -> None:
        for path in self.root.iterdir():
            if path.name.startswith((_INCOMING, _OUTGOING)):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_symlink() and path.name.startswith(f".{CURRENT}-"):
                path.unlink(missing_ok=True)
        with self._disk_errors():
            sync_folder(self.root)


def _check_same(copy: Bundle, wanted: Bundle) -> None:
    if copy.id != wanted.id:
        raise SlotError(f"{wanted.path}: changed while it was copied; install it again")
