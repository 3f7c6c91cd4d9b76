"""What fleet memories of one moment are worth: against bytes per update, and beside data that was pooled centrally.

It must not know where images come from or how a round runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy.aggregator.aggregate import AggregateSettings, aggregate
from edge.federation.update import WireRows
from edge.federation.wire import Limits, decode_update, encode_update
from edge.memory.reduce import coreset
from trainer.evaluation.fleet_box import first_bank, sampled_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from trainer.evaluation.fleet_box import BoxData, SimulatedBox
    from trainer.evaluation.fleet_judge import Judgement

    Single = npt.NDArray[np.float32]

UPDATE_ROWS = (64, 128, 256, 512, 1024)
_HALF, _FULL = 2, 4  # bytes


@dataclass(frozen=True, slots=True)
class Point:
    """What one way to share gives.

    Attributes:
        name: of the way.
        rows: most rows of an update; 0 where none are sent.
        bytes: of one box's update, measured, or computed where ``measured`` says so.
        mixed: mean over boxes of the I-AUROC on all boxes' images; NaN where it was not measured.
        own: the same on a box's own images.
        worst_own: largest drop of a box on its own images against its own memory alone.
        measured: whether the bytes were counted in messages.
    """

    name: str
    rows: int
    bytes: float
    mixed: float
    own: float
    worst_own: float
    measured: bool


def bytes_curve(
    boxes: Sequence[SimulatedBox],
    judgement: Judgement,
    settings: AggregateSettings,
    *,
    seed: int,
    sizes: Sequence[int] = UPDATE_ROWS,
) -> list[Point]:
    """Share the memories of this moment in updates of several sizes and numbers, and judge with each fleet memory.

    Args:
        boxes: honest ones, those of the judgement.
        judgement: how they judge with their own memories.
        settings: how updates are merged.
        seed: of the clustering.
        sizes: most rows of an update.
    """
    points = []
    for wire in WireRows:
        for size in sizes:
            messages = [encode_update(box.update(1, base_version=0, seed=seed, rows=size, wire=wire)) for box in boxes]
            merged = aggregate([decode_update(one, Limits()) for one in messages], settings=settings, seed=seed)
            bytes_each = float(np.mean([len(one) for one in messages]))
            points.append(point(f"{wire.value}", size, bytes_each, judgement, merged.rows, measured=True))
    return points


def point(
    name: str, rows: int, bytes_each: float, judgement: Judgement, bank: Single, *, measured: bool = False
) -> Point:
    """Judge with a fleet memory beside each box's own."""
    exam, scores = judgement.exam, judgement.beside(bank)
    mixed, own = exam.mixed(scores), exam.own(scores)
    drop = exam.own(judgement.local) - own
    return Point(name, rows, bytes_each, mean(mixed), mean(own), worst(drop), measured)


def coreset_point(data: Sequence[BoxData], judgement: Judgement, *, share: float, seed: int) -> Point:
    """Send a coreset of each box's raw rows instead of averages, and keep every row of it: more bytes, and raw patches.

    Args:
        data: honest boxes.
        judgement: how they judge with their own memories.
        share: of a box's rows in its coreset, in (0, 1].
        seed: of sub-sample and projection.
    """
    sent = []
    for box in data:
        rows = sampled_rows(box.learn, seed=seed)
        size = max(1, round(share * box.learn.shape[0] * box.learn.shape[1]))
        sent.append(rows[coreset(rows, min(size, len(rows)), seed=seed)])
    bytes_each = float(np.mean([len(rows) * rows.shape[1] * _HALF for rows in sent]))
    rows = round(float(np.mean([len(rows) for rows in sent])))
    return point(f"{share:.0%} coreset, raw rows", rows, bytes_each, judgement, np.concatenate(sent))


def computed_points(data: Sequence[BoxData], parameters: int) -> list[Point]:
    """Return the bytes of sending all rows in float16, and of sending a model's parameters in float32."""
    rows = round(float(np.mean([box.learn.shape[0] * box.learn.shape[1] for box in data])))
    nan = float("nan")
    return [
        Point("all rows", rows, float(rows * data[0].learn.shape[2] * _HALF), nan, nan, nan, measured=False),
        Point("trunk and generator, float32", 0, float(parameters * _FULL), nan, nan, nan, measured=False),
    ]


def pooled_bank(data: Sequence[BoxData], rows: int, *, seed: int) -> Single:
    """Reduce the frames of all boxes, brought to one place, as a box's own bank is reduced: what federation avoids."""
    width = data[0].learn.shape[2]
    frames = np.concatenate([box.learn.reshape(-1, width) for box in data])
    return first_bank(frames[None], rows, seed=seed)


def mean(values: npt.NDArray[np.float64]) -> float:
    """Return the mean of the values that are defined; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def worst(drops: npt.NDArray[np.float64]) -> float:
    """Return the largest drop that is defined; NaN where none is."""
    known = drops[~np.isnan(drops)]
    return float(known.max()) if known.size else float("nan")
