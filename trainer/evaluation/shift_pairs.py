"""Paired comparison of two methods on the same rotations, with intervals that know how few sub-classes there are.

It knows figures per rotation and sub-class; it must not know methods.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from trainer.evaluation.shift_settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from trainer.evaluation.shift_report import MethodResult

COVERAGE = 0.95
"""Of the intervals."""

DRAWS = 10_000
COMPARED = ("image_auroc", "pixel_auroc", "false_positive_rate", "miss_rate")


class Comparison(BaseModel):
    """One figure of one method less another's, in one setting.

    Attributes:
        first: name of a method of the material.
        second: of another.
        setting: of both.
        figure: what is compared.
        differences: ``first`` less ``second`` in each rotation, in their order: means over its sub-classes.
        mean: of the differences.
        low: lower end of the interval of ``mean``.
        high: upper end.
        subclasses: that the interval draws from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: str
    second: str
    setting: str
    figure: str
    differences: tuple[float, ...]
    mean: float
    low: float = Field(description="2.5 % of the means when sub-classes are drawn with replacement.")
    high: float = Field(description="97.5 % of them.")
    subclasses: int


def compare_all(methods: Sequence[MethodResult], names: Sequence[str], seed: int) -> tuple[Comparison, ...]:
    """Compare every method that is named with every one named after it.

    Args:
        methods: of one material.
        names: of those to compare.
        seed: of the intervals.

    Returns:
        One entry per pair, setting and figure that both have.
    """
    of = {one.name: one for one in methods}
    pairs = combinations([of[name] for name in dict.fromkeys(names)], 2)
    found = (
        compare(first, second, setting.name, figure, seed)
        for first, second in pairs
        for setting in SETTINGS
        for figure in COMPARED
    )
    return tuple(one for one in found if one is not None)


def compare(first: MethodResult, second: MethodResult, setting: str, figure: str, seed: int) -> Comparison | None:
    """Compare two methods on the sub-classes and rotations that both have a figure for.

    A rotation's difference is the mean over its sub-classes, and all rotations count alike. The interval is a
    percentile bootstrap over sub-classes: one that is drawn counts in every rotation that judges it, since its figures
    there are not independent. What another material, or another training with the same sub-classes, would give is in
    no interval.

    Returns:
        None where they have no figure in common.
    """
    difference = _differences(first, second, setting, figure)
    if difference is None:
        return None
    low, high = interval(difference, seed)
    per_rotation = [float(value) for value in np.nanmean(difference, axis=1)]
    return Comparison(
        first=first.name,
        second=second.name,
        setting=setting,
        figure=figure,
        differences=tuple(per_rotation),
        mean=float(np.mean(per_rotation)),
        low=low,
        high=high,
        subclasses=difference.shape[1],
    )


def interval(difference: npt.NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Return the interval of a mean of rotations' means, by drawing sub-classes with replacement.

    Args:
        difference: float64 [rotations, sub-classes], NaN where a rotation does not judge a sub-class.
        seed: of the draws.

    Returns:
        Its lower and upper end; equal where there is one sub-class.
    """
    difference = difference[:, ~np.isnan(difference).all(axis=0)]
    known = ~np.isnan(difference)
    count = difference.shape[1]
    rng = np.random.default_rng((seed, count))
    weights = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
    sums, numbers = weights @ np.where(known, difference, 0.0).T, weights @ known.T.astype(np.float64)
    means = np.divide(sums, numbers, out=np.full_like(sums, np.nan), where=numbers > 0)
    # A draw may leave a rotation without a sub-class: the others speak.
    drawn = np.nanmean(means, axis=1)
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _differences(
    first: MethodResult, second: MethodResult, setting: str, figure: str
) -> npt.NDArray[np.float64] | None:
    ours, theirs = (_by_place(one, setting, figure) for one in (first, second))
    places = [place for place in ours if place in theirs]
    if not places:
        return None
    rotations, names = (sorted({place[i] for place in places}) for i in (0, 1))
    found = np.full((len(rotations), len(names)), np.nan)
    for rotation, name in places:
        found[rotations.index(rotation), names.index(name)] = ours[rotation, name] - theirs[rotation, name]
    return found


def _by_place(method: MethodResult, setting: str, figure: str) -> dict[tuple[int, str], float]:
    return {
        (rotation.rotation, one.subclass): value
        for rotation in method.rotations
        for one in rotation.subclasses
        if one.setting == setting and (value := getattr(one, figure)) is not None
    }
