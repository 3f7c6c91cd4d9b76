"""Recordings of several channels, and the windows that are cut from them.

It must not know where recordings come from, nor what they are of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError
from edge.inference.signals import signal_canvas, too_much_lost
from edge.inputs import SignalPreprocessing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

EVENT_S = 0.15
"""Half of the seconds around a labelled event that count as anomalous."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A signal of K channels and n samples at one rate.

    Attributes:
        name: what people call it.
        samples: float32 [K, n], NaN where samples were lost.
        rate_hz: samples per second.
        channels: their names, K.
        unit: of all channels.
        anomalous: bool [n], True where the signal is not as it should be; None where nobody has said.
        usable: bool [n], False where it says nothing (noise, a loose electrode); None everywhere usable.
        least: labelled samples of a window from which it is anomalous as a whole.
        placed: labels say where; False where they are of the recording as a whole.
    """

    name: str
    samples: npt.NDArray[np.float32]
    rate_hz: float
    channels: tuple[str, ...]
    unit: str
    anomalous: npt.NDArray[np.bool_] | None = None
    usable: npt.NDArray[np.bool_] | None = None
    least: int = 1
    placed: bool = True

    def __post_init__(self) -> None:
        shape = self.samples.shape
        if len(shape) != 2 or shape[0] != len(self.channels) or not shape[1]:  # noqa: PLR2004 (channels, samples)
            raise DataError(
                f"{self.name}: samples are {list(shape)} for {len(self.channels)} channels; give [channels, samples]"
            )
        for what in ("anomalous", "usable"):
            label = getattr(self, what)
            if label is not None and (label.shape != shape[1:] or label.dtype != np.bool_):
                raise DataError(f"{self.name}: {what} is {label.dtype} {list(label.shape)}, not bool [{shape[1]}]")
        if not (math.isfinite(self.rate_hz) and self.rate_hz > 0):
            raise DataError(f"{self.name}: rate {self.rate_hz} Hz; give a positive number")

    def part(self, first: float, last: float) -> Recording:
        """Return the samples from one share of its length to another, 0 <= first < last <= 1."""
        begin, end = (round(share * self.samples.shape[1]) for share in (first, last))
        labels = (None if label is None else label[begin:end] for label in (self.anomalous, self.usable))
        name = self.name if not begin else f"{self.name}+{begin}"
        return Recording(
            name,
            self.samples[:, begin:end],
            self.rate_hz,
            self.channels,
            self.unit,
            *labels,
            least=self.least,
            placed=self.placed,
        )


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of one length from recordings of one kind.

    Attributes:
        values: float32 [n, K, Q], in the recordings' unit; a lost sample lies between its neighbours.
        anomalous: bool [n].
        points: bool [n, Q], labelled samples; none where nobody said where.
        names: unicode [n], recording and first sample.
        groups: unicode [n]; windows of one group begin within one window's length, and each overlaps the next group's.
    """

    values: npt.NDArray[np.float32]
    anomalous: npt.NDArray[np.bool_]
    points: npt.NDArray[np.bool_]
    names: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.values)

    def chosen(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Windows:
        """Return some of them."""
        return Windows(*(getattr(self, name)[which] for name in self.__slots__))


def cut_windows(recordings: Iterable[Recording], window: int, hop: int, *, max_lost: float = 0.05) -> Windows:
    """Cut recordings into windows, in order.

    A window is anomalous where at least ``least`` of its samples are labelled, and good where none is. What is between
    is left out: most of an anomaly lies in a neighbouring window. So is what is not usable, or lost more than allowed.

    Args:
        recordings: of one number of channels.
        window: Q, samples.
        hop: samples from the begin of one window to the next.
        max_lost: largest share of lost values.
    """
    rows: list[tuple[npt.NDArray[np.float32], bool, npt.NDArray[np.bool_], str, str]] = []
    channels = 0
    for one in recordings:
        channels = len(one.channels)
        labels = np.zeros(one.samples.shape[1], np.bool_) if one.anomalous is None else one.anomalous
        for begin in range(0, one.samples.shape[1] - window + 1, hop):
            here = slice(begin, begin + window)
            labelled = int(labels[here].sum())
            if 0 < labelled < one.least or (one.usable is not None and not one.usable[here].all()):
                continue
            values = filled(one.samples[:, here], max_lost)
            if values is not None:
                group = f"{one.name}@{begin // window}"
                rows.append((values, labelled > 0, labels[here] & one.placed, f"{one.name}@{begin}", group))
    if not rows:
        nothing = np.zeros((0, window), np.bool_)
        return Windows(np.zeros((0, channels, window), np.float32), nothing[:, 0], nothing, *[np.zeros(0, np.str_)] * 2)
    values, anomalous, points, names, groups = zip(*rows, strict=True)
    return Windows(np.stack(values), np.array(anomalous, np.bool_), np.stack(points), np.array(names), np.array(groups))


def filled(values: npt.NDArray[np.float32], max_lost: float) -> npt.NDArray[np.float32] | None:
    """Return a window whose lost samples lie on the line between their neighbours; None where too many are lost.

    A box judges the same windows, by the same rule.
    """
    values = np.where(np.isfinite(values), values, np.float32(np.nan))
    if too_much_lost(values, max_lost):
        return None
    return signal_canvas(values, SignalPreprocessing(channels=values.shape[0], samples=values.shape[1]))


def around(places: npt.NDArray[np.integer], reach: int, length: int) -> npt.NDArray[np.bool_]:
    """Return bool [length]: whether a sample is at most ``reach`` from one of the places."""
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, np.clip(places - reach, 0, length), 1)
    np.add.at(edges, np.clip(places + reach + 1, 0, length), -1)
    return np.asarray(edges[:-1].cumsum() > 0)


def one_kind(recordings: Sequence[Recording]) -> tuple[tuple[str, ...], str, float]:
    """Return the channels, the unit and the rate that all recordings share.

    Raises:
        DataError: there is none, or two differ.
    """
    if not recordings:
        raise DataError("there is no recording; give a folder with .npz or WFDB files")
    first = recordings[0]
    for one in recordings:
        for what in ("channels", "unit", "rate_hz"):
            if getattr(one, what) != getattr(first, what):
                raise DataError(
                    f"{one.name}: {what} is {getattr(one, what)}, of {first.name} it is {getattr(first, what)}; "
                    "train on recordings of one kind"
                )
    return first.channels, first.unit, first.rate_hz
