"""A box in a process of its own whose cameras replay decoded frames from memory: no decoder stands beside the judging.

Run by other benchmarks: ``python -m benchmarks._load_box SPEC.json``; it says READY, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from edge.bundle import Bundle
    from edge.capture.settings import SourceSettings
    from edge.capture.sources import Grab
    from edge.frames import Verdict

READY = "ready"
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Spec:
    """What a box is to do.

    Attributes:
        settings: of the box, with one camera that stands for all.
        cameras: how many of them.
        fps: of each camera.
        frames: file with images uint8 [n, H, W, 3] BGR.
        cycle: which image is shown when; starts over at its end.
        together: all cameras show the same frame at the same moment; else each begins at a frame and a time of its own,
            drawn once.
        warm_s: seconds before anything is measured.
        seconds: that are measured; 0 until standard input is closed.
        cores: that the process may use; 0 for all.
    """

    settings: dict[str, Any]
    cameras: int
    fps: float
    frames: str
    cycle: tuple[int, ...]
    together: bool = False
    warm_s: float = 1.0
    seconds: float = 0.0
    cores: int = 2


@dataclass
class Report:
    """What it did.

    Attributes:
        seconds: measured.
        offered: frames that the cameras gave in that time.
        judged: frames judged in that time.
        dropped: frames dropped in that time.
        latency_ms: percentile -> milliseconds from a frame's capture to its verdict.
        rss_mb: resident memory at the end of that time, without the frames that are replayed.
        threads: of the process then.
        cpu_s: processor time in that time.
        totals: of the whole run, after the stop: captured, judged, not_judged, dropped, corrupt.
        store_ms: percentiles of what storing an alert took.
    """

    seconds: float
    offered: int
    judged: int
    dropped: int
    latency_ms: dict[str, float]
    rss_mb: float
    threads: int
    cpu_s: float
    totals: dict[str, int]
    store_ms: dict[str, float] = field(default_factory=dict)

    @property
    def unaccounted(self) -> int:
        """Frames that were captured and neither judged nor counted as lost; 0 unless the box loses track."""
        totals = self.totals
        return totals["captured"] - totals["judged"] - totals["not_judged"] - totals["dropped"]


def box_settings(bundle: Bundle, folder: Path, url: str, **camera: Any) -> dict[str, Any]:  # noqa: ANN401 (YAML values)
    """Settings of a box of one replayed camera, int8 on OpenVINO."""
    return {
        "site": "bench", "box": "box", "state_dir": str(folder), "bundle": str(bundle.path.resolve()),
        "engine": "openvino", "precision": "int8", "broker": {"url": url}, "status_every_s": 5.0,
        "cameras": [{"name": "cam", **camera}],
    }  # fmt: skip


def replay_frames(bundle: Bundle, folder: Path) -> tuple[Path, float]:
    """Write decoded frames that a bundle calls good (even numbers) and defective (odd), and a threshold between them.

    Returns:
        The file for :attr:`Spec.frames`, of 12 images of 1920 x 1080, and the raw threshold.
    """
    from benchmarks.box import write_frames

    threshold = write_frames(bundle, folder / "images")
    images = [cv2.imread(str(path)) for path in sorted((folder / "images").iterdir())]
    np.save(folder / "frames.npy", np.stack(images))
    return folder / "frames.npy", threshold


@contextmanager
def load_box(spec: Spec, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a box and wait until it judges; the end closes its standard input, see :func:`report_of`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.json"
    path.write_text(json.dumps(asdict(spec)), encoding="utf-8")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "box.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._load_box", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != READY:
                process.wait(PATIENCE_S)
                raise SystemExit(f"the box does not start: {(folder / 'box.log').read_text(encoding='utf-8')[-2000:]}")
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def report_of(process: subprocess.Popen[str]) -> Report:
    """Let a box come to its end and read what it did."""
    out, _ = process.communicate(timeout=PATIENCE_S)
    return Report(**json.loads(out.splitlines()[-1]))


class MemorySource:
    """Shows the images of a cycle, for ever; the first one after ``delay_s``."""

    def __init__(self, images: npt.NDArray[np.uint8], cycle: Sequence[int], delay_s: float) -> None:
        self._images, self._cycle, self._delay_s = images, cycle, delay_s
        self._next = 0

    def open(self) -> None:
        """Nothing to open."""

    def read(self) -> Grab:
        """The next image; it is shared, not copied."""
        from edge.capture.sources import Grab

        if self._next == 0:
            time.sleep(self._delay_s)
        image = self._images[self._cycle[self._next % len(self._cycle)]]
        self._next += 1
        return Grab(image, str(self._next - 1))

    def close(self) -> None:
        """Nothing to close."""


def run(spec: Spec) -> Report:
    """Run a box in this process."""
    from edge.box import Box
    from edge.process_memory import use_few_arenas
    from edge.settings import BoxSettings

    use_few_arenas()  # as `lineward run` does
    images = np.load(spec.frames)
    images.setflags(write=False)
    (camera,) = spec.settings["cameras"]
    source = {"kind": "folder", "path": "/replayed from memory", "fps": spec.fps, "loop": True, **camera["source"]}
    cameras = [{**camera, "name": f"cam{n}", "source": source} for n in range(spec.cameras)]
    settings = BoxSettings.model_validate({**spec.settings, "cameras": cameras})
    latencies: list[float] = []
    measuring = threading.Event()

    def on_verdict(_name: str, verdict: Verdict) -> None:
        if measuring.is_set() and "total" in verdict.latency_ms:
            latencies.append(verdict.latency_ms["total"])

    phase = random.Random(0)

    def build(_settings: SourceSettings) -> MemorySource:
        if spec.together:
            return MemorySource(images, spec.cycle, 0.0)
        turn = phase.randrange(len(spec.cycle))
        return MemorySource(images, spec.cycle[turn:] + spec.cycle[:turn], phase.uniform(0, 1 / spec.fps))

    with mock.patch("edge.capture.capture.build_source", build):
        box = Box(settings, on_verdict=on_verdict)
        box.start()
    _supervise(box, spec.warm_s)
    before, cpu, began = _counts(box), _cpu_s(), time.monotonic()
    measuring.set()
    print(READY, flush=True)
    if spec.seconds:
        _supervise(box, spec.seconds)
    else:
        done = threading.Thread(target=sys.stdin.read, daemon=True)
        done.start()
        while done.is_alive():
            _supervise(box, 0.2)
    measuring.clear()
    seconds, cpu, after = time.monotonic() - began, _cpu_s() - cpu, _counts(box)
    memory = {line.split(":")[0]: line.split()[1] for line in _proc_status() if line.startswith(("VmRSS", "Threads"))}
    store = box.status()["latency_ms"].get("store", {})
    box.stop()
    return Report(
        seconds=seconds,
        offered=after["captured"] - before["captured"],
        judged=after["judged"] - before["judged"],
        dropped=after["dropped"] - before["dropped"],
        latency_ms={name: float(np.percentile(latencies or [np.nan], q)) for name, q in (("p50", 50), ("p99", 99))},
        rss_mb=int(memory["VmRSS"]) / 1024 - images.nbytes / 2**20,
        threads=int(memory["Threads"]),
        cpu_s=cpu,
        totals=_counts(box),
        store_ms=store,
    )


def _supervise(box: Any, seconds: float) -> None:  # noqa: ANN401 (imported late)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        box.supervise()
        time.sleep(min(0.2, left))


def _counts(box: Any) -> dict[str, int]:  # noqa: ANN401 (imported late)
    cameras = box.status()["cameras"].values()
    names = ("captured", "judged", "not_judged", "dropped", "corrupt")
    return {name: sum(camera["counters"][name] for camera in cameras) for name in names}


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def _proc_status() -> list[str]:
    return Path("/proc/self/status").read_text(encoding="ascii").splitlines()


def main() -> None:
    """Read the specification, run, print the report."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    spec = Spec(**given | {"cycle": tuple(given["cycle"])})
    if spec.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec.cores])
    print(json.dumps(asdict(run(spec))), flush=True)


if __name__ == "__main__":
    main()
