"""Scores of one folder's test images under every shift, as a box gives them: uncorrected, and corrected in two ways.

Frame by frame through the box's own correction and follower; it must not know what figures are made of the scores.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._shifts import CLEAN, REQUIRED
from deploy.moments import reference_images, reference_of
from edge.adaptation.correction import MomentCorrection
from edge.adaptation.follower import Follower
from edge.adaptation.look import PLAIN
from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.adaptation.settings import AdaptationSettings
from edge.frames import Decision, Frame, JudgedFrame, Prediction, Verdict
from edge.inference.sessions import IMAGE
from edge.judgement.threshold import fit_threshold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from benchmarks._shift_heads import Detector, Source
    from benchmarks._shifts import Condition
    from edge.adaptation.look import Correction, Look
    from edge.adaptation.moments import Moments, Reference
    from edge.inference.session import GraphSession

    Canvases = npt.NDArray[np.uint8]
    Taps = dict[str, npt.NDArray[np.float32]]

NONE, OWN, RUNNING = "none", "per image", "running"
CORRECTIONS = (NONE, OWN, RUNNING)
"""Nothing; each image's own moments; moments that a follower has learned from good images of the same shift."""

_EMPTY = np.zeros((1, 1), np.float32)
_NOW = datetime(2000, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Scores:
    """What one folder's images scored.

    Attributes:
        folder: its name.
        groups: of the good images and of the defective ones.
        thresholds: by detector, frozen on clean held-out images.
        scores: by detector, correction and condition: of good images and of defective ones, raw, float64.
        rows: by condition, which of the good and which of the defective images were judged.
        followed: by condition, the follower after its frames: the size of the shift, in units of what is usual, and
            the share of them that it accepted.
    """

    folder: str
    groups: tuple[list[str], list[str]]
    thresholds: dict[str, float]
    scores: dict[str, dict[str, dict[str, tuple[list[float], list[float]]]]]
    rows: dict[str, tuple[list[int], list[int]]]
    followed: dict[str, dict[str, float]]

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Scores:
        """Return what :meth:`plain` gave."""
        good, bad = plain["groups"]
        return cls(plain["folder"], (good, bad), plain["thresholds"], plain["scores"], plain["rows"], plain["followed"])

    def joined(self, other: Scores) -> Scores:
        """Return both, of other conditions or other detectors of the same folder.

        Raises:
            ValueError: they are not of the same images or thresholds.
        """
        alike = all(self.thresholds[name] == other.thresholds[name] for name in self.scores.keys() & other.scores)
        same = all(self.rows[condition] == other.rows[condition] for condition in self.rows.keys() & other.rows)
        if not (alike and same and (self.folder, self.groups) == (other.folder, other.groups)):
            raise ValueError(f"{self.folder} and {other.folder} were not judged with the same images and thresholds")
        scores = {
            name: {
                how: {**self.scores.get(name, {}).get(how, {}), **other.scores.get(name, {}).get(how, {})}
                for how in CORRECTIONS
            }
            for name in {**self.scores, **other.scores}
        }
        return Scores(
            self.folder,
            self.groups,
            {**self.thresholds, **other.thresholds},
            scores,
            {**self.rows, **other.rows},
            {**self.followed, **other.followed},
        )


@dataclass(frozen=True)
class Eye:
    """The trunk and what is measured behind it.

    Attributes:
        trunk: ready to run, one image.
        names: taps that any detector takes.
    """

    trunk: GraphSession
    names: tuple[str, ...]

    def see(self, canvas: npt.NDArray[np.uint8], correction: Correction | None = None) -> Taps:
        """Return the taps of one canvas uint8 [H, W, 3] as heads get them."""
        tiles = canvas[None].copy()
        if correction is not None:
            correction.canvas(tiles)
        found = self.trunk.run({IMAGE: tiles})
        taps = {name: found[name] for name in self.names}
        return taps if correction is None else dict(correction.taps(taps, in_place=True))

    def moments(self, canvas: npt.NDArray[np.uint8], correction: Correction | None = None) -> Moments:
        """Return what a box measures of a frame: its canvas as it came, its taps behind the canvas's correction."""
        tiles = canvas[None].copy()
        first = measure_canvas(tiles)
        if correction is not None:
            correction.canvas(tiles)
        found = self.trunk.run({IMAGE: tiles})
        return joined([first, measure_taps({name: found[name] for name in self.names})])


def reference(eye: Eye, fit: Canvases, holdout: Canvases) -> Reference:
    """Measure what was trained on, as packing does for a bundle of one product."""
    images = reference_images(("",), (fit, ()), (holdout, ()))
    assert images is not None
    return reference_of(images, eye.moments)


def follow(eye: Eye, of: Reference, frames: Canvases) -> tuple[Look, dict[str, float]]:
    """Let a follower settle on good frames after a reset; return the next frame's look, and :attr:`Scores.followed`."""
    settle = AdaptationSettings()
    if len(frames) < settle.settle_frames:
        settle = AdaptationSettings(settle_frames=len(frames))
    follower = Follower(of, settle)
    follower.reset()
    for canvas in frames:
        look = follower.look()
        follower.take(_judged(eye.moments(canvas, look.correction), look))
    accepted = float(follower.status()["frames"]["accepted"])
    return follower.look(), {"shift": float(follower.shift), "accepted": accepted / len(frames)}


def _judged(moments: Moments, look: Look) -> JudgedFrame:
    # Settling frames count although they alarm, so that no score is needed.
    frame = Frame(image=np.zeros((1, 1, 3), np.uint8), camera="cam", camera_seq=0, captured_ns=0, captured_at=_NOW)
    prediction = Prediction(_EMPTY, frame, 0, 0, moments_version=look.version, moments=moments)
    verdict = Verdict(Decision.OK, 0.0, 1.0, 1.0, "cam", 0, 0, _NOW)
    return JudgedFrame(frame=frame, prediction=prediction, verdict=verdict, events=(), alarmed=False)


def judge(
    source: Source,
    detectors: Sequence[Detector],
    shifts: Mapping[str, Condition],
    trunk: GraphSession,
    *,
    alpha: float,
    share: float,
    report: Callable[[str], None],
) -> Scores:
    """Score a folder's good and defective test images under every condition and correction.

    Args:
        source: the images.
        detectors: fitted on the source's training images.
        shifts: by name.
        trunk: see :func:`benchmarks._shift_heads.trunk_of`.
        alpha: false-alarm probability per good image that thresholds are set for.
        share: of the images that are judged, except under the shifts that goals are for and unchanged.
        report: is told of every condition that is done.
    """
    eye = Eye(trunk, tuple(dict.fromkeys(tap for one in detectors for tap in one.taps)))
    known = reference(eye, source.fit, source.holdout)
    held = _scores(eye, detectors, source.holdout, None)
    thresholds = {
        name: float(fit_threshold(np.array(values), source.holdout_groups, alpha).value)
        for name, values in held.items()
    }
    own = MomentCorrection(known.moments[0], known.moments[0], own=1.0)
    found: dict[str, dict[str, dict[str, tuple[list[float], list[float]]]]] = {
        one.name: {correction: {} for correction in CORRECTIONS} for one in detectors
    }
    rows, followed = {}, {}
    for condition, shift in shifts.items():
        # Not hash(): that differs from process to process.
        seed = zlib.crc32(condition.encode())
        used = 1.0 if condition in {CLEAN, *REQUIRED} else share
        rows[condition] = (some(len(source.good), used), some(len(source.bad), used))
        parts = (source.moments, source.good[rows[condition][0]], source.bad[rows[condition][1]])
        frames, good, bad = (shift.of(part, seed=seed + i) for i, part in enumerate(parts))
        look, followed[condition] = follow(eye, known, frames)
        for correction, how in ((NONE, PLAIN.correction), (OWN, own), (RUNNING, look.correction)):
            both = (_scores(eye, detectors, part, how) for part in (good, bad))
            for of_good, of_bad, one in zip(*(list(part.values()) for part in both), detectors, strict=True):
                found[one.name][correction][condition] = (of_good, of_bad)
        report(f"{source.name}: {condition}")
    groups = (source.good_groups.tolist(), source.bad_groups.tolist())
    return Scores(source.name, groups, thresholds, found, rows, followed)


def some(count: int, share: float) -> list[int]:
    """Return the places of a share of so many images, at least one, evenly drawn."""
    return [int(i) for i in np.linspace(0, count - 1, max(1, round(share * count))).round()]


def _scores(
    eye: Eye, detectors: Sequence[Detector], canvases: Canvases, correction: Correction | None
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {one.name: [] for one in detectors}
    for canvas in canvases:
        taps = eye.see(canvas, correction)
        for one in detectors:
            found[one.name].append(one.score(taps))
    return found
