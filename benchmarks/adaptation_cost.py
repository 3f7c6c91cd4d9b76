"""What do correcting and measuring a frame cost beside judging it plain?

One detector on one core; every frame is judged each way in turns. Times are those of the processor, all threads of this
process, so that other work disturbs little; a second plain way shows what of a difference is chance. A few minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from benchmarks._setting import (
    Goal,
    add_bundle_option,
    as_frame,
    bundle_for,
    frames_1080p,
    heading,
    print_goals,
    spread,
)
from edge.adaptation.correction import MomentCorrection
from edge.adaptation.look import PLAIN, Look
from edge.adaptation.moments import Moments
from edge.bundle import Engine, Precision
from edge.inference.detector import Detector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.bundle import Bundle
    from edge.frames import Frame

GOAL_MS = 0.3
_PLAIN, _AGAIN, _CORRECTED, _FOLLOWED = "plain", "plain again", "corrected", "corrected and measured"
_GAIN, _OFFSET = 0.85, 0.04 * 255


def ways(detector: Detector, frames: Sequence[Frame]) -> dict[str, Look]:
    """Return each way to see a frame; the correction is one of a lamp that has changed, and of every channel."""
    seen = [_moments(detector, frame, Look(measure=True)) for frame in frames]
    reference = Moments(
        {name: np.mean([one.mean[name] for one in seen], axis=0) / _GAIN - _OFFSET * (name == "image") for name in
         seen[0].mean},
        {name: np.mean([one.std[name] for one in seen], axis=0) / _GAIN for name in seen[0].std},
    )  # fmt: skip
    now = Moments(*({name: np.mean([getattr(one, part)[name] for one in seen], axis=0) for name in seen[0].mean}
                    for part in ("mean", "std")))  # fmt: skip
    correction = MomentCorrection(now, reference)
    return {
        _PLAIN: PLAIN,
        _AGAIN: PLAIN,
        _CORRECTED: Look(0, 1, correction),
        _FOLLOWED: Look(0, 1, correction, measure=True),
        "measured": Look(measure=True),
        "settling: own moments too": Look(0, 1, MomentCorrection(now, reference, own=0.5), measure=True),
    }


def _moments(detector: Detector, frame: Frame, look: Look) -> Moments:
    found = detector.predict(frame, look).moments
    assert found is not None
    return found


def measure(detector: Detector, frames: Sequence[Frame], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of processor time of each way, one figure a round."""
    looks = ways(detector, frames)
    times: dict[str, list[float]] = {name: [] for name in looks}
    rng = np.random.default_rng(0)
    names = list(looks)
    for turn in range(rounds):
        frame = frames[turn % len(frames)]
        for index in rng.permutation(len(names)):
            started = time.process_time_ns()
            detector.predict(frame, looks[names[index]])
            times[names[index]].append((time.process_time_ns() - started) / 1e6)
    return times


def report(name: str, times: dict[str, list[float]]) -> list[Goal]:
    """Print ratios and differences to plain, and return the figure with a goal."""
    plain = np.array(times[_PLAIN])
    print(f"{name}, plain in ms: {spread(times[_PLAIN])}\n")
    print("| way | ms median | of plain | ms more: median, middle half |\n|---|---|---|---|")
    goals = []
    for way, values in times.items():
        if way == _PLAIN:
            continue
        more = np.array(values) - plain
        lower, middle, upper = np.quantile(more, (0.25, 0.5, 0.75))
        ratio = np.median(np.array(values) / plain)
        print(f"| {way} | {np.median(values):.3f} | {ratio:.3f} | {middle:+.3f}, {lower:+.3f} to {upper:+.3f} |")
        if way in {_CORRECTED, _FOLLOWED}:
            limit = GOAL_MS if way == _CORRECTED else float("nan")
            goals.append(
                Goal(f"{way}, {name}: more than plain", float(middle), limit, at_least=False, unit="ms",
                     spread=f"middle half {lower:+.3f} to {upper:+.3f}, {len(more)} rounds; {ratio:.3f} of plain")
            )  # fmt: skip
    print(flush=True)
    return goals


def measured_engines(bundle: Bundle, frames: Sequence[Frame], rounds: int) -> list[Goal]:
    """Measure each engine and precision that the bundle was calibrated for."""
    goals = []
    for engine in Engine:
        for precision in (Precision.FLOAT32, Precision.INT8):
            if not any((c.engine, c.precision) == (engine, precision) for c in bundle.manifest.calibration):
                continue
            detector = Detector.open(bundle, engine=engine, precision=precision, threads=1)
            measure(detector, frames, max(2, rounds // 10))
            goals += report(f"{engine.value} {precision.value}", measure(detector, frames, rounds))
    return goals


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--rounds", type=int, default=400, help="turns of every way, of each engine and precision")
    options = parser.parse_args(argv)
    heading("cost of adaptation")
    # The engine has one thread; what is measured must not have more.
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = bundle_for(options.bundle, Path(scratch) / "bundle")
        preprocessing = bundle.manifest.preprocessing
        size = preprocessing.canvas_width, preprocessing.canvas_height
        print(f"{bundle.manifest.method}, canvas {size[0]} x {size[1]}, taps {', '.join(bundle.manifest.taps)}\n")
        images = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in frames_1080p(12)]
        frames = [as_frame(np.asarray(image, np.uint8), seq) for seq, image in enumerate(images)]
        goals = measured_engines(bundle, frames, options.rounds)
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
