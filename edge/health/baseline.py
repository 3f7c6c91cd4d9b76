"""Baseline: what a camera's good frames look like, learnt once and kept on disk. It must not know what a fault is."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.durable_files import replace_file
from edge.errors import DataError
from edge.health.camera_measures import brightness, share_clipped, sharpness
from edge.health.static_view import RunningEdges

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from edge.health.camera_measures import Sample

SCHEMA = 1
MAX_BYTES = 16 * 2**20
# Where fewer of the good frames have edges to measure, a frame without any is nothing unusual.
NEARLY_ALWAYS = 0.95


@dataclass(frozen=True, slots=True)
class Baseline:
    """What is normal for one camera.

    Attributes:
        frame_shape: (H, W) of its frames.
        brightness: lowest usual mean luma (5th percentile of the frames).
        clipped: highest usual share of clipped pixels (95th percentile).
        sharpness: median; NaN where too few frames had edges to measure.
        edges_always: nearly every frame had such edges, so a frame without them has lost them.
        still: complex64 [h, w], the edges that stand still, see :class:`~edge.health.static_view.StaticView`.
    """

    frame_shape: tuple[int, int]
    brightness: float
    clipped: float
    sharpness: float
    edges_always: bool
    still: npt.NDArray[np.complex64]


class Learner:
    """Makes a baseline of good frames.

    Args:
        frames: that are needed.
    """

    def __init__(self, frames: int) -> None:
        self._wanted = frames
        self._forget()

    def _forget(self) -> None:
        self._shape: tuple[int, int] | None = None
        self._brightness: list[float] = []
        self._clipped: list[float] = []
        self._sharpness: list[float] = []
        # Over all of the frames, not the last ones only: what moves slowly must not seem to stand still.
        self._edges = RunningEdges(newest=0.0)

    @property
    def frames(self) -> int:
        """Frames learnt from so far."""
        return len(self._brightness)

    def take(self, sample: Sample) -> Baseline | None:
        """Learn from a good frame; returns the baseline with the last one that is needed. Another size begins anew."""
        if self._shape != sample.frame_shape:
            self._forget()
            self._shape = sample.frame_shape
        self._brightness.append(brightness(sample)[0])
        self._clipped.append(share_clipped(sample))
        found = sharpness(sample)
        if found is not None:
            self._sharpness.append(found)
        self._edges.take(sample.thumb)
        if self.frames < self._wanted:
            return None
        measured = len(self._sharpness)
        return Baseline(
            frame_shape=self._shape,
            brightness=float(np.quantile(self._brightness, 0.05)),
            clipped=float(np.quantile(self._clipped, 0.95)),
            sharpness=float(np.median(self._sharpness)) if measured >= self._wanted // 4 else float("nan"),
            edges_always=measured >= NEARLY_ALWAYS * self._wanted,
            still=self._edges.still(),
        )


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Keep a baseline; on disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    figures = [baseline.brightness, baseline.clipped, baseline.sharpness, float(baseline.edges_always)]
    content = io.BytesIO()
    np.savez_compressed(
        content,
        schema=np.array(SCHEMA),
        frame_shape=np.array(baseline.frame_shape),
        figures=np.array(figures, np.float64),
        still=baseline.still,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def read_baseline(path: Path) -> Baseline | None:
    """Read a baseline; None where none was kept.

    Raises:
        DataError: the file is damaged or of another release.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            schema, shape, figures, still = (archive[name] for name in ("schema", "frame_shape", "figures", "still"))
        return _baseline(int(schema), shape, figures, still)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: the camera's baseline is damaged ({error}); it is learnt anew") from error


def _baseline(
    schema: int, shape: npt.NDArray[np.int64], figures: npt.NDArray[np.float64], still: npt.NDArray[np.complex64]
) -> Baseline:
    fits = shape.shape == (2,) and figures.shape == (4,) and still.ndim == 2 and still.dtype == np.complex64  # noqa: PLR2004
    if schema != SCHEMA or not fits:
        raise ValueError("it is not a baseline of this release")
    if not np.isfinite(figures[[0, 1, 3]]).all() or not np.isfinite(still).all() or np.isinf(figures[2]):
        raise ValueError("it is not finite")
    return Baseline(
        frame_shape=(int(shape[0]), int(shape[1])),
        brightness=float(figures[0]),
        clipped=float(figures[1]),
        sharpness=float(figures[2]),
        edges_always=bool(figures[3]),
        still=still,
    )
