"""Lay the test images of a folder out as a stream of parts, with defects at known frames.

It knows files and labels; it must not know boxes or how a stream is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError
from trainer.evaluation.replay import Span, runs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trainer.data.folder import Sample

GOOD_PER_DEFECT = 2
"""Fewest good parts between two defective ones, so that every defect can begin an event of its own."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A folder of frames, sorted by name, and what is on them.

    Attributes:
        path: the folder.
        labels: one per frame: the kind of defect, empty for a good part.
    """

    path: Path
    labels: tuple[str, ...]

    @property
    def defects(self) -> tuple[Span, ...]:
        """Frames on which each defect is in view."""
        return runs(self.labels)


def arrange(samples: Sequence[Sample], *, seed: int, limit: int = 400) -> tuple[Sample, ...]:
    """Choose and order test images: good parts in random order, single defective ones in between.

    Kinds of defects take turns, so that a short stream shows each of them. The stream begins and ends with good parts.

    Args:
        samples: labelled images.
        seed: the same seed gives the same order.
        limit: most frames, >= 3.

    Raises:
        DataError: fewer than 3 good images, or no defective one.
    """
    rng = np.random.default_rng(seed)
    good = [samples[i] for i in rng.permutation(len(samples)) if not samples[i].anomalous]
    by_label: dict[str, list[Sample]] = {}
    for index in rng.permutation(len(samples)):
        if samples[index].anomalous:
            by_label.setdefault(samples[index].label, []).append(samples[index])
    if len(good) <= GOOD_PER_DEFECT or not by_label:
        raise DataError(
            f"{len(good)} good and {sum(map(len, by_label.values()))} defective test images make no stream; put at "
            f"least {GOOD_PER_DEFECT + 1} images in test/good and one in test/<kind of defect>"
        )
    good = good[: limit - limit // (GOOD_PER_DEFECT + 1)]
    defective = _take_turns(list(by_label.values()), max(1, len(good) // GOOD_PER_DEFECT - 1))
    ends = [(turn + 1) * len(good) // (len(defective) + 1) for turn in range(len(defective))]
    ordered: list[Sample] = []
    for start, end, sample in zip([0, *ends], ends, defective, strict=False):
        ordered += [*good[start:end], sample]
    return (*ordered, *good[ends[-1] :])


def write_stream(samples: Sequence[Sample], folder: Path) -> Stream:
    """Link images into a folder whose names sort in the given order.

    Args:
        samples: in order.
        folder: new, or empty.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, sample in enumerate(samples):
            link = folder / f"{index:05d}_{sample.label}{sample.path.suffix.lower()}"
            link.symlink_to(sample.path.resolve())
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    return Stream(folder, tuple(sample.label if sample.anomalous else "" for sample in samples))


def _take_turns(kinds: list[list[Sample]], count: int) -> list[Sample]:
    """Return ``count`` samples, one of each kind in turn as long as there are any."""
    longest = max(map(len, kinds))
    return [kind[turn] for turn in range(longest) for kind in kinds if turn < len(kind)][:count]
