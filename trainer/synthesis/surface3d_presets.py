"""What a synthetic surface defect is like, as settings by name. It must not know points.

Source: 3D-PNAS (Cheng and Du, arXiv 2504.12856) for the parameters; the presets' values are ours.
"""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge.errors import UsageError


class StrengthUnit(str, Enum):
    """What a strength counts."""

    METRES = "metres"
    DIAGONAL = "diagonal"
    """Shares of the diagonal of the box around the part, along its principal directions."""
    NOISE = "noise"
    """Multiples of the scan's own noise floor (95th percentile)."""


class Sign(str, Enum):
    """Which way the surface goes; ``random`` is drawn once per sample, ``mixed`` once per region."""

    BULGE = "bulge"
    DENT = "dent"
    RANDOM = "random"
    MIXED = "mixed"


class Edge(str, Enum):
    """How the displacement begins: ``soft`` from 0 at the region's border, ``hard`` with the field's value there."""

    SOFT = "soft"
    HARD = "hard"


class Units(str, Enum):
    """What ``scale`` counts: cells along the longer ``box`` side, or per metre of ``raw`` coordinates."""

    BOX = "box"
    RAW = "raw"


class SurfaceNoise(BaseModel):
    """Parameters of a surface defect.

    Attributes:
        scale: lattice cells of the coarsest octave, along the longer side of the part.
        aspect: cells across per cell along; 8 makes narrow, long shapes.
        octaves: scales of noise.
        persistence: strength of an octave as a share of the one before.
        lacunarity: cells of an octave per cell of the one before.
        threshold: of the field in [0, 1], above which a point belongs to the defect; 0 is the whole surface.
        edge: see :class:`Edge`.
        strength: largest displacement, in ``strength_unit``.
        strength_unit: see :class:`StrengthUnit`.
        least_noise: multiples of the noise floor; a strength in shares of the diagonal is raised until points move so
            far (95th percentile of those that move).
        sign: see :class:`Sign`.
        single_region: keep one region of the field and stretch it to the full strength.
        resolution: nodes of the field along each side.
        units: see :class:`Units`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scale: float = Field(4.0, gt=0, le=1024)
    aspect: float = Field(1.0, ge=1, le=64)
    octaves: int = Field(3, ge=1, le=10)
    persistence: float = Field(0.5, gt=0, le=1)
    lacunarity: float = Field(2.0, ge=1, le=8)
    threshold: float = Field(0.6, ge=0, lt=1)
    edge: Edge = Edge.SOFT
    strength: float = Field(0.015, gt=0, le=1000)
    strength_unit: StrengthUnit = StrengthUnit.DIAGONAL
    least_noise: float = Field(4.0, ge=0, le=1000)
    sign: Sign = Sign.RANDOM
    single_region: bool = False
    resolution: int = Field(256, ge=8, le=2048)
    units: Units = Units.BOX

    @model_validator(mode="after")
    def _octaves_fit(self) -> SurfaceNoise:
        # Finer than two nodes a cell, an octave is noise of the grid and no surface.
        finest = self.scale * self.aspect * self.lacunarity ** (self.octaves - 1)
        if self.units is Units.BOX and finest > 16 * self.resolution:
            raise ValueError(f"{finest:g} cells of the finest octave do not fit a grid of {self.resolution} nodes")
        return self


PRESETS: dict[str, SurfaceNoise] = {
    "dent": SurfaceNoise(scale=3.0, octaves=1, threshold=0.7, strength=0.02, sign=Sign.DENT, single_region=True),
    "bump": SurfaceNoise(scale=3.0, octaves=1, threshold=0.7, strength=0.02, sign=Sign.BULGE, single_region=True),
    "corrosion": SurfaceNoise(scale=16.0, octaves=6, threshold=0.55, strength=0.01, sign=Sign.MIXED),
    "wear": SurfaceNoise(scale=4.0, octaves=4, threshold=0.0, strength=0.005, sign=Sign.DENT),
    "scratch": SurfaceNoise(
        scale=2.0, aspect=8.0, octaves=2, threshold=0.72, strength=0.008, sign=Sign.DENT, single_region=True
    ),
}
"""Local defects, but ``wear``, which changes the whole surface."""


def preset(name: str) -> SurfaceNoise:
    """Return the parameters of a preset.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
