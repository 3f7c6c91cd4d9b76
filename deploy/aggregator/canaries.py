"""Canaries: patch rows of known defects and of good parts, by which the aggregator tells what an update would blind.

A file without pickle, read under caps. It must not know updates or what is concluded from canaries.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]

MOST_BYTES = 256 * 2**20
"""Of a canary file, unpacked: 200,000 rows of 256 channels."""

_TEXTS, _ROWS = ("embedding_id", "product"), ("defect", "good")
_LONGEST_TEXT = 256
_CURE = "make the canaries again"


@dataclass(frozen=True, slots=True)
class Canaries:
    """What an aggregator tries an update on.

    Attributes:
        embedding_id: 64 hex digits; the embedding space of the rows.
        product: what the rows show; empty where they show every product of the pool.
        defect: float32 [n, D], patch rows that show a defect, n >= 1.
        good: float32 [m, D], patch rows of held-out good images, m >= 1.
        threshold: distance (not squared) from the nearest row of a memory above which a patch alarms, > 0.

    Raises:
        DataError: on construction, where a field is not as said.
    """

    embedding_id: str
    product: str
    defect: Rows
    good: Rows
    threshold: float

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.embedding_id):
            raise DataError(f"canaries: embedding_id is {self.embedding_id[:80]!r}, expected 64 hex digits; {_CURE}")
        if len(self.product) > _LONGEST_TEXT:
            raise DataError(f"canaries: product has {len(self.product)} characters, at most {_LONGEST_TEXT}; {_CURE}")
        for name in _ROWS:
            rows = getattr(self, name)
            if rows.dtype != np.float32 or rows.ndim != 2 or not rows.size:  # noqa: PLR2004 (rows are a matrix)
                raise DataError(
                    f"canaries: {name} is {rows.dtype} {list(rows.shape)}, expected float32 [n, D]; {_CURE}"
                )
            if not np.isfinite(rows).all():
                raise DataError(f"canaries: {name} holds values that are not finite; {_CURE}")
        if self.defect.shape[1] != self.good.shape[1]:
            raise DataError(
                f"canaries: defect rows have {self.defect.shape[1]} channels, good ones {self.good.shape[1]}; {_CURE}"
            )
        if not (np.isfinite(self.threshold) and self.threshold > 0):
            raise DataError(f"canaries: threshold is {self.threshold}, expected a distance > 0; {_CURE}")

    @property
    def width(self) -> int:
        """D, the channels of a row."""
        return int(self.defect.shape[1])


def write_canaries(path: Path, canaries: Canaries) -> None:
    """Write canaries as an npz without pickle.

    Args:
        path: of the file; its folder exists. A file that is there is replaced.
        canaries: what to write.

    Raises:
        DataError: the file cannot be written, or would be refused when read.
    """
    rows = {name: getattr(canaries, name) for name in _ROWS}
    if sum(each.nbytes for each in rows.values()) + 2**16 > MOST_BYTES:
        raise DataError(f"{path}: canaries of more than {MOST_BYTES} bytes; take fewer rows")
    texts = {name: np.array(getattr(canaries, name)) for name in _TEXTS}
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **rows, **texts, threshold=np.float64(canaries.threshold))
    try:
        path.write_bytes(packed.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); check the folder and the free space") from error


def read_canaries(path: Path, *, most_bytes: int = MOST_BYTES) -> Canaries:
    """Read canaries.

    Args:
        path: an npz of ``embedding_id``, ``product``, ``defect``, ``good`` and ``threshold``.
        most_bytes: refused beyond it, unpacked, before anything is unpacked.

    Raises:
        DataError: the file is missing, too large, damaged or not of canaries; the message names file and field.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            fields = _unpack(archive, most_bytes)
        return Canaries(
            embedding_id=_text(fields["embedding_id"], "embedding_id"),
            product=_text(fields["product"], "product"),
            defect=_array(fields["defect"], "defect", np.dtype(np.float32), 2),
            good=_array(fields["good"], "good", np.dtype(np.float32), 2),
            threshold=float(_array(fields["threshold"], "threshold", np.dtype(np.float64), 0)),
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    # What zipfile gives for damaged archives, encrypted members and unknown compression, and a missing file.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: not a readable npz of canaries ({error}); {_CURE}") from error


def _unpack(archive: zipfile.ZipFile, most_bytes: int) -> dict[str, bytes]:
    expected = {f"{name}.npy" for name in (*_TEXTS, *_ROWS, "threshold")}
    members = archive.infolist()
    if sorted(member.filename for member in members) != sorted(expected):
        raise DataError(
            f"holds {', '.join(sorted(m.filename for m in members)[:8])}, expected {sorted(expected)}; {_CURE}"
        )
    if sum(member.file_size for member in members) > most_bytes:
        raise DataError(f"unpacks to more than {most_bytes} bytes; take fewer rows")
    fields = {}
    for member in members:
        # zipfile itself ends at the size that the directory names, and checks the sum.
        with archive.open(member) as stream:
            fields[member.filename.removesuffix(".npy")] = stream.read(member.file_size + 1)
    return fields


def _header(field: bytes, name: str) -> tuple[tuple[int, ...], np.dtype[Any], memoryview]:
    """Read a .npy header by hand, so that a shape that lies is refused before memory is taken for it."""
    stream = io.BytesIO(field)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise DataError(f"{name} is not of .npy version 1.0; {_CURE}")
        shape, fortran, kind = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError) as error:
        raise DataError(f"{name} is not a .npy array ({error}); {_CURE}") from error
    body = memoryview(field)[stream.tell() :]
    if fortran and len(shape) > 1:
        raise DataError(f"{name} is not in C order; {_CURE}")
    return shape, kind, body


def _array(field: bytes, name: str, kind: np.dtype[Any], axes: int) -> npt.NDArray[Any]:
    shape, found, body = _header(field, name)
    count = 1
    for side in shape:
        count *= side  # whole numbers of Python: a product that overflows 64 bits is seen as what it is
    if found != kind or len(shape) != axes or min(shape, default=1) < 0 or count * kind.itemsize != len(body):
        raise DataError(
            f"{name} is {found} {list(shape)} in {len(body)} bytes, expected {kind} with {axes} axes; {_CURE}"
        )
    values: npt.NDArray[Any] = np.frombuffer(body, kind).reshape(shape).copy()
    return values


def _text(field: bytes, name: str) -> str:
    shape, kind, body = _header(field, name)
    if shape != () or kind.kind != "U" or kind.itemsize != len(body) or kind.itemsize > 4 * _LONGEST_TEXT:
        raise DataError(f"{name} is {kind} {list(shape)}, expected one text; {_CURE}")
    try:
        # By hand: numpy makes a SystemError of what is no character.
        return bytes(body).decode("utf-32-be" if kind.byteorder == ">" else "utf-32-le").rstrip("\0")
    except UnicodeError as error:
        raise DataError(f"{name} is not a text ({error}); {_CURE}") from error
