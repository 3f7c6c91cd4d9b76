"""StaticView: the part of a camera's view that stands still, and how far it has shifted since it was learnt.

Works on small luma images; it must not know products, nor what a shift means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Field = npt.NDArray[np.complex64]
    Mask = npt.NDArray[np.bool_]

# Grey levels per thumb pixel at which a gradient counts half: light and contrast matter little above it.
HALF = 6.0
# A place stands still where its mean gradient is this much of what varies there.
STILL = 1.0
# Mean gradients below this are no edges.
EDGE = 0.25
# Weight of the newest frame in the running means: about the last 7 frames count.
NEWEST = 0.15
SETTLED = 12
# Looks in a row at which a place moves before it counts as one where something always may.
ALWAYS_MOVING = 40
# Share of all places that must be edges that stand still.
MIN_SHARE = 0.004
MAX_SHIFT = 0.3
EXACT = 1e-6


def edges(thumb: npt.NDArray[np.uint8]) -> Field:
    """Return the gradient of a small image, complex64 [h, w] (x + i y), of length at most 1."""
    luma = thumb.astype(np.float32)
    gradient = np.zeros(luma.shape, np.complex64)
    gradient.real[1:-1, 1:-1] = (luma[1:-1, 2:] - luma[1:-1, :-2]) / 2
    gradient.imag[1:-1, 1:-1] = (luma[2:, 1:-1] - luma[:-2, 1:-1]) / 2
    return gradient / (np.abs(gradient) + HALF)


class RunningEdges:
    """Mean edges of the last frames, and how much they vary from one frame to the next.

    Args:
        newest: least weight of the newest frame; all frames weigh the same until 1 / newest are there.
    """

    def __init__(self, newest: float = NEWEST) -> None:
        self._newest = newest
        self._mean: Field | None = None
        self._change: npt.NDArray[np.float32] | None = None
        self._last: Field | None = None
        self._frames = 0

    @property
    def settled(self) -> bool:
        """Whether enough frames were seen since the start."""
        return self._frames >= SETTLED

    def take(self, thumb: npt.NDArray[np.uint8]) -> None:
        """Take a frame; one of another size begins anew."""
        found = edges(thumb)
        if self._mean is None or self._last is None or self._mean.shape != found.shape:
            self._mean, self._change, self._frames = found, np.zeros(found.shape, np.float32), 1
        else:
            assert self._change is not None
            weight = np.float32(max(self._newest, 1 / (self._frames + 1)))
            step = found - self._last
            self._mean += weight * (found - self._mean)
            # Half of a difference's square is the variance, whatever drifts slowly.
            self._change += weight * ((step.real**2 + step.imag**2) / 2 - self._change)
            self._frames += 1
        self._last = found

    def moving(self) -> Mask:
        """Return where something moves, bool [h, w]."""
        assert self._mean is not None
        assert self._change is not None
        power = self._mean.real**2 + self._mean.imag**2
        return np.asarray((self._change > EDGE**2) & (power <= STILL * self._change), dtype=np.bool_)

    def still(self) -> Field:
        """Return the mean edges where they stand still, 0 elsewhere."""
        assert self._mean is not None
        assert self._change is not None
        power = self._mean.real**2 + self._mean.imag**2
        still = (power > EDGE**2) & (power > STILL * self._change)
        return np.where(still, self._mean, 0).astype(np.complex64)


@dataclass(frozen=True, slots=True)
class Shift:
    """Where the static part is now.

    Attributes:
        found: share of the learnt edges that are found again at the best shift, about 0 to 1.
        in_place: share that is found without any shift.
        x: thumb pixels to the right.
        y: thumb pixels down.
        fresh: power of edges that stand still now where none were learnt, over that of the learnt ones.
    """

    found: float
    in_place: float
    x: float
    y: float
    fresh: float


class StaticView:
    """Learnt edges that stand still, and the search for them.

    The search is a cross-correlation of complex gradient fields by Fourier transform (as in gradient correlation,
    Argyriou and Vlachos 2003, "Estimation of sub-pixel motion using gradient cross-correlation"), divided by the power
    of the learnt edges: what else is in the view does not count. Edges that move with a product cancel in the mean or
    vary, and are left out on both sides.

    Args:
        learnt: complex64 [h, w], 0 where nothing stands still, see :meth:`RunningEdges.still`.
    """

    def __init__(self, learnt: Field) -> None:
        self._moves = np.zeros(learnt.shape, np.uint8)
        self._learn(learnt)

    @property
    def observable(self) -> bool:
        """Whether enough stands still for a shift to be seen."""
        return int(np.count_nonzero(self.learnt)) >= MIN_SHARE * self.learnt.size

    def leave_out(self, moving: Mask) -> bool:
        """Forget edges where something has been moving at 40 looks in a row: a belt that stood when they were learnt.

        A camera that is moved shows motion once, not 40 times.

        Args:
            moving: bool [h, w], see :meth:`RunningEdges.moving`.

        Returns:
            Whether any were forgotten.
        """
        self._moves = np.where(moving, np.minimum(self._moves, ALWAYS_MOVING) + 1, 0).astype(np.uint8)
        always = (self._moves >= ALWAYS_MOVING) & (self.learnt != 0)
        if not always.any():
            return False
        self._learn(np.where(always, 0, self.learnt).astype(np.complex64))
        return True

    def _learn(self, learnt: Field) -> None:
        self.learnt = learnt
        self._power = float((np.abs(learnt) ** 2).sum())
        self._spectrum = np.conj(np.fft.fft2(learnt))
        self._near = cv2.dilate((learnt != 0).astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)

    def locate(self, now: Field) -> Shift:
        """Look for the learnt edges among those that stand still now.

        Args:
            now: complex64 [h, w], of the same shape.
        """
        overlap = np.fft.ifft2(self._spectrum * np.fft.fft2(now)).real / max(self._power, EXACT)
        height, width = overlap.shape
        reach_y, reach_x = max(1, int(MAX_SHIFT * height)), max(1, int(MAX_SHIFT * width))
        near = np.roll(overlap, (reach_y, reach_x), (0, 1))[: 2 * reach_y + 1, : 2 * reach_x + 1]
        row, column = np.unravel_index(int(near.argmax()), near.shape)
        return Shift(
            found=float(near[row, column]),
            in_place=float(near[reach_y - 1 : reach_y + 2, reach_x - 1 : reach_x + 2].max()),
            x=float(column - reach_x + _vertex(near[row, :], int(column))),
            y=float(row - reach_y + _vertex(near[:, column], int(row))),
            fresh=float((np.abs(now[~self._near]) ** 2).sum()) / max(self._power, EXACT),
        )


def _vertex(values: npt.NDArray[np.floating], at: int) -> float:
    """Return where a parabola through a peak and its neighbours is highest, from -0.5 to 0.5 beside the peak."""
    if not 0 < at < values.size - 1:
        return 0.0
    left, middle, right = (float(value) for value in values[at - 1 : at + 2])
    bend = left - 2 * middle + right
    return 0.0 if bend > -EXACT else float(np.clip((left - right) / (2 * bend), -0.5, 0.5))
