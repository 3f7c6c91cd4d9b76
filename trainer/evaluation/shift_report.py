"""What the sub-class shift protocol found: the published JSON, and its summary.

It must not know where images come from nor how they were judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from trainer.evaluation.shift_pairs import Comparison  # noqa: TC001 (pydantic reads it at run time)
from trainer.evaluation.shift_settings import SEEN, SETTINGS, UNSEEN, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FIGURES = ("image_auroc", "pixel_auroc", "aupro", "false_positive_rate", "miss_rate")
RANKING = FIGURES[:3]
"""Figures for which a drop from seen to unseen is taken as a share."""

SCHEMA_VERSION = 2
"""2: settings are defined in the report and tell what adapted; `unseen+n` of 1 is `unseen+n rows`; comparisons."""

HARD_AUROC, HARD_FALSE_POSITIVES = 0.05, 0.20
"""A shift is real where a detector loses so much I-AUROC, or so many more good images are called defective."""


class _Published(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SubclassFigures(_Published):
    """One sub-class in one setting of one rotation; None where a figure is undefined (no masks, one class only)."""

    subclass: str
    setting: str = Field(description="Name of one of the report's settings.")
    n_good: int
    n_defective: int
    image_auroc: float | None
    pixel_auroc: float | None = Field(description="Pooled over all pixels of the sub-class, maps as they are.")
    aupro: float | None = Field(description="To a false-positive rate of 0.3.")
    false_positive_rate: float | None = Field(description="Share of good images at or above the frozen threshold.")
    miss_rate: float | None = Field(description="Share of defective images below the frozen threshold.")


class RotationResult(_Published):
    """One training and all that was judged by it."""

    rotation: int
    trained: tuple[str, ...]
    unseen: tuple[str, ...]
    n_fit: int
    n_calibration: int
    n_calibration_groups: int
    threshold: float
    threshold_method: str
    budget_supported: bool
    pooling_cells: int
    embedding_id: str = Field(description="sha256 of trunk, projection, preprocessing and numerics (torch, float32).")
    subclasses: tuple[SubclassFigures, ...]
    notes: tuple[str, ...] = ()


class Spread(_Published):
    """A figure over the rotations: each rotation's plain mean over sub-classes."""

    mean: float
    min: float
    max: float
    std: float | None = Field(description="Sample deviation; None for a single rotation.")
    rotations: int


class MethodResult(_Published):
    """One method, or one variant of it, on one material.

    Attributes:
        name: as it was asked for, with what differs from the preset.
        method: from the registry.
        config: its settings; those that are taken once for every sub-class, of one.
        settings: figure by setting and name; absent where undefined.
        drop: (seen - setting) / seen by setting and name of a ranking figure, over rotations.
        shift_is_real: whether seen to unseen cost ``HARD_AUROC`` or ``HARD_FALSE_POSITIVES``; None where undefined.
        unavailable: settings that the method has no figures for, and why.
    """

    name: str
    method: str
    config: dict[str, Any]
    rotations: tuple[RotationResult, ...]
    settings: dict[str, dict[str, Spread]]
    drop: dict[str, dict[str, Spread]]
    shift_is_real: bool | None
    unavailable: dict[str, str]


class MaterialResult(_Published):
    """One material.

    Attributes:
        data_sha256: of names, labels, groups, pixels and masks of every image.
        subclasses: images per sub-class: train, good and defective.
        ordered: whether sub-classes follow each other in time.
        comparisons: paired, of what was asked to be compared.
    """

    material: str
    data_sha256: str
    subclasses: dict[str, dict[str, int]]
    ordered: bool
    methods: tuple[MethodResult, ...]
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


class ShiftReport(_Published):
    """The whole: the same input and seed give the same bytes on one machine."""

    schema_version: int = SCHEMA_VERSION
    protocol: str = "texture-ad"
    data: str = Field(description="The folder, or `generated`.")
    generated: bool
    seed: int
    rotations: int
    settings: tuple[Setting, ...] = SETTINGS
    alpha: float
    preset: str
    trunk: str
    trunk_sha256: str
    preprocessing: dict[str, Any]
    versions: dict[str, str]
    materials: tuple[MaterialResult, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the JSON, UTF-8, ending in a newline."""
        return self.model_dump_json(indent=1) + "\n"


def summarise(
    name: str,
    method: str,
    config: dict[str, Any],
    rotations: Sequence[RotationResult],
    unavailable: dict[str, str],
) -> MethodResult:
    """Take means over sub-classes, then mean, least, most and deviation over rotations."""
    found = {one.setting for rotation in rotations for one in rotation.subclasses}
    names = [setting.name for setting in SETTINGS if setting.name in found]
    settings = {
        setting: _spreads(FIGURES, lambda figure, s=setting: [_mean(rotation, s, figure) for rotation in rotations])
        for setting in names
    }
    drop = {
        setting: _spreads(RANKING, lambda figure, s=setting: [_drop(rotation, s, figure) for rotation in rotations])
        for setting in names
        if setting != SEEN
    }
    return MethodResult(
        name=name,
        method=method,
        config=config,
        rotations=tuple(rotations),
        settings=settings,
        drop=drop,
        shift_is_real=_is_real(settings.get(SEEN, {}), settings.get(UNSEEN, {})),
        unavailable=unavailable,
    )


def _mean(rotation: RotationResult, setting: str, figure: str) -> float | None:
    values = [getattr(one, figure) for one in rotation.subclasses if one.setting == setting]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _drop(rotation: RotationResult, setting: str, figure: str) -> float | None:
    seen, other = _mean(rotation, SEEN, figure), _mean(rotation, setting, figure)
    return None if not seen or other is None else (seen - other) / seen


def _spreads(names: Sequence[str], of: Callable[[str], list[float | None]]) -> dict[str, Spread]:
    found = {}
    for name in names:
        values = [value for value in of(name) if value is not None]
        if values:
            found[name] = Spread(
                mean=float(np.mean(values)),
                min=min(values),
                max=max(values),
                std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                rotations=len(values),
            )
    return found


def _is_real(seen: dict[str, Spread], unseen: dict[str, Spread]) -> bool | None:
    checks = []
    if "image_auroc" in seen and "image_auroc" in unseen:
        checks.append(seen["image_auroc"].mean - unseen["image_auroc"].mean >= HARD_AUROC)
    if "false_positive_rate" in seen and "false_positive_rate" in unseen:
        rise = unseen["false_positive_rate"].mean - seen["false_positive_rate"].mean
        checks.append(rise >= HARD_FALSE_POSITIVES)
    return any(checks) if checks else None
