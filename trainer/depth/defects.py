"""Defects on canvases of good scans, as strong as asked for: what validation and the parity gate judge by.

It must not know networks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError
from trainer.synthesis.surface3d import Part, perturb
from trainer.synthesis.surface3d_presets import PRESETS, StrengthUnit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Canvases = npt.NDArray[np.float32]

LOCAL = ("dent", "bump", "scratch", "corrosion")
"""Presets that leave most of a part as it was."""
VALIDATION_STRENGTH = 8.0
"""Multiples of the noise floor."""
PLAIN_STRENGTH = 32.0
"""Multiples of the noise floor at contrast 1 of the parity gate, plain on any part."""

_LEAST_LABELLED = 12  # points: a smaller defect is one of the sensor's grains
_TRIES = 8
_SHIFT = 4  # cells


class Defects:
    """Makes defects on some good canvases, whose normals are found once.

    Args:
        canvases: float32 [n, H, W, 3], metres, NaN where invalid.

    Raises:
        DataError: a canvas has too few valid points.
    """

    def __init__(self, canvases: Canvases) -> None:
        self.canvases = canvases
        self.parts = [Part.of(canvas) for canvas in canvases]

    @property
    def noise_m(self) -> float:
        """Middle of the canvases' noise floors, metres."""
        return float(np.median([part.noise.p95 for part in self.parts]))

    def make(
        self,
        *,
        seed: int,
        repeats: int = 1,
        strength: float = VALIDATION_STRENGTH,
        presets: Sequence[str] = LOCAL,
    ) -> tuple[Canvases, npt.NDArray[np.bool_]]:
        """Put one defect on every canvas, ``repeats`` times.

        Args:
            seed: the same seed gives the same defects in the same places at every strength.
            repeats: defective copies of each canvas.
            strength: largest displacement in multiples of the canvas's noise floor.
            presets: taken in turns.

        Returns:
            float32 [repeats * n, H, W, 3] and which points were displaced, bool [repeats * n, H, W].

        Raises:
            DataError: no place for a defect was found on a canvas.
        """
        count = repeats * len(self.parts)
        made = np.empty((count, *self.canvases.shape[1:]), np.float32)
        masks = np.empty(made.shape[:3], np.bool_)
        for index in range(count):
            part = self.parts[index % len(self.parts)]
            changes = {"strength": strength, "strength_unit": StrengthUnit.NOISE}
            settings = PRESETS[presets[index % len(presets)]].model_copy(update=changes)
            for attempt in range(_TRIES):
                defect = perturb(part, settings, seed=_seed(seed, index, attempt))
                if np.count_nonzero(defect.mask) >= _LEAST_LABELLED:
                    break
            else:
                raise DataError(f"no place for a defect on canvas {index % len(self.parts)}; scan more of the part")
            made[index], masks[index] = defect.xyz, defect.mask
        return made, masks


def jittered(canvases: Canvases, count: int, seed: int) -> tuple[Canvases, npt.NDArray[np.int64]]:
    """Fill a set of good canvases up to ``count`` with copies moved by up to 4 cells and measured again.

    Each copy gets a fifth of the scatter that a row of it shows, along the line of sight, as a second scan would.

    Returns:
        float32 [max(count, n), H, W, 3], the canvases first, and the canvas that each was made of.
    """
    base = np.arange(max(count, len(canvases)), dtype=np.int64) % len(canvases)
    copies = np.array(canvases[base])
    for index in range(len(canvases), len(base)):
        rng = np.random.default_rng((seed, index))
        copies[index] = measured_again(moved(copies[index], *rng.integers(-_SHIFT, _SHIFT + 1, 2)), rng)
    return copies, base


def moved(canvas: Canvases, down: int, right: int) -> Canvases:
    """Return a canvas moved by some cells; what comes in is NaN. Points keep their metres."""
    out = np.full_like(canvas, np.nan)
    height, width = canvas.shape[:2]
    rows = slice(max(0, down), min(height, height + down)), slice(max(0, -down), min(height, height - down))
    columns = slice(max(0, right), min(width, width + right)), slice(max(0, -right), min(width, width - right))
    out[rows[0], columns[0]] = canvas[rows[1], columns[1]]
    return out


def measured_again(canvas: Canvases, rng: np.random.Generator, share: float = 0.2) -> Canvases:
    """Return a canvas with more noise along the lines of sight, by a share of what there is."""
    steps = np.abs(np.diff(canvas[..., 2], 2, axis=1))
    scatter = float(np.nanmedian(steps)) if np.isfinite(steps).any() else 0.0
    length = np.linalg.norm(canvas, axis=-1, keepdims=True)
    noise = rng.standard_normal(canvas.shape[:2]).astype(np.float32)[..., None] * np.float32(share * scatter)
    return np.asarray(canvas * (1.0 + noise / length), np.float32)


def _seed(seed: int, index: int, attempt: int) -> int:
    return int(np.random.SeedSequence((seed, index, attempt)).generate_state(1, np.uint64)[0] >> np.uint64(1))
