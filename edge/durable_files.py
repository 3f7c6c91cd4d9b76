"""Files that are replaced whole or not at all, and folders whose entries survive a power cut.

Knows nothing of what the files say.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place in one step; on disk when this returns.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    # One writer of this process at a time is the caller's promise; another process has another name.
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(scratch, path)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within a file system, replacing a file, a link or an empty folder; on disk when this returns.

    Raises:
        OSError: as rename(2).
    """
    os.replace(source, target)  # noqa: PTH105 (a link is replaced, not what it leads to; tests count the call)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Put the entries of a folder on disk: without it a power cut may undo a rename (fsync(2)).

    Raises:
        OSError: no such folder, or the disk fails.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Put a folder with all that is in it on disk, files before the folders that name them.

    Raises:
        OSError: a file cannot be opened, or the disk fails.
    """
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file():
            handle = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(path)
