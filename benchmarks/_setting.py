"""What benchmarks share: the machine in words, a bundle of the embedded default, 1080p frames, tables of figures.

It must not know what is measured.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge.bundle import Bundle
from edge.frames import Frame

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from tests.mosquitto_process import Mosquitto

HEIGHT, WIDTH = 1080, 1920
PRODUCT = "brick"
"""Kind of the embedded default that bundles are made of."""
# Photographs of several scales and contrasts; a resize costs the same on all, an event's regions do not.
_PHOTOGRAPHS = ("brick.png", "gravel.png", "grass.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure beside its goal.

    Attributes:
        name: what was measured.
        value: the figure that counts.
        limit: the goal; NaN where there is none.
        at_least: whether the goal is a floor; else it is a ceiling.
        spread: how it varied, in words.
        unit: of value and limit.
    """

    name: str
    value: float
    limit: float
    at_least: bool
    spread: str
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the goal is reached; NaN is not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def machine() -> str:
    """Say what this machine is: cores, processor, load now, Python."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    load, python = os.getloadavg()[0], platform.python_version()
    return f"{cores} cores, {names[0] if names else model}, load {load:.1f}, Python {python}"


def heading(name: str) -> None:
    """Print what is measured, where, when and with which command."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{name}: {machine()}, {now}")
    print(f"command: python {' '.join(sys.argv)}\n", flush=True)


def quiet(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def add_bundle_option(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark take a bundle that exists."""
    parser.add_argument("--bundle", type=Path, help="bundle to measure; made from the embedded default if absent")


def bundle_for(
    path: Path | None, folder: Path, *, method: str = "memory", settings: Mapping[str, object] | None = None
) -> Bundle:
    """Open the bundle, or train and pack one of the embedded default in a folder.

    Args:
        path: bundle that exists; None makes one.
        folder: to make it in.
        method: to train.
        settings: of the method.
    """
    if path is not None:
        return Bundle.open(path)
    # Imported here: a box has neither torch nor the trainer.
    from trainer.data.conveyor import write_default
    from trainer.export import export_run
    from trainer.fit import train

    print("making a bundle of the embedded default ...", file=sys.stderr, flush=True)
    write_default(folder / "data", seed=0, kind=PRODUCT, test_good=0, test_defective=0)
    run = train(method=method, data=folder / "data", out=folder / "run", settings=settings, progress=quiet)
    return export_run(run.path, folder / "bundle", progress=quiet)


@contextmanager
def bundle_and_broker(name: str, given: Path | None) -> Iterator[tuple[Path, Bundle, Mosquitto]]:
    """Print the heading, and lend a scratch folder, a bundle and a mosquitto that runs.

    Args:
        name: of the benchmark.
        given: the bundle to measure; None makes one.
    """
    from tests.mosquitto_process import Mosquitto

    if shutil.which("mosquitto") is None:
        raise SystemExit("mosquitto is not on the path; on Debian: apt-get install mosquitto")
    heading(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = bundle_for(given, folder / "bundle")
        (folder / "broker").mkdir()
        broker = Mosquitto(folder / "broker")
        broker.start()
        try:
            yield folder, bundle, broker
        finally:
            broker.stop()


def frames_1080p(count: int, *, seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    """Return photographs as a camera would deliver them: scaled to 1920 x 1080, lit differently, with sensor noise.

    Returns:
        ``count`` images uint8 [1080, 1920, 3] BGR.
    """
    from trainer.data.generic import photograph_folder
    from trainer.data.images import load_image

    rng = np.random.default_rng(seed)
    frames = []
    for index in range(count):
        image = load_image(photograph_folder() / _PHOTOGRAPHS[index % len(_PHOTOGRAPHS)])
        frame = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(np.float32)
        frame *= np.float32(rng.uniform(0.85, 1.1))
        frame += 3.0 * rng.standard_normal(frame.shape, dtype=np.float32)
        frames.append(np.clip(np.rint(frame), 0, 255).astype(np.uint8))
    return frames


def as_frame(image: npt.NDArray[np.uint8], seq: int, captured_ns: int = 0) -> Frame:
    """Wrap an image as a camera's frame."""
    return Frame(
        image=image, camera="cam", camera_seq=seq, captured_ns=captured_ns, captured_at=datetime.now(timezone.utc)
    )


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Say best, median and the middle half of repeated measurements; both ends, since best may be either."""
    low, lower, middle, upper, high = (form.format(v) for v in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
    return f"median {middle}, middle half {lower} to {upper}, all {low} to {high}"


def cpu_seconds() -> float:
    """Return the processor time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def print_goals(goals: Sequence[Goal]) -> None:
    """Print figures against their goals as a Markdown table."""
    print("| figure | measured | goal | | spread |\n|---|---|---|---|---|")
    for goal in goals:
        unit = f" {goal.unit}" if goal.unit else ""
        # Without a limit it is shown for comparison.
        wanted = f"{'>=' if goal.at_least else '<='} {goal.limit:g}{unit}" if math.isfinite(goal.limit) else ""
        verdict = ("met" if goal.met else "missed") if wanted else ""
        print(f"| {goal.name} | {goal.value:.3g}{unit} | {wanted} | {verdict} | {goal.spread} |")
    print(flush=True)
