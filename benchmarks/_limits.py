"""Defects that look like another light or lens, how much of the image they fill, and the line on which they come.

On the box's own follower and correction; it must not know what is made of the figures.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import cv2
import numpy as np

import edge.adaptation.measure as measuring
from edge.adaptation.correction import MomentCorrection
from edge.adaptation.follower import Follower
from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.adaptation.settings import AdaptationSettings
from edge.frames import Decision, Frame, JudgedFrame, Prediction, Verdict
from edge.inference.sessions import IMAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from benchmarks._shift_heads import Detector
    from benchmarks._shift_scores import Eye
    from edge.adaptation.look import Correction, Look
    from edge.adaptation.moments import Moments, Reference

    Image = npt.NDArray[np.uint8]

_YELLOWED = np.float32([1.12, 1.0, 0.72])
_DULLED, _COARSENED, _WORN = 0.6, 0.8, 1.8


def yellowed(image: Image, strength: float) -> Image:
    """Discolour: red rises by an eighth, blue falls by a quarter."""
    return _grey(image * _YELLOWED**strength)


def dulled(image: Image, strength: float) -> Image:
    """Take contrast away, as a film of dust does: grey levels draw together about their mean."""
    mean = image.mean((0, 1), dtype=np.float32)
    return _grey(mean + (image - mean) * np.float32(1 - _DULLED * strength))


def coarsened(image: Image, strength: float) -> Image:
    """Make the surface coarser: the wrong material, of the same colours."""
    height, width = image.shape[:2]
    factor = 1 + _COARSENED * strength
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 0, factor)
    return np.asarray(cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def worn(image: Image, strength: float) -> Image:
    """Smear what is fine, as wear or a film of oil does."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), _WORN * strength) if strength else image.copy(), np.uint8)


DEFECTS: Mapping[str, Callable[[Image, float], Image]] = {
    "yellowed": yellowed, "dulled": dulled, "coarsened": coarsened, "worn": worn,
}  # fmt: skip
"""Image uint8 [H, W, 3] RGB and strength 0..1 -> the image with a defect that fills it. 0 changes nothing."""


def covering(image: Image, defect: str, share: float, rng: np.random.Generator, strength: float = 1.0) -> Image:
    """Return an image uint8 [H, W, 3] defective in a rectangle of a share of its pixels, at a random place."""
    height, width = image.shape[:2]
    h, w = (max(1, round(side * share**0.5)) for side in (height, width))
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    found = image.copy()
    found[y : y + h, x : x + w] = DEFECTS[defect](image, strength)[y : y + h, x : x + w]
    return found


@dataclass(frozen=True)
class Guard:
    """What keeps a follower from learning a defect.

    Attributes:
        bounded: the shift is bounded, and a single frame and the scale are limited.
        bound: of the shift, where it is another than the box's default.
        alarms: frames that alarm teach nothing, and many of them freeze it.
        trimmed: the patches that lie farthest from a frame's mean are left out.
    """

    bounded: bool = True
    alarms: bool = True
    trimmed: bool = True
    bound: float | None = None

    def settings(self, faster: float = 1.0) -> AdaptationSettings:
        """Return the box's settings, with what is off as far out of the way as they allow.

        Args:
            faster: how many times sooner than by default moments follow and come into force: so a drift over so many
                times fewer frames is as slow for them.
        """
        usual = AdaptationSettings()
        found: dict[str, float] = {
            "half_life": max(1.0, usual.half_life / faster), "every_frames": max(1, round(usual.every_frames / faster))
        }  # fmt: skip
        if self.bound is not None:
            found["bound"] = self.bound
        if not self.bounded:
            found |= {"bound": 1e6, "clip": 1e6, "scale": 1e3}
        if not self.alarms:
            found |= {"freeze_rate": 1.0, "thaw_rate": 0.99}
        return usual.model_copy(update=found)


GUARDED = "guarded"
GUARDS: Mapping[str, Guard] = {
    GUARDED: Guard(),
    "bound 2": Guard(bound=2.0),
    "bound 1": Guard(bound=1.0),
    "no bound": Guard(bounded=False),
    "alarms teach": Guard(alarms=False),
    "not trimmed": Guard(trimmed=False),
    "no guard": Guard(bounded=False, alarms=False, trimmed=False),
}


@contextmanager
def trimming(*, on: bool) -> Iterator[None]:
    """Measure moments of all patches while the block lasts, where trimming is off."""
    share = measuring.TRIM
    measuring.TRIM = share if on else 0.0
    try:
        yield
    finally:
        measuring.TRIM = share


@dataclass(frozen=True)
class Line:
    """A detector on a line: what it judges with and on whose parts.

    Attributes:
        eye: trunk and measuring.
        reference: of what was trained on.
        parts: uint8 [n, H, W, 3] RGB, good parts that come again and again.
    """

    eye: Eye
    reference: Reference
    parts: Image

    def scores(
        self, images: Sequence[Image], heads: Sequence[Detector], correction: Correction | None
    ) -> npt.NDArray[np.float64]:
        """Return the raw scores float64 [images, heads]."""
        seen = (self.eye.see(image, correction) for image in images)
        return np.array([[head.score(taps) for head in heads] for taps in seen])

    def own(self) -> MomentCorrection:
        """Return the correction from each image's own moments."""
        return MomentCorrection(self.reference.moments[0], self.reference.moments[0], own=1.0)

    def settled(self, seed: int, frames: int = 60) -> Follower:
        """Return a follower that has seen good parts only."""
        follower = Follower(self.reference, AdaptationSettings())
        for image in self.order(seed, frames):
            look = follower.look()
            follower.take(_judged(self.eye.moments(image, look.correction), look, alarmed=False))
        return follower

    def order(self, seed: int, frames: int) -> Iterator[Image]:
        """Show the parts, all of them before any comes again."""
        rng, left = np.random.default_rng(seed), list[int]()
        for _ in range(frames):
            left = left or rng.permutation(len(self.parts)).tolist()
            yield self.parts[left.pop()]

    def run(
        self,
        head: Detector,
        threshold: float,
        guard: Guard | None,
        changes: Sequence[Callable[[Image], Image]],
        *,
        seed: int,
        faster: float = 1.0,
        reset_at: int | None = None,
    ) -> Course:
        """Let a stream pass under a follower; each frame is learned from as a box would.

        Args:
            head: that judges.
            threshold: frozen.
            guard: of the follower; None corrects nothing.
            changes: one per frame: what happened to its part.
            seed: of the order of the parts.
            faster: see :meth:`Guard.settings`.
            reset_at: frame before which somebody says that the next parts are good; None for nobody.
        """
        if guard is None:
            shown = [change(part) for part, change in zip(self.order(seed, len(changes)), changes, strict=True)]
            return Course(self.scores(shown, [head], None)[:, 0] >= threshold, np.zeros(len(changes)), "")
        follower, alarms, shifts = Follower(self.reference, guard.settings(faster)), [], []
        with trimming(on=guard.trimmed):
            for index, (part, change) in enumerate(zip(self.order(seed, len(changes)), changes, strict=True)):
                if index == reset_at:
                    follower.reset()
                image, look = change(part), follower.look()
                moments, taps = self._look(image, look.correction)
                alarms.append(bool(head.score(taps) >= threshold))
                follower.take(_judged(moments, look, alarmed=alarms[-1] and guard.alarms))
                shifts.append(float(follower.shift))
        return Course(np.array(alarms), np.array(shifts), follower.phase.value)

    def _look(
        self, image: Image, correction: Correction | None
    ) -> tuple[Moments, Mapping[str, npt.NDArray[np.float32]]]:
        """Return what a box measures of a frame and the taps that its head gets, in one pass."""
        tiles = image[None].copy()
        colours = measure_canvas(tiles)
        if correction is not None:
            correction.canvas(tiles)
        found = self.eye.trunk.run({IMAGE: tiles})
        taps = {name: found[name] for name in self.eye.names}
        moments = joined([colours, measure_taps(taps)])
        return moments, taps if correction is None else correction.taps(taps, in_place=True)


@dataclass(frozen=True)
class Course:
    """What came of a stream.

    Attributes:
        alarms: bool [frames].
        shifts: float64 [frames], of the follower, in units of what is usual.
        phase: of the follower at the end.
    """

    alarms: npt.NDArray[np.bool_]
    shifts: npt.NDArray[np.float64]
    phase: str

    def rates(self, window: int) -> npt.NDArray[np.float64]:
        """Return the share of alarms in every window of so many frames."""
        return np.convolve(self.alarms, np.ones(window), "valid") / window

    def noticed(self, strengths: npt.NDArray[np.float64], window: int) -> float:
        """Return the defect's strength at which half of a window of frames alarm; NaN where they never do."""
        over = np.flatnonzero(self.rates(window) >= 0.5)
        return float(strengths[over[0] + window - 1]) if len(over) else float("nan")


_EMPTY, _NOW = np.zeros((1, 1), np.float32), datetime(2000, 1, 1, tzinfo=timezone.utc)


def _judged(moments: Moments, look: Look, *, alarmed: bool) -> JudgedFrame:
    frame = Frame(image=np.zeros((1, 1, 3), np.uint8), camera="cam", camera_seq=0, captured_ns=0, captured_at=_NOW)
    prediction = Prediction(_EMPTY, frame, 0, 0, moments_version=look.version, moments=moments)
    decision = Decision.NOK if alarmed else Decision.OK
    verdict = Verdict(decision, 0.0, 1.0, 1.0, "cam", 0, 0, _NOW)
    return JudgedFrame(frame=frame, prediction=prediction, verdict=verdict, events=(), alarmed=alarmed)


def _grey(values: npt.NDArray[np.floating]) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
