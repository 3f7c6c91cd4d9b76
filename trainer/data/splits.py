"""Set good images aside for calibration, whole groups together, of all images or of every sub-class.

It knows groups and names; it must not open a file.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.data.folder import Sample


_LEAST_FIT = 2
"""Images of a sub-class that are left to learn from."""


class Holdout(NamedTuple):
    """Two disjoint parts of a set, each in the order of the input.

    Attributes:
        fit: to learn from; never empty.
        holdout: to calibrate with; never empty.
        by_group: whether groups were kept whole; False when there was one group only (or a sub-class had no more to
            give) and images had to be split.
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


def split_subclasses(samples: Sequence[Sample], fraction: float, seed: int, minimum: int) -> Holdout:
    """Set good images of every sub-class aside, whole groups together, across sub-classes too.

    Of each sub-class of at least 3 images, at least one is held out and two are left. It aims at ``fraction`` of each,
    and at its part of ``minimum``; at most half. A sub-class whose groups allow none is split by image.

    Args:
        samples: at least 2; the sub-class is the ``condition``.
        fraction: of the images to hold out, in (0, 1).
        seed: the same seed gives the same parts.
        minimum: images wanted on hold-out in all even if ``fraction`` gives fewer, >= 1.

    Returns:
        The two parts, both non-empty; those of :func:`split_holdout` where all images are of one sub-class, or no
        sub-class has 3.

    Raises:
        DataError: fewer than 2 images.
        ValueError: ``fraction`` or ``minimum`` is out of range.
    """
    sizes = Counter(sample.condition for sample in samples)
    if len(sizes) < 2 or max(sizes.values()) <= _LEAST_FIT:  # noqa: PLR2004
        return split_holdout(samples, fraction, seed, minimum)
    if not 0 < fraction < 1 or minimum < 1:
        raise ValueError(f"fraction {fraction} must be in (0, 1) and minimum {minimum} at least 1")
    groups: dict[str, list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda i: samples[i].name):
        groups.setdefault(samples[index].group, []).append(index)
    random, held = np.random.default_rng(seed), set[int]()
    by_group = True
    for subclass, size in sorted(sizes.items()):
        least = min(-(-minimum // len(sizes)), size // 2)
        aim = min(max(round(fraction * size), least), size // 2, size - _LEAST_FIT)
        own = [index for index in range(len(samples)) if samples[index].condition == subclass]
        order = random.permutation(sorted({samples[index].group for index in own}))
        for most in (1.5 * aim, size):
            for name in order:
                taken = sum(index in held for index in own)
                if taken >= max(aim, 1) or (most == size and taken):
                    break
                shares = Counter(samples[index].condition for index in groups[name])
                if taken + shares[subclass] <= most and _leaves_enough(samples, held, groups[name], sizes):
                    held.update(groups[name])
        if aim > 0 and not any(index in held for index in own):
            by_group = False
            held.update(own[position] for position in random.permutation(len(own))[:aim])
    return Holdout(
        fit=tuple(sample for index, sample in enumerate(samples) if index not in held),
        holdout=tuple(samples[index] for index in sorted(held)),
        by_group=by_group,
    )


def _leaves_enough(samples: Sequence[Sample], held: set[int], more: Sequence[int], sizes: Counter[str]) -> bool:
    """Whether every sub-class that loses images keeps enough to learn from, and no image is held already."""
    if held & set(more):
        return False
    gone = Counter(samples[index].condition for index in (*held, *more))
    return all(sizes[name] - gone[name] >= _LEAST_FIT for name in {samples[index].condition for index in more})
