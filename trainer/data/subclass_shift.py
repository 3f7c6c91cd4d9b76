"""Split a material so that some sub-classes are never trained on, and rotate until each was left out once.

It knows names, groups and digests; it must not open an image.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError
from trainer.data.subclasses import by_name, natural_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainer.data.subclasses import Material, Subclass, SubclassImage

SHOTS = (1, 5, 20)
"""Good images of an unseen sub-class that adaptation may be given."""

_LEAST_CALIBRATION = 6
"""Fewer scores say nothing about a tail; see ``edge.judgement.threshold.MIN_TAIL_SCORES``."""

_LEAST_FIT = 2


@dataclass(frozen=True)
class SubclassShiftSplit:
    """One rotation.

    No image, and no other image with the same pixels, is in two of the parts; nor is an image of a group whose images
    of an unseen sub-class are tested on.

    Attributes:
        rotation: from 0.
        trained: names of the sub-classes that are learned from.
        unseen: names of those that are not.
        fit: good images to learn from.
        calibration: held-out good images of the trained sub-classes; the threshold comes from these alone.
        seen_test: test images of the trained sub-classes, by name; those without any are absent.
        unseen_test: test images of the unseen ones, the same.
        shots: per unseen sub-class good images for adaptation, none of them tested on; ``unseen+n`` gives the first n.
        notes: what had to be left out, one sentence each.
    """

    rotation: int
    trained: tuple[str, ...]
    unseen: tuple[str, ...]
    fit: tuple[SubclassImage, ...]
    calibration: tuple[SubclassImage, ...]
    seen_test: dict[str, tuple[SubclassImage, ...]]
    unseen_test: dict[str, tuple[SubclassImage, ...]]
    shots: dict[str, tuple[SubclassImage, ...]]
    notes: tuple[str, ...] = ()


def subclass_shift_splits(
    material: Material,
    digests: Mapping[str, str],
    *,
    n_test: int | None = None,
    seed: int = 0,
    rotations: int = 5,
    calibration: float = 0.2,
) -> tuple[SubclassShiftSplit, ...]:
    """Return the rotations of a material.

    Names are sorted and permuted by the seed; each rotation leaves the next ``n_test`` out, so that every sub-class is
    left out at least once. Sub-classes without training images are unseen in every rotation; a single rotation leaves
    out those alone, if there are any. Sub-classes that follow each other in time are not permuted: each rotation
    learns from the first few and is tested on all later ones, so all but the first are left out once.

    Args:
        material: at least two sub-classes with training images.
        digests: of all its images by name.
        n_test: sub-classes to leave out at a time; None is a third, and at least as many as the rotations need.
            Time needs no such number.
        seed: of the permutation, the hold-out and the order of shots.
        rotations: >= 1; over time fewer where there are fewer stretches to learn from.
        calibration: share of each trained sub-class's images to hold out, in (0, 1); more where the threshold needs it.

    Returns:
        One split per rotation; the same for any order of the listing.

    Raises:
        DataError: too few sub-classes or images.
        ValueError: a number is out of range.
    """
    if rotations < 1 or not 0 < calibration < 1:
        raise ValueError(f"rotations {rotations} must be at least 1 and calibration {calibration} in (0, 1)")
    with_train = [one.name for one in material.subclasses if one.train]
    always = [one.name for one in material.subclasses if not one.train]
    if len(with_train) < 2:  # noqa: PLR2004
        raise DataError(f"{material.name}: {len(with_train)} sub-class with train/good; at least 2 are needed")
    if material.ordered:
        chosen = _over_time([one.name for one in material.subclasses], with_train, rotations)
    elif always and rotations == 1:
        chosen = [(with_train, always)]
    else:
        rotated = _rotated(sorted(with_train, key=natural_key), n_test, seed, rotations)
        chosen = [([name for name in with_train if name not in out], [*out, *always]) for out in rotated]
    return tuple(
        _split(material, digests, rotation, names, seed=seed, calibration=calibration)
        for rotation, names in enumerate(chosen)
    )


def _rotated(names: Sequence[str], n_test: int | None, seed: int, rotations: int) -> list[list[str]]:
    least = -(-len(names) // rotations) if rotations > 1 else 1
    count = max(least, len(names) // 3) if n_test is None else n_test
    if not least <= count < len(names):
        raise ValueError(
            f"n_test {count}: {len(names)} sub-classes in {rotations} rotations need {least} to {len(names) - 1}"
        )
    order = np.random.default_rng((seed, len(names))).permutation(len(names))
    starts = [rotation * len(names) // rotations for rotation in range(rotations)]
    return [[names[order[(start + step) % len(names)]] for step in range(count)] for start in starts]


def _over_time(order: Sequence[str], with_train: Sequence[str], rotations: int) -> list[tuple[list[str], list[str]]]:
    """Learn from the first few and test on all that come after the last of them; what lies between is left aside."""
    most = len(with_train) - (order[-1] == with_train[-1])
    counts = sorted({round(1 + k * (most - 1) / max(1, rotations - 1)) for k in range(rotations)})
    return [(list(with_train[:count]), list(order[order.index(with_train[count - 1]) + 1 :])) for count in counts]


def _split(
    material: Material,
    digests: Mapping[str, str],
    rotation: int,
    names: tuple[Sequence[str], Sequence[str]],
    *,
    seed: int,
    calibration: float,
) -> SubclassShiftSplit:
    trained, unseen = ([one for one in material.subclasses if one.name in part] for part in names)
    given = {one.name: _shots(one, digests, seed) for one in unseen}
    related = sorted(
        one.name for one in unseen if {image.group for image in given[one.name]} & {image.group for image in one.test}
    )
    shots = {image.name for images in given.values() for image in images}
    unseen_test = {one.name: tuple(image for image in one.test if image.name not in shots) for one in unseen}
    seen_test = {one.name: one.test for one in trained}
    tested = [image for part in (*seen_test.values(), *unseen_test.values()) for image in part]
    usable, notes = _usable(trained, tested, unseen_test, digests)
    fit, held, more = _hold_out(usable, seed, calibration)
    if len(fit) < _LEAST_FIT or len(held) < _LEAST_CALIBRATION:
        raise DataError(
            f"{material.name}, rotation {rotation}: {len(fit)} good images to learn from and {len(held)} to calibrate "
            f"with, of which {_LEAST_FIT} and {_LEAST_CALIBRATION} are needed; add images to train/good"
        )
    shared = {image.group for image in (*fit, *held)}
    recurring = sum(image.group in shared for part in seen_test.values() for image in part)
    if recurring:
        notes.append(f"{recurring} seen test images are of groups that training knows: `seen` flatters")
    if related:
        notes.append(
            f"sub-classes {', '.join(related)}: all good images are of groups that are tested on: `unseen+n` flatters"
        )
    return SubclassShiftSplit(
        rotation=rotation,
        trained=tuple(one.name for one in trained),
        unseen=tuple(one.name for one in unseen),
        fit=fit,
        calibration=held,
        seen_test={name: images for name, images in seen_test.items() if images},
        unseen_test={name: images for name, images in unseen_test.items() if images},
        shots=given,
        notes=(*notes, *more),
    )


def _usable(
    trained: Sequence[Subclass],
    tested: Sequence[SubclassImage],
    unseen_test: Mapping[str, Sequence[SubclassImage]],
    digests: Mapping[str, str],
) -> tuple[dict[str, list[SubclassImage]], list[str]]:
    """Return the training images of each sub-class that no test knows."""
    pixels = {digests[image.name] for image in tested}
    groups = {image.group for images in unseen_test.values() for image in images}
    usable: dict[str, list[SubclassImage]] = {}
    known: set[str] = set()
    twins = copies = relatives = 0
    for one in sorted(trained, key=lambda one: natural_key(one.name)):
        kept = usable.setdefault(one.name, [])
        for image in by_name(one.train):
            digest = digests[image.name]
            if digest in pixels:
                twins += 1
            elif image.group in groups:
                relatives += 1
            elif digest in known:
                copies += 1
            else:
                known.add(digest)
                kept.append(image)
    notes = []
    if twins:
        notes.append(f"{twins} training images left out: the same pixels are among the test images")
    if copies:
        notes.append(f"{copies} training images left out: copies of others")
    if relatives:
        notes.append(f"{relatives} training images left out: their groups are in unseen test images")
    return usable, notes


def _hold_out(
    usable: Mapping[str, Sequence[SubclassImage]], seed: int, share: float
) -> tuple[tuple[SubclassImage, ...], tuple[SubclassImage, ...], list[str]]:
    """Hold a share of every sub-class out, groups whole across sub-classes.

    A sub-class that is one group of its own has to be split by image.
    """
    members: dict[str, list[SubclassImage]] = {}
    for images in usable.values():
        for image in images:
            members.setdefault(image.group, []).append(image)
    held: set[str] = set()
    taken: Counter[str] = Counter()
    torn = []
    least = -(-_LEAST_CALIBRATION // max(1, len(usable)))
    for name in sorted(usable, key=natural_key):
        images = by_name(usable[name])
        aim = max(1, round(share * len(images)), min(least, len(images) // 2))
        groups = sorted({image.group for image in images})
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        if len(groups) == 1 and len(members[groups[0]]) == len(images):
            torn.append(name)
            held.update(images[i].name for i in rng.permutation(len(images))[: min(aim, len(images) - 1)])
            continue
        for index in rng.permutation(len(groups)):
            if taken[name] >= aim:
                break
            relatives = members[groups[index]]
            if relatives[0].name not in held and 2 * len(relatives) <= sum(map(len, usable.values())):
                held.update(image.name for image in relatives)
                taken.update(image.subclass for image in relatives)
    notes = [f"sub-classes {', '.join(torn)} are one group each: their images were split"] if torn else []
    everything = by_name(image for images in usable.values() for image in images)
    fit = tuple(image for image in everything if image.name not in held)
    return fit, tuple(image for image in everything if image.name in held), notes


def _shots(one: Subclass, digests: Mapping[str, str], seed: int) -> tuple[SubclassImage, ...]:
    """Return good images of an unseen sub-class in the order in which adaptation gets them, none tested on.

    They come from its training images, of other groups than its test images where there are any; where it has none,
    from at most half of its good test images, groups whole.
    """
    rng = np.random.default_rng((seed, zlib.crc32(one.name.encode()), 1))
    if one.train:
        pixels = {digests[image.name] for image in one.test}
        groups = {image.group for image in one.test}
        free = [image for image in by_name(one.train) if digests[image.name] not in pixels]
        free = [image for image in free if image.group not in groups] or free
        return tuple(free[i] for i in rng.permutation(len(free))[: max(SHOTS)])
    good = [image for image in by_name(one.test) if not image.anomalous]
    defective = {image.group for image in one.test if image.anomalous}
    candidates = sorted({image.group for image in good} - defective)
    chosen: list[SubclassImage] = []
    for index in rng.permutation(len(candidates)):
        of_group = [image for image in good if image.group == candidates[index]]
        if len(chosen) + len(of_group) <= min(max(SHOTS), len(good) // 2):
            chosen += of_group
    kept = {digests[image.name] for image in one.test if image not in chosen}
    return tuple(image for image in chosen if digests[image.name] not in kept)
