"""How fast is a frame judged, beside what its bare graphs allow, and what is int8 worth?

Every ratio is of two things measured in turns within one run: other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import threading
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
    cpu_seconds,
    frames_1080p,
    heading,
    print_goals,
    spread,
)
from edge.bundle import Bundle, Engine, Precision, Resize
from edge.inference.detector import Detector
from edge.inference.engines import GraphSession, open_graph
from edge.inference.preprocessing import cut_tiles, to_canvas
from edge.inference.sessions import ANOMALY_MAP, IMAGE, graph_file
from edge.judgement.verdicts import Judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Step = Callable[[int], object]

CORES = 2
SHARE_GOAL, INT8_GOAL = 0.8, 2.0
# A threshold as a box would use it: one frame in a hundred may be called wrongly.
ALPHA = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """One turn of one candidate: frames per second of wall time, and milliseconds of processor time per frame."""

    rate: float
    cpu_ms: float


def take_turns(candidates: dict[str, Sequence[Step]], *, rounds: int, seconds: float) -> dict[str, list[Round]]:
    """Let candidates run in turns.

    Args:
        candidates: by name, one callable for each thread; it is called with 0, 1, 2, ...
        rounds: turns of each.
        seconds: length of a turn.

    Returns:
        The turns of each, in order, so that equal indices are neighbours in time.
    """
    found: dict[str, list[Round]] = {name: [] for name in candidates}
    for steps in candidates.values():
        _run(steps, seconds / 4)  # caches, lazy buffers
    names = list(candidates)
    for index in range(rounds):
        # In reverse every other time, so that nobody always comes after the same one.
        for name in names if index % 2 == 0 else reversed(names):
            found[name].append(_run(candidates[name], seconds))
    return found


def _run(steps: Sequence[Step], seconds: float) -> Round:
    counts = [0] * len(steps)
    gate = threading.Barrier(len(steps) + 1)

    def work(lane: int) -> None:
        step = steps[lane]
        gate.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step(counts[lane])
            counts[lane] += 1

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(len(steps))]
    for thread in threads:
        thread.start()
    gate.wait()
    wall, cpu = time.monotonic(), cpu_seconds()
    for thread in threads:
        thread.join()
    wall, cpu = time.monotonic() - wall, cpu_seconds() - cpu
    frames = max(1, sum(counts))
    return Round(frames / wall, 1000 * cpu / frames)


def _judge(bundle: Bundle, detector: Detector) -> Judge:
    return Judge(
        calibration=bundle.calibration(detector.status.engine, detector.status.precision),
        pooling=bundle.manifest.pooling,
        crop=bundle.manifest.preprocessing.crop,
        alpha=ALPHA,
        bundle_id=bundle.id,
    )


def whole_path(
    bundle: Bundle, images: Sequence[npt.NDArray[np.uint8]], *, lanes: int, threads: int = CORES
) -> list[Step]:
    """Frame in, decision out: one caller for each stream of one detector, each with its own judge."""
    detector = Detector.open(bundle, engine=Engine.OPENVINO, precision=Precision.INT8, threads=threads, streams=lanes)
    steps: list[Step] = []
    for lane in range(lanes):
        judge = _judge(bundle, detector)

        def step(index: int, judge: Judge = judge, lane: int = lane) -> object:
            image = images[(index + lane) % len(images)]
            return judge.judge(detector.predict(as_frame(image, index, time.monotonic_ns())))

        steps.append(step)
    return steps


def open_bare(
    bundle: Bundle, *, lanes: int, threads: int = CORES
) -> tuple[GraphSession, GraphSession, dict[str, np.ndarray]]:
    """Open trunk and head as the detector does, and the taps of one prepared input."""
    from edge.inference.state import stored_state

    manifest = bundle.manifest
    preprocessing = manifest.preprocessing
    tiles = cut_tiles(to_canvas(frames_1080p(1, seed=9)[0], preprocessing), preprocessing).copy()
    common = {"engine": Engine.OPENVINO, "precision": Precision.INT8, "threads": threads, "streams": lanes}
    trunk = open_graph(
        graph_file(bundle, manifest.trunk, Precision.INT8),
        outputs=manifest.taps,
        input_shapes={IMAGE: tiles.shape},
        **common,
    )
    taps = {name: value.copy() for name, value in trunk.run({IMAGE: tiles}).items()}
    head = open_graph(
        graph_file(bundle, manifest.head, Precision.INT8),
        outputs=[ANOMALY_MAP],
        state=stored_state(bundle),
        input_shapes={name: value.shape for name, value in taps.items()},
        **common,
    )
    return trunk, head, {IMAGE: tiles, **taps}


def bare_graphs(bundle: Bundle, *, lanes: int, threads: int = CORES) -> list[Step]:
    """Run trunk and head alone, on inputs that are there already."""
    trunk, head, prepared = open_bare(bundle, lanes=lanes, threads=threads)
    image = prepared.pop(IMAGE)
    pairs = [(trunk, head)] + [(trunk.clone(), head.clone()) for _ in range(lanes - 1)]

    def lane(pair: tuple[GraphSession, GraphSession]) -> Step:
        mine, taps = {IMAGE: image.copy()}, {name: value.copy() for name, value in prepared.items()}
        return lambda _index: (pair[0].run(mine), pair[1].run(taps))

    return [lane(pair) for pair in pairs]


def bare_trunk(bundle: Bundle, engine: Engine, precision: Precision, *, lanes: int, threads: int) -> list[Step]:
    """Run the trunk alone, pruned to the taps that the head takes."""
    manifest = bundle.manifest
    preprocessing = manifest.preprocessing
    image = cut_tiles(to_canvas(frames_1080p(1, seed=9)[0], preprocessing), preprocessing)
    session = open_graph(
        graph_file(bundle, manifest.trunk, precision),
        engine=engine,
        precision=precision,
        threads=threads,
        streams=lanes,
        outputs=manifest.taps,
        input_shapes={IMAGE: image.shape},
    )
    sessions = [session] + [session.clone() for _ in range(lanes - 1)]

    def lane(one: GraphSession) -> Step:
        mine = {IMAGE: image.copy()}
        return lambda _index: one.run(mine)

    return [lane(one) for one in sessions]


def stage_times(bundle: Bundle, images: Sequence[npt.NDArray[np.uint8]], *, count: int) -> dict[str, list[float]]:
    """Milliseconds of each stage on one thread, stage after stage of the same frame."""
    trunk, head, _ = open_bare(bundle, lanes=1, threads=1)
    detector = Detector.open(bundle, engine=Engine.OPENVINO, precision=Precision.INT8, threads=1)
    judge = _judge(bundle, detector)
    preprocessing = bundle.manifest.preprocessing
    found: dict[str, list[float]] = {name: [] for name in ("resize", "trunk", "head", "judge", "whole path")}
    for index, image in zip(range(count), itertools.cycle(images), strict=False):
        start = time.perf_counter()
        tiles = cut_tiles(to_canvas(image, preprocessing), preprocessing)
        resized = time.perf_counter()
        taps = trunk.run({IMAGE: tiles})
        tapped = time.perf_counter()
        head.run(taps)
        mapped = time.perf_counter()
        prediction = detector.predict(as_frame(image, index))
        predicted = time.perf_counter()
        judge.judge(prediction)
        judged = time.perf_counter()
        marks = (start, resized, tapped, mapped, predicted, judged)
        steps = [1000 * (b - a) for a, b in itertools.pairwise(marks)]
        for name, value in zip(found, (steps[0], steps[1], steps[2], steps[4], steps[3] + steps[4]), strict=True):
            found[name].append(value)
    return found


def _ratio(left: Sequence[Round], right: Sequence[Round], *, of: str = "rate") -> list[float]:
    """Ratios of neighbouring turns; above 1 where ``left`` is faster."""
    if of == "rate":
        return [a.rate / b.rate for a, b in zip(left, right, strict=True)]
    return [b.cpu_ms / a.cpu_ms for a, b in zip(left, right, strict=True)]


def measure_share(bundle: Bundle, *, rounds: int, seconds: float) -> list[Goal]:
    """Whole path beside bare graphs: one caller per core, one caller on both, one thread, and with a cheaper resize."""
    images = frames_1080p(6)
    manifest = bundle.manifest
    preprocessing = manifest.preprocessing.model_copy(update={"resize": Resize.LINEAR})
    linear = dataclasses.replace(bundle, manifest=manifest.model_copy(update={"preprocessing": preprocessing}))
    turns = take_turns(
        {
            "whole path, a caller per core": whole_path(bundle, images, lanes=CORES),
            "bare graphs, a caller per core": bare_graphs(bundle, lanes=CORES),
            "whole path, one caller on both": whole_path(bundle, images, lanes=1),
            "whole path, 1 thread": whole_path(bundle, images, lanes=1, threads=1),
            "bare graphs, 1 thread": bare_graphs(bundle, lanes=1, threads=1),
            "whole path, 1 thread, resize linear": whole_path(linear, images, lanes=1, threads=1),
        },
        rounds=rounds,
        seconds=seconds,
    )
    print(f"1080p BGR frame in, decision out, OpenVINO int8, {CORES} cores\n")
    print("| candidate | frames/s best | median | processor ms per frame, best | median |\n|---|---|---|---|---|")
    for name, rounds_of in turns.items():
        rates, cpu = [turn.rate for turn in rounds_of], [turn.cpu_ms for turn in rounds_of]
        print(f"| {name} | {max(rates):.0f} | {np.median(rates):.0f} | {min(cpu):.2f} | {np.median(cpu):.2f} |")
    print()
    goals = []
    for lane, of, label in (
        ("a caller per core", "rate", "frames/s, 2 cores"),
        ("a caller per core", "cpu", "processor time, 2 cores"),
        ("1 thread", "cpu", "processor time, 1 thread"),
    ):
        whole, bare = turns[f"whole path, {lane}"], turns[f"bare graphs, {lane}"]
        ratios, best = _ratio(whole, bare, of=of), _best(whole, of) / _best(bare, of)
        text = f"{spread(ratios)}; best turn over best turn {best:.2f}"
        goals.append(Goal(f"share of the bare graphs, {label}", float(np.median(ratios)), SHARE_GOAL, True, text))
    return goals


def measure_int8(bundle: Bundle, *, rounds: int, seconds: float) -> list[Goal]:
    """The bare trunk in int8 and float32 on both engines: throughput on 2 cores, latency on one thread."""
    engines = {Engine.OPENVINO: "OpenVINO", Engine.ONNXRUNTIME: "ONNX Runtime"}
    goals = []
    for what, lanes, threads in ((f"{CORES} cores", CORES, CORES), ("1 thread", 1, 1)):
        turns = take_turns(
            {
                f"{engine.value} {precision.value}": bare_trunk(bundle, engine, precision, lanes=lanes, threads=threads)
                for engine in engines
                for precision in (Precision.FLOAT32, Precision.INT8)
            },
            rounds=rounds,
            seconds=seconds,
        )
        print(f"bare trunk, {what}\n")
        print("| engine and precision | frames/s best | median | processor ms per frame, best | median |")
        print("|---|---|---|---|---|")
        for name, rounds_of in turns.items():
            rates, cpu = [turn.rate for turn in rounds_of], [turn.cpu_ms for turn in rounds_of]
            print(f"| {name} | {max(rates):.0f} | {np.median(rates):.0f} | {min(cpu):.2f} | {np.median(cpu):.2f} |")
        print()
        for engine, name in engines.items():
            int8, float32 = turns[f"{engine.value} int8"], turns[f"{engine.value} float32"]
            for of, label in (("rate", "frames/s"), ("cpu", "processor time")):
                ratios = _ratio(int8, float32, of=of)
                best = _best(int8, of) / _best(float32, of)
                goals.append(
                    Goal(
                        f"{name}: int8 trunk over float32, {what}, {label}",
                        float(np.median(ratios)),
                        INT8_GOAL if engine is Engine.OPENVINO else float("nan"),
                        True,
                        f"{spread(ratios)}; best turn over best turn {best:.2f}",
                    )
                )
    return goals


def _best(turns: Sequence[Round], of: str) -> float:
    return max(turn.rate if of == "rate" else 1 / turn.cpu_ms for turn in turns)


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--tiny", action="store_true", help="two short turns, to see that it runs")
    options = parser.parse_args(argv)
    rounds, seconds = (2, 0.05) if options.tiny else (options.rounds, options.seconds)
    # One thread of OpenCV for each caller: both cores have one already.
    cv2.setNumThreads(1)
    heading("throughput")
    with tempfile.TemporaryDirectory() as folder:
        bundle = bundle_for(options.bundle, Path(folder))
        goals = measure_share(bundle, rounds=rounds, seconds=seconds)
        goals += measure_int8(bundle, rounds=rounds, seconds=seconds)
        print("| stage, one thread | ms best | median |\n|---|---|---|")
        for name, values in stage_times(bundle, frames_1080p(6), count=10 if options.tiny else 400).items():
            print(f"| {name} | {min(values):.2f} | {np.median(values):.2f} |")
        print()
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
