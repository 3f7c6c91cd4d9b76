"""EvidenceStore: evidence as folders on disk, whole or not at all, under a limit of bytes, the oldest out first.

It must not know what the files show.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import stat
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from edge.errors import EvidenceError
from edge.evidence.names import RECORD, camera_folder, check_file, check_reference, is_reference

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCRATCH = ".scratch"
FILE_MODE, FOLDER_MODE = 0o640, 0o750
# What is asked for over MQTT: a chunk in base64 stays well below the limit of a payload.
CHUNK_BYTES = 131_072
_BLOCK = 4096
_MAX_RECORD = 1_048_576


class EvidenceStore:
    """The folder of a box's evidence. One thread writes; any may read.

    Files are not synced: a sync of pictures would hold up those of the outbox on the same disk. A kill leaves whole
    evidence only; what a power cut has cost shows in the sha256 that each record holds.

    Args:
        root: the folder.
        max_bytes: of all files, in blocks of 4 KiB.
        min_free: bytes free on the disk below which the evidence does not grow.
    """

    def __init__(self, root: Path, *, max_bytes: int, min_free: int = 0) -> None:
        self._root, self._max_bytes, self._min_free = root, max_bytes, min_free
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self._numbers = itertools.count()
        self.removed = 0

    @property
    def occupied(self) -> int:
        """Bytes on disk, in blocks."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._kept)

    def open(self) -> None:
        """Make the folder, clear what a kill has left, and learn what is there.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        self._root.chmod(FOLDER_MODE)
        scratch = self._root / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=FOLDER_MODE, exist_ok=True)
        found: list[tuple[int, str, int]] = []
        for camera in _folders(self._root):
            for day in _folders(camera):
                for evidence in _folders(day):
                    reference = f"{camera.name}/{day.name}/{evidence.name}"
                    if is_reference(reference):
                        found.append((evidence.stat().st_mtime_ns, reference, _occupied(evidence)))
        found.sort()
        with self._lock:
            self._kept = OrderedDict((reference, size) for _, reference, size in found)
            self._bytes = sum(self._kept.values())
        # The limit may have been lowered.
        self._make_room(0)

    def write(self, reference: str, files: Mapping[str, bytes]) -> None:
        """Put evidence in place in one step, after the oldest has made room for it.

        Args:
            reference: its name.
            files: content by name; the record is made from them by the caller.

        Raises:
            EvidenceError: it alone is over the limit, the disk has too little free, or the reference is taken.
            OSError: the disk is full or fails; nothing of it is left.
        """
        check_reference(reference)
        size = _BLOCK + sum(_blocks(len(content)) for content in files.values())
        self._make_room(size)
        target = self._root / reference
        scratch = self._scratch()
        try:
            scratch.mkdir(parents=True)
            scratch.chmod(FOLDER_MODE)
            for name, content in files.items():
                _write_file(scratch / check_file(name), content)
            self._place(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        with self._lock:
            self._kept[reference] = size
            self._bytes += size

    def references(self, *, camera: str = "", day: str = "", limit: int = 50) -> tuple[list[tuple[str, int]], int]:
        """What is kept, newest first.

        Args:
            camera: only of this camera, by its name; of any by default.
            day: only of this day, ``yyyymmdd``.
            limit: most references to return.

        Returns:
            (reference, bytes) of at most ``limit``, and how many there are.
        """
        head = f"{camera_folder(camera)}/" if camera else ""
        with self._lock:
            newest = list(reversed(self._kept.items()))
        found = [
            (reference, size)
            for reference, size in newest
            if reference.startswith(head) and day in ("", reference.split("/")[1])
        ]
        return found[:limit], len(found)

    def describe(self, reference: str) -> dict[str, dict[str, Any]]:
        """The files of evidence: name -> ``size`` and ``sha256``.

        Raises:
            EvidenceError: it is not there (any more), or its record cannot be read.
        """
        folder = self._root / check_reference(reference)
        record = self._read(folder / RECORD, limit=_MAX_RECORD)
        try:
            files = {check_file(name): dict(entry) for name, entry in json.loads(record)["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvidenceError(f"{reference}: its record is damaged; nothing of it can be trusted") from error
        own = {"size": len(record), "sha256": hashlib.sha256(record).hexdigest()}
        return {RECORD: own, **files}

    def read(self, reference: str, file: str, *, offset: int, limit: int = CHUNK_BYTES) -> bytes:
        """A part of a file.

        Args:
            reference: of the evidence.
            file: its name.
            offset: first byte.
            limit: most bytes.

        Raises:
            EvidenceError: there is no such evidence or file, or it is shorter.
        """
        data = self._read(self._root / check_reference(reference) / check_file(file), offset=offset, limit=limit)
        if not data and offset:
            raise EvidenceError(f"{reference}/{file}: ends before byte {offset}")
        return data

    def _read(self, path: Path, *, offset: int = 0, limit: int) -> bytes:
        where = path.relative_to(self._root)
        # Names cannot lead out of the root; a link that somebody put there could.
        if path.parent.resolve() != self._root.resolve() / where.parent:
            raise EvidenceError(f"{where}: is not kept here (never, or not any more)")
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise EvidenceError(f"{where}: is not kept here (never, or not any more)") from error
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise EvidenceError(f"{where}: is no file")
            file.seek(offset)
            return file.read(limit)

    def _place(self, scratch: Path, target: Path) -> None:
        target.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        for folder in (target.parent, target.parent.parent):
            folder.chmod(FOLDER_MODE)
        try:
            scratch.rename(target)
        except OSError as error:
            if target.exists():
                # Only a clock that was set back can bring the same time and number again.
                raise EvidenceError(f"{target.relative_to(self._root)}: is there already; set the clock") from error
            raise

    def _make_room(self, size: int) -> None:
        limit = self._max_bytes
        if self._min_free:
            free = shutil.disk_usage(self._root).free
            if free - size < self._min_free:
                limit = min(limit, self._bytes)
        if size > limit:
            raise EvidenceError(
                f"{size // 1024} KiB do not fit: max_mb allows {self._max_bytes // 1024} KiB in all, and the disk has "
                f"to keep {self._min_free // 2**20} MiB free"
            )
        while self._bytes + size > limit and self._kept:
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        reference = next(iter(self._kept))
        folder = self._root / reference
        scratch = self._scratch()
        with contextlib.suppress(FileNotFoundError):
            # Out of sight in one step; a kill leaves it to be cleared at the next start.
            folder.rename(scratch)
            shutil.rmtree(scratch)
        for parent in (folder.parent, folder.parent.parent):
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()
        with self._lock:
            self._bytes -= self._kept.pop(reference)
        self.removed += 1

    def _scratch(self) -> Path:
        return self._root / SCRATCH / f"{os.getpid()}-{next(self._numbers)}"


def _write_file(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    with os.fdopen(handle, "wb") as file:
        # Whatever the umask of the service.
        os.fchmod(handle, FILE_MODE)
        file.write(content)


def _folders(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir()]


def _occupied(folder: Path) -> int:
    return _BLOCK + sum(_blocks(entry.stat().st_size) for entry in folder.iterdir() if entry.is_file())


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
