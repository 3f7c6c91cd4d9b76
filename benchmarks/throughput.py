"""How many decoded 1080p frames a second does a box judge on two cores, beside what its bare graphs allow?

Bare graphs: trunk and head by parallel asynchronous requests, on inputs that lie ready. The box: a whole one, from the
frame in memory to the verdict in its counters. Both take turns, so that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

import cv2
import numpy as np

from benchmarks._setting import (
    Goal,
    add_bundle_option,
    as_frame,
    bundle_for,
    cpu_seconds,
    frames_1080p,
    heading,
    print_goals,
    spread,
)
from edge.box import Box
from edge.bundle import Bundle, Engine, Precision
from edge.capture.capture import CameraState, Counters
from edge.errors import EngineError
from edge.frames import Frame
from edge.inference.detector import Detector
from edge.inference.engines import GraphSession, open_graph
from edge.inference.preprocessing import cut_tiles, to_canvas
from edge.inference.sessions import ANOMALY_MAP, IMAGE, graph_file
from edge.inference.state import stored_state
from edge.judgement.verdicts import Judge
from edge.settings import BoxSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    Images = Sequence[npt.NDArray[np.uint8]]

CORES, CAMERAS = 2, 4
SHARE_GOAL, WATCHED_GOAL = 0.9, 0.8
PRECISIONS = (Precision.INT8, Precision.FLOAT32)
BRIEF: dict[str, dict[str, object]] = {"memory": {}, "uniad": {"steps": 60}}
"""Methods that a bundle can be made of; what learns long learns less, since speed does not depend on it."""
LEAST = {("uniad", Precision.INT8): 60.0}
"""Frames per second that a box should reach on two cores."""
# So that no frame is an anomaly: alerts and their pictures are measured elsewhere.
CALM = 1e9
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of one candidate: frames per second of wall time, and milliseconds of processor time per frame."""

    rate: float
    cpu_ms: float


def take_turns(
    candidates: Mapping[str, Callable[[float], int]], *, rounds: int, seconds: float
) -> dict[str, list[Round]]:
    """Let candidates run in turns.

    Args:
        candidates: by name; each runs for some seconds and returns the frames that it took.
        rounds: turns of each.
        seconds: length of a turn.

    Returns:
        The turns of each, in order, so that equal indices are neighbours in time.
    """
    found: dict[str, list[Round]] = {name: [] for name in candidates}
    for run in candidates.values():
        run(seconds / 4)  # caches, lazy buffers
    names = list(candidates)
    for index in range(rounds):
        # In reverse every other time, so that nobody always comes after the same one.
        for name in names if index % 2 == 0 else reversed(names):
            wall, cpu = time.monotonic(), cpu_seconds()
            frames = max(1, candidates[name](seconds))
            wall, cpu = time.monotonic() - wall, cpu_seconds() - cpu
            found[name].append(Round(frames / wall, 1000 * cpu / frames))
    return found


class ReadyFrames:
    """In place of a capture: decoded frames, as many as are asked for while its box has its turn."""

    state = CameraState.STREAMING
    error: str | None = None
    remarks = ()
    finished = False
    source_counts: ClassVar[dict[str, int]] = {}

    def __init__(self, turn: threading.Event, images: Images, *, name: str, **_: object) -> None:
        self.name = name
        self._turn, self._images = turn, itertools.cycle(images)
        self._count = 0
        self.idle = threading.Event()

    @property
    def queued(self) -> int:
        """Whether the next frame is there already."""
        return int(self._turn.is_set())

    @property
    def counters(self) -> Counters:
        """No frame is ever dropped."""
        return Counters(captured=self._count, delivered=self._count)

    def get(self, timeout: float) -> Frame | None:
        """Give the next frame, or wait for the turn."""
        if not self._turn.is_set() and timeout > 0:
            self.idle.set()
            self._turn.wait(timeout)
        if not self._turn.is_set():
            return None
        self.idle.clear()
        self._count += 1
        return Frame(next(self._images), self.name, self._count - 1, time.monotonic_ns(), datetime.now(timezone.utc))

    def start(self) -> None:
        """Nothing has to be opened."""

    def stop(self, _timeout: float) -> None:
        """Nothing has to be closed."""


class RunningBox:
    """A whole box that judges frames from memory while it has its turn."""

    def __init__(self, settings: BoxSettings, images: Images) -> None:
        self._turn = threading.Event()
        self._captures: list[ReadyFrames] = []

        def capture(*, name: str, **_: object) -> ReadyFrames:
            self._captures.append(ReadyFrames(self._turn, images, name=name))
            return self._captures[-1]

        self._box = Box(settings)
        with mock.patch("edge.camera.Capture", capture):
            self._box.start()

    def run(self, seconds: float) -> int:
        """Judge for some seconds; returns how many frames."""
        before = self._box.metrics.value("judged")
        for capture in self._captures:
            capture.idle.clear()
        self._turn.set()
        time.sleep(seconds)
        self._turn.clear()
        for capture in self._captures:
            if not capture.idle.wait(PATIENCE_S):
                raise SystemExit(f"{capture.name} does not end its turn")
        failed = self._box.metrics.value("frames_failed") + self._box.metrics.value("not_judged")
        if failed:
            raise SystemExit(f"{failed} frames could not be judged")
        return self._box.metrics.value("judged") - before

    def stop(self) -> None:
        """Stop the box."""
        self._box.stop()


def box_settings(
    bundle: Bundle, folder: Path, precision: Precision, *, cameras: int, threads: int, watched: bool
) -> BoxSettings:
    """Settings of a box that raises no alert.

    Args:
        bundle: that judges.
        folder: for its state.
        precision: numerics.
        cameras: how many.
        threads: of the engine.
        watched: with evidence and camera health.
    """
    camera: dict[str, Any] = {
        "source": {"kind": "folder", "path": str(folder)},
        "threshold": {"value": CALM, "bundle_id": bundle.id, "memory_version": 0},
        "health": {} if watched else None,
    }
    return BoxSettings.model_validate(
        {
            "site": "bench", "box": "box", "state_dir": folder, "bundle": bundle.path,
            "engine": "openvino", "precision": precision.value, "threads": threads,
            "broker": {"url": "mqtt://127.0.0.1:9", "backoff_min_s": 8, "backoff_max_s": 8},
            "cameras": [{"name": f"cam{index}", **camera} for index in range(cameras)],
            "evidence": {"min_free_mb": 0} if watched else None,
        }
    )  # fmt: skip


def open_bare(
    bundle: Bundle, precision: Precision, *, streams: int, threads: int
) -> tuple[GraphSession, GraphSession, dict[str, npt.NDArray[Any]]]:
    """Open trunk and head as the detector does, with the taps of one prepared input."""
    manifest = bundle.manifest
    preprocessing = manifest.preprocessing
    tiles = cut_tiles(to_canvas(frames_1080p(1, seed=9)[0], preprocessing), preprocessing).copy()
    common: dict[str, Any] = {
        "engine": Engine.OPENVINO, "precision": precision, "threads": threads, "streams": streams,
    }  # fmt: skip
    trunk = open_graph(
        graph_file(bundle, manifest.trunk, precision),
        outputs=manifest.taps,
        input_shapes={IMAGE: tiles.shape},
        **common,
    )
    taps = {name: value.copy() for name, value in trunk.run({IMAGE: tiles}).items()}
    head = open_graph(
        graph_file(bundle, manifest.head, precision),
        outputs=[ANOMALY_MAP],
        state=stored_state(bundle),
        input_shapes={name: value.shape for name, value in taps.items()},
        **common,
    )
    return trunk, head, {IMAGE: tiles, **taps}


def bare_graphs(bundle: Bundle, precision: Precision, *, requests: int, threads: int) -> Callable[[float], int]:
    """Run trunk and head alone, so many requests side by side on ``threads`` streams of one thread each."""
    trunk, head, prepared = open_bare(bundle, precision, streams=threads, threads=threads)
    pairs = [(trunk, head)] + [(trunk.clone(), head.clone()) for _ in range(requests - 1)]
    image = prepared.pop(IMAGE)

    def work(pair: tuple[GraphSession, GraphSession], end: float, counts: list[int]) -> None:
        mine, count = {IMAGE: image.copy()}, 0
        while time.monotonic() < end:
            pair[0].start(mine)
            # The head takes the trunk's own buffers, as in the box.
            pair[1].start(pair[0].finish())
            pair[1].finish()
            count += 1
        counts.append(count)

    def run(seconds: float) -> int:
        counts: list[int] = []
        end = time.monotonic() + seconds
        workers = [threading.Thread(target=work, args=(pair, end, counts)) for pair in pairs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(counts)

    return run


def measure_share(
    bundle: Bundle, folder: Path, precision: Precision, *, rounds: int, seconds: float, least: float
) -> list[Goal]:
    """A whole box beside its bare graphs: four cameras on two cores, one camera on one thread.

    Args:
        bundle: that judges.
        folder: for states of boxes.
        precision: numerics.
        rounds: turns of each candidate.
        seconds: length of a turn.
        least: frames per second that the box should reach on two cores; NaN for no goal.
    """
    images = frames_1080p(6)
    with ExitStack() as stack:

        def box(name: str, *, cameras: int = CAMERAS, threads: int = CORES, watched: bool = False) -> Any:  # noqa: ANN401 (a candidate)
            (folder / name).mkdir(parents=True)
            settings = box_settings(bundle, folder / name, precision, cameras=cameras, threads=threads, watched=watched)
            running = RunningBox(settings, images)
            stack.callback(running.stop)
            return running.run

        turns = take_turns(
            {
                f"bare graphs, {CORES} cores": bare_graphs(bundle, precision, requests=CORES + 1, threads=CORES),
                f"box, {CORES} cores": box("plain"),
                f"box with evidence and health, {CORES} cores": box("watched", watched=True),
                "bare graphs, 1 thread": bare_graphs(bundle, precision, requests=1, threads=1),
                "box of one camera, 1 thread": box("alone", cameras=1, threads=1),
                f"box of one camera, {CORES} threads": box("both", cameras=1),
            },
            rounds=rounds,
            seconds=seconds,
        )
    print(f"decoded 1080p frame to verdict, OpenVINO {precision.value}, {CAMERAS} cameras unless said otherwise\n")
    print("| candidate | frames/s best | median | processor ms per frame, best | median |\n|---|---|---|---|---|")
    for name, rounds_of in turns.items():
        rates, cpu = [turn.rate for turn in rounds_of], [turn.cpu_ms for turn in rounds_of]
        print(f"| {name} | {max(rates):.0f} | {np.median(rates):.0f} | {min(cpu):.2f} | {np.median(cpu):.2f} |")
    print()
    bare, plain, watched, bare_one, alone = itertools.islice(turns.values(), 5)
    return [
        _share(f"{precision.value}: box over bare graphs, frames/s", plain, bare, SHARE_GOAL),
        _share(f"{precision.value}: with evidence and health, frames/s", watched, bare, WATCHED_GOAL),
        _rate(f"{precision.value}: box of {CAMERAS} cameras, {CORES} cores, frames/s", plain, least),
        _share(f"{precision.value}: box over bare graphs, processor time", plain, bare, None, of="cpu"),
        _share(f"{precision.value}: the same, one camera, 1 thread", alone, bare_one, None, of="cpu"),
    ]


def _share(name: str, left: Sequence[Round], right: Sequence[Round], limit: float | None, *, of: str = "rate") -> Goal:
    """Ratio of neighbouring turns; above 1 where ``left`` is faster."""
    ratios = [a.rate / b.rate if of == "rate" else b.cpu_ms / a.cpu_ms for a, b in zip(left, right, strict=True)]
    best = _best(left, of) / _best(right, of)
    text = f"{spread(ratios)}; best turn over best turn {best:.2f}"
    return Goal(name, float(np.median(ratios)), float("nan") if limit is None else limit, True, text)


def _rate(name: str, turns: Sequence[Round], least: float) -> Goal:
    rates = [turn.rate for turn in turns]
    return Goal(name, float(np.median(rates)), least, True, spread(rates, "{:.0f}"))


def _best(turns: Sequence[Round], of: str) -> float:
    return max(turn.rate if of == "rate" else 1 / turn.cpu_ms for turn in turns)


def stage_times(bundle: Bundle, precision: Precision, images: Images, *, count: int) -> dict[str, list[float]]:
    """Milliseconds of each stage on one thread, stage after stage of the same frame; JPEG decoding apart."""
    trunk, head, _ = open_bare(bundle, precision, streams=1, threads=1)
    detector = Detector.open(bundle, engine=Engine.OPENVINO, precision=precision, threads=1)
    judge = Judge(
        calibration=bundle.calibration(detector.status.engine, detector.status.precision),
        pooling=bundle.manifest.pooling,
        crop=bundle.manifest.preprocessing.crop,
        alpha=0.01,
        bundle_id=bundle.id,
    )
    preprocessing = bundle.manifest.preprocessing
    files = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1] for image in images]
    names = ("decode of a JPEG file", "resize", "trunk", "head", "detector, all three", "judge")
    found: dict[str, list[float]] = {name: [] for name in names}

    def steps(image: npt.NDArray[np.uint8], file: npt.NDArray[np.uint8]) -> Iterator[object]:
        yield cv2.imdecode(file, cv2.IMREAD_COLOR)
        tiles = cut_tiles(to_canvas(image, preprocessing), preprocessing)
        yield tiles
        taps = trunk.run({IMAGE: tiles})
        yield taps
        yield head.run(taps)
        prediction = detector.predict(as_frame(image, 0))
        yield prediction
        yield judge.judge(prediction)

    for _, (image, file) in zip(range(count), itertools.cycle(list(zip(images, files, strict=True))), strict=False):
        before = time.perf_counter()
        for name, _done in zip(names, steps(image, file), strict=True):
            now = time.perf_counter()
            found[name].append(1000 * (now - before))
            before = now
    return found


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    """Measure and print; about four minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--method", choices=sorted(BRIEF), default="memory", help="method of the bundle that is made")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--tiny", action="store_true", help="two short turns, to see that it runs")
    options = parser.parse_args(argv)
    rounds, seconds = (2, 0.05) if options.tiny else (options.rounds, options.seconds)
    # One thread of OpenCV for each caller: both cores have one already.
    cv2.setNumThreads(1)
    heading("throughput")
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = bundle_for(options.bundle, folder, method=options.method, settings=BRIEF[options.method])
        for precision in PRECISIONS:
            try:
                goals += measure_share(
                    bundle, folder / precision.value, precision, rounds=rounds, seconds=seconds,
                    least=LEAST.get((bundle.manifest.method, precision), float("nan")),
                )  # fmt: skip
            except EngineError as error:
                raise SystemExit(str(error)) from error
            print(f"| stage, {precision.value}, one thread | ms best | median |\n|---|---|---|")
            times = stage_times(bundle, precision, frames_1080p(6), count=10 if options.tiny else 200)
            for stage, values in times.items():
                print(f"| {stage} | {min(values):.2f} | {np.median(values):.2f} |")
            print()
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
