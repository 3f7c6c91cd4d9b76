"""Set good images aside for calibration, whole groups together.

It knows groups and names; it must not open a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.data.folder import Sample


class Holdout(NamedTuple):
    """Two disjoint parts of a set, each in the order of the input.

    Attributes:
        fit: to learn from; never empty.
        holdout: to calibrate with; never empty.
        by_group: whether groups were kept whole; False when there was one group only and images had to be split.
    """

    fit: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    by_group: bool


def split_holdout(samples: Sequence[Sample], fraction: float, seed: int, minimum: int) -> Holdout:
    """Set good images aside, whole groups together.

    The hold-out aims at ``max(fraction * n, minimum)`` images, at most half of them. Large groups may miss the aim:
    groups are first taken up to 1.5 times the aim, and only where that leaves less than ``minimum`` may one go over.

    Args:
        samples: at least 2.
        fraction: of the images to hold out, in (0, 1).
        seed: the same seed gives the same parts.
        minimum: images wanted on hold-out even if ``fraction`` gives fewer, >= 1.

    Returns:
        The two parts, both non-empty.

    Raises:
        DataError: fewer than 2 images.
        ValueError: ``fraction`` or ``minimum`` is out of range.
    """
    if not 0 < fraction < 1 or minimum < 1:
        raise ValueError(f"fraction {fraction} must be in (0, 1) and minimum {minimum} at least 1")
    n = len(samples)
    if n < 2:  # noqa: PLR2004
        raise DataError(f"{n} good images cannot be split into training and hold-out; give at least 2")
    by_group = len({sample.group for sample in samples}) > 1
    members: dict[str, list[int]] = {}
    for index in sorted(range(n), key=lambda i: samples[i].name):
        members.setdefault(samples[index].group if by_group else samples[index].name, []).append(index)
    least = min(minimum, n // 2)
    aim = min(max(round(fraction * n), minimum), n // 2)
    names = list(members)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held: set[int] = set()
    for limit, wanted in ((1.5 * aim, aim), (n // 2, least), (n - 1, least)):
        for name in order:
            if len(held) >= wanted:
                break
            if members[name][0] not in held and len(held) + len(members[name]) <= limit:
                held.update(members[name])
    return Holdout(
        fit=tuple(sample for index, sample in enumerate(samples) if index not in held),
        holdout=tuple(samples[index] for index in sorted(held)),
        by_group=by_group,
    )
