"""Who may connect: a folder with one public key for each box, read while the service runs. It must not know sockets."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from edge.errors import SettingsError
from edge.federation.keys import MAX_FILE_BYTES, PUBLIC_SUFFIX, certificate, check_box_name, check_key, read_public_key

if TYPE_CHECKING:
    from collections.abc import Mapping

REVOKED = "revoked"
_MAX_FILE_NAME = 255  # bytes, of every usual file system
_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Boxes:
    """What the folder said when it was read.

    Attributes:
        names: box by public key (Z85).
        revoked: boxes of keys that were taken back, by key.
        problems: files that count for nothing, each with its reason and cure.
    """

    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    revoked: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    problems: tuple[str, ...] = ()


def file_name(box: str) -> str:
    """Return the file that holds a box's key: its name with every unsafe character, ``/`` too, as ``%`` and hex.

    Raises:
        SettingsError: it is no box name, or too long for a file.
    """
    name = quote(check_box_name(box), safe=" ") + PUBLIC_SUFFIX
    if len(name) > _MAX_FILE_NAME:
        raise SettingsError(f"box {box!r}: the name is too long for a file; choose a shorter one")
    return name


def read_boxes(folder: Path) -> Boxes:
    """Read every key of a folder once.

    A key that stands for two boxes counts for neither: whom it belongs to is for a person to say.

    Raises:
        SettingsError: the folder cannot be read.
    """
    return Registry(folder).boxes


class Registry:
    """The folder's content, kept current by :meth:`refresh`; lookups may come from any thread.

    Args:
        folder: ``<site>%2F<box>.key`` files, and ``revoked/`` with the keys that were taken back.

    Raises:
        SettingsError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._stamps: dict[Path, _Stamp] = {}
        self._read: dict[Path, tuple[str, str] | str] = {}
        self._boxes = Boxes()
        self.refresh()

    @property
    def boxes(self) -> Boxes:
        """The last reading; immutable."""
        return self._boxes

    def enrolled(self) -> frozenset[str]:
        """Return the boxes that have a key now."""
        return frozenset(self._boxes.names.values())

    def refresh(self) -> bool:
        """Read what has changed; returns whether anything did.

        Raises:
            SettingsError: the folder cannot be read; the last reading stays in force.
        """
        with self._lock:
            stamps = self._scan()
            if stamps == self._stamps:
                return False
            for path in set(self._read) - set(stamps):
                del self._read[path]
            for path, stamp in stamps.items():
                if self._stamps.get(path) != stamp:
                    self._read[path] = self._read_file(path)
            self._stamps = stamps
            self._boxes = self._collect()
            return True

    def _scan(self) -> dict[Path, _Stamp]:
        found: dict[Path, _Stamp] = {}
        try:
            for folder in (self._folder, self._folder / REVOKED):
                if folder != self._folder and not folder.is_dir():
                    continue
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.endswith(PUBLIC_SUFFIX):
                            status = entry.stat()
                            found[Path(entry.path)] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except FileNotFoundError as error:
            if error.filename != str(self._folder):
                # Renamed between the listing and the look at it; the next refresh sees the whole.
                return self._stamps
            raise SettingsError(
                f"{self._folder}: there is no such folder; make it, and enrol boxes with: lineward aggregate enrol"
            ) from error
        except OSError as error:
            raise SettingsError(
                f"{self._folder}: cannot be read ({error.strerror}); correct its permissions"
            ) from error
        return found

    @staticmethod
    def _read_file(path: Path) -> tuple[str, str] | str:
        """Return box and key, or what is wrong."""
        try:
            found = read_public_key(path)
            if path.parent.name == REVOKED:
                return (found.box, found.key) if found.box else f"{path}: does not say whose key it was"
            box = check_box_name(unquote(path.name.removesuffix(PUBLIC_SUFFIX)))
            if file_name(box) != path.name:
                return f"{path}: is not how the key of {box!r} is named; rename it to {file_name(box)}"
            if found.box not in ("", box):
                return f"{path}: is the file of {box!r} and holds a key of {found.box!r}; enrol each box by itself"
        except SettingsError as error:
            text = str(error)
            return text if str(path) in text else f"{path}: {text}"
        return box, found.key

    def _collect(self) -> Boxes:
        problems, revoked = list[str](), dict[str, str]()
        owners: dict[str, list[str]] = {}
        for path, found in sorted(self._read.items()):
            if isinstance(found, str):
                problems.append(found)
            elif path.parent.name == REVOKED:
                revoked[found[1]] = found[0]
            else:
                owners.setdefault(found[1], []).append(found[0])
        for key, boxes in owners.items():
            if len(boxes) > 1:
                problems.append(f"{self._folder}: {' and '.join(boxes)} have one key; each box needs its own")
            elif key in revoked:
                problems.append(f"{self._folder}: the key of {boxes[0]} was revoked; make that box a new one")
        names = {key: boxes[0] for key, boxes in owners.items() if len(boxes) == 1 and key not in revoked}
        return Boxes(MappingProxyType(names), MappingProxyType(revoked), tuple(problems))


def enrol(folder: Path, box: str, key: str) -> Path:
    """Let a box connect with a key, from now on; a running service sees it within its next second.

    Args:
        folder: made if missing.
        box: ``<site>/<box>``.
        key: its public key, Z85.

    Returns:
        The file that was written. Enrolling the same pair again changes nothing.

    Raises:
        SettingsError: the name or key is invalid, the box has another key, the key belongs to another box or was
            revoked, or the folder cannot be written.
    """
    name = file_name(box)
    check_key(key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
    boxes = read_boxes(folder)
    if boxes.names.get(key) == box:
        return folder / name
    if key in boxes.names:
        raise SettingsError(f"box {box!r}: this is the key of {boxes.names[key]!r}; each box needs its own")
    if key in boxes.revoked:
        raise SettingsError(f"box {box!r}: this key of {boxes.revoked[key]!r} was revoked; make a new one on the box")
    if (folder / name).exists():
        raise SettingsError(f"box {box!r}: has another key already; revoke it first: lineward aggregate revoke {box}")
    _replace(folder / name, certificate(key, box=box))
    return folder / name


def revoke(folder: Path, box: str) -> Path:
    """Take a box's key back: no new session, and no further message of a live one.

    Returns:
        Where the key is kept, so that its use can be reported and it is never enrolled again.

    Raises:
        SettingsError: the box has no key here, or the folder cannot be written.
    """
    path = folder / file_name(box)
    if not path.exists():
        raise SettingsError(f"box {box!r}: has no key in {folder}; see: lineward aggregate status")
    key = read_public_key(path).key
    kept = folder / REVOKED / f"{hashlib.sha256(key.encode('ascii')).hexdigest()[:32]}{PUBLIC_SUFFIX}"
    try:
        kept.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{kept.parent}: cannot be made ({error.strerror}); revoke by deleting {path}") from error
    # First this file: from here on the key is refused, whatever happens to this process.
    _replace(kept, certificate(key, box=box))
    try:
        path.unlink()
        _sync(folder)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be removed ({error.strerror}); remove it") from error
    return kept


def _replace(path: Path, text: str) -> None:
    """Put a file in place in one step; a reader sees none or the whole."""
    assert len(text) <= MAX_FILE_BYTES
    scratch = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be written ({error.strerror}); correct the folder's permissions"
        ) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
