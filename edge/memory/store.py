"""The memory's files: what judges and what was learned, replaced whole or not at all, put aside where damaged.

One folder per bundle, so that another bundle begins afresh and an earlier one goes on. It must not know what is tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.bundle import CalibrationScores
from edge.durable_files import rename_durably, replace_file
from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]
    Arrays = dict[str, npt.NDArray[Any]]

SCHEMA = 1
MAX_FILE_BYTES = 512 * 2**20
_HEADER = "header"
_COUNTER = "version"


@dataclass(frozen=True, slots=True)
class MemoryInForce:
    """A memory that judges, with the scores that its thresholds are made from.

    Attributes:
        version: counts the box's switches under this bundle, >= 1.
        fleet_version: of the fleet's memory inside, 0 for none.
        local: float32 [R, D], the box's own rows.
        fleet: float32 [R', D], the fleet's rows; None where no fleet's memory is inside.
        calibration: what images declared good score against it.
        drift: (UTC seconds, drift) of the memories in force lately, this one included; see
            :class:`~edge.memory.drift.DriftBudget`.
    """

    version: int
    fleet_version: int
    local: Rows
    fleet: Rows | None
    calibration: CalibrationScores
    drift: tuple[tuple[int, float], ...] = ()


class MemoryStore:
    """The files of one bundle, precision and embedding.

    Args:
        folder: of all memories of the box; made if missing.
        bundle_id: 64 hex digits.
        embedding_id: 64 hex digits; rows of another are refused.
        precision: rows of two precisions are never mixed, so each has its files.
    """

    def __init__(self, folder: Path, *, bundle_id: str, embedding_id: str, precision: str) -> None:
        self._folder = folder / bundle_id[:16]
        self._identity = {"schema": SCHEMA, "bundle": bundle_id, "embedding": embedding_id}
        self._in_force = self._folder / f"in_force-{precision}.npz"
        self._learned = self._folder / f"learned-{precision}.npz"

    def next_version(self, present: int) -> int:
        """Return a version that was never given for this bundle, whatever file was lost; nothing is written.

        Args:
            present: the version in force.
        """
        try:
            counted = int((self._folder / _COUNTER).read_text(encoding="ascii"))
        except (OSError, ValueError):
            counted = 0
        return max(counted, present) + 1

    def read_in_force(self) -> MemoryInForce | None:
        """Return the memory that judged last, None where there was none.

        Raises:
            DataError: the file is damaged or of another embedding.
        """
        if not self._in_force.exists():
            return None
        header, arrays = self._read(self._in_force)
        try:
            return MemoryInForce(
                version=_positive(header["version"]),
                fleet_version=int(header["fleet_version"]),
                local=_matrix(arrays["local"]),
                fleet=_matrix(arrays["fleet"]) if "fleet" in arrays else None,
                calibration=_calibration(arrays),
                drift=tuple((int(when), float(drift)) for when, drift in header["drift"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self._in_force}: does not hold a memory ({error})") from error

    def write_in_force(self, memory: MemoryInForce) -> None:
        """Put a memory in the place of the last one; on disk when this returns.

        Raises:
            OSError: it cannot be written; the last one stays.
        """
        arrays: Arrays = {
            "local": memory.local,
            "scores": memory.calibration.scores,
            "maps": memory.calibration.maps,
            "groups": memory.calibration.groups,
        }
        if memory.fleet is not None:
            arrays["fleet"] = memory.fleet
        header = {"version": memory.version, "fleet_version": memory.fleet_version, "drift": memory.drift}
        self._folder.mkdir(parents=True, exist_ok=True)
        # First the number: if the power fails between the two, a version is skipped, not given twice.
        replace_file(self._folder / _COUNTER, str(memory.version).encode("ascii"))
        self._write(self._in_force, header, arrays)

    def read_learned(self) -> tuple[dict[str, Any], Arrays] | None:
        """Return the notes and arrays kept by :meth:`write_learned`, None where there are none.

        Raises:
            DataError: the file is damaged or of another embedding.
        """
        return self._read(self._learned) if self._learned.exists() else None

    def write_learned(self, notes: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep what was learned; on disk when this returns.

        Args:
            notes: JSON values.
            arrays: by name.

        Raises:
            OSError: it cannot be written; what was kept before stays.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(self._learned, dict(notes), dict(arrays))

    def put_in_force_aside(self) -> Path | None:
        """Rename a memory that cannot be used, so that the packed one judges; None where even that fails."""
        return _put_aside(self._in_force)

    def put_learned_aside(self) -> Path | None:
        """Rename what was learned and cannot be used; None where even that fails."""
        return _put_aside(self._learned)

    def _read(self, path: Path) -> tuple[dict[str, Any], Arrays]:
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(f"{path}: {size} bytes are no memory of a box")
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays.pop(_HEADER).tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged ({error})") from error
        if not isinstance(header, dict):
            raise DataError(f"{path}: damaged (its header is no object)")
        for name, expected in self._identity.items():
            if header.pop(name, None) != expected:
                raise DataError(f"{path}: is of another {name}")
        return header, arrays

    def _write(self, path: Path, header: dict[str, Any], arrays: Arrays) -> None:
        text = json.dumps(self._identity | header, allow_nan=False).encode()
        stored = {_HEADER: np.frombuffer(text, np.uint8), **arrays}
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **stored)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(partial, path)


def _put_aside(path: Path) -> Path | None:
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    target, serial = path.with_name(f"{path.name}.damaged-{stamp}"), 1
    while target.exists():
        serial += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}-{serial}")
    with contextlib.suppress(OSError):
        path.rename(target)
        return target
    return None


def _calibration(arrays: Arrays) -> CalibrationScores:
    scores, maps, groups = arrays["scores"], arrays["maps"], arrays["groups"]
    if scores.dtype != np.float32 or scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError("scores are not finite float32 [n]")
    if maps.dtype != np.float16 or maps.ndim != 3 or groups.dtype.kind != "U":  # noqa: PLR2004 (images, rows, columns)
        raise ValueError("maps are not float16 [n, h, w], or groups no text")
    if not len(scores) == len(maps) == len(groups):
        raise ValueError("scores, maps and groups differ in number")
    return CalibrationScores(scores=scores, maps=maps, groups=groups)


def _matrix(rows: npt.NDArray[Any]) -> Rows:
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():  # noqa: PLR2004
        raise ValueError("rows are not finite float32 [R, D]")
    return rows


def _positive(value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError("the version is not a positive integer")
    return value
