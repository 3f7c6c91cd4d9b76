"""MemoryBank: rows of normal patches and how much stands behind each. It must not know how it was made or travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MemoryBank:
    """Rows of one embedding space; distances between them are Euclidean.

    Attributes:
        rows: float32 [R, D], finite, R >= 1.
        support: float32 [R] >= 0, patches that stand behind a row; decayed, so not a whole number.
        frames: float32 [R] >= 0, distinct frames that stand behind a row, decayed likewise; a lower bound where rows
            were merged. At most ``support``.

    Raises:
        DataError: on construction, where shapes or types do not fit each other or a value is not finite or negative.
    """

    rows: Rows
    support: Rows
    frames: Rows

    def __post_init__(self) -> None:
        if self.rows.dtype != np.float32 or self.rows.ndim != 2 or not self.rows.size:  # noqa: PLR2004 (rows are a matrix)
            raise DataError(f"bank rows are {self.rows.dtype} {list(self.rows.shape)}, expected float32 [R, D]")
        for name in ("support", "frames"):
            values = getattr(self, name)
            if values.dtype != np.float32 or values.shape != (len(self.rows),):
                raise DataError(f"bank {name} is {values.dtype} {list(values.shape)}, expected float32 [{len(self)}]")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise DataError(f"bank {name} has values that are not finite and >= 0; make that bank again")
        if not np.isfinite(self.rows).all():
            raise DataError("bank rows hold values that are not finite; make that bank again")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """D, the channels of a row."""
        return int(self.rows.shape[1])
