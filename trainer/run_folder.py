"""A run folder on disk, whatever it holds: written whole or not at all, and never over what is not a run's.

The record goes first and comes last, so that a folder which was cut off is no run.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from edge.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

RECORD = "run.json"
_WORK = ".saving-"


def write_run(path: Path, files: AbstractSet[str], write: Callable[[Path], None]) -> None:
    """Write a run folder, in place of an earlier run.

    Everything is written beside its place first, so that a disk that is full leaves an earlier run as it was.

    Args:
        path: the folder; made where it is missing, and removed again where nothing could be written.
        files: names that a run may have, :data:`RECORD` among them; those that ``write`` does not make are removed.
        write: given a folder to write the files to.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_WORK, dir=path))
        try:
            write(work)
            (path / RECORD).unlink(missing_ok=True)
            for name in (*(files - {RECORD}), RECORD):
                if (work / name).exists():
                    (work / name).replace(path / name)
                else:
                    (path / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if made:
            shutil.rmtree(path, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be written ({reason}); free space or choose --out") from error


def refuse_foreign(path: Path, files: AbstractSet[str]) -> None:
    """Make sure that a folder to save in holds nothing but what a run leaves, finished or cut off.

    Args:
        path: the folder.
        files: names that a run may have.

    Raises:
        UsageError: it is a file, or holds something else.
    """
    if not path.exists():
        return
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    foreign = sorted(name for name in names - files if not name.startswith(_WORK))
    if foreign or not path.is_dir():
        shown = ", ".join(foreign[:3])
        raise UsageError(f"--out {path}: holds {shown}, which no run wrote; choose another, nothing was written")
