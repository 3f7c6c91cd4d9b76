"""What the demo says at its end: one table on accuracy, speed and the replay.

It knows figures and words; it must not know how a detector was trained or a box run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import cv2
import numpy as np
from rich.table import Table

from edge.frames import Frame
from edge.inference.detector import Detector
from trainer.evaluation.replay import score_replay

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deploy.evaluation import Evaluation
    from edge.bundle import Bundle
    from trainer.evaluation.live import Replay
    from trainer.evaluation.stream import Stream

Row = tuple[str, str]
"""Figure and value."""

LATE_FRAMES = 4
"""A web's event may begin so many frames after its defect has left, since some hits of some frames begin it."""

_SPEED_FRAMES = 16


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What was shown of one product.

    Attributes:
        name: of the product.
        parts: whether every frame of the replay is another part (else a web in motion, seen on several frames).
        stream: the replay's frames and what is on them.
        found: figures on labelled test images.
        result: what a subscriber received.
        speed: frames per second of the detector on this machine.
    """

    name: str
    parts: bool
    stream: Stream
    found: Evaluation
    result: Replay
    speed: float

    def rows(self) -> list[Row]:
        """Return every row; the same names in the same order for every product."""
        return [*self._accuracy(), *self._speed(), *self._replay()]

    def _accuracy(self) -> list[Row]:
        figures = self.found.figures()
        rows = [
            (name, "no masks" if figures[key] is None and key != "image_auroc" else _figure(figures[key]))
            for name, key in (("I-AUROC", "image_auroc"), ("P-AUROC", "pixel_auroc"), ("AUPRO (0.3)", "aupro"))
        ]
        return [*rows, ("  of test images, good + defective", f"{figures['n_good']} + {figures['n_defective']}")]

    def _speed(self) -> list[Row]:
        status = self.result.status
        total = status.latency_ms.get("total") if status else None
        verdict = f"{total['p50']:.1f} / {total['p99']:.1f} ms" if total else "-"
        received = self.result.latency_ms()
        subscriber = "-"
        if received.size:
            p50, p99 = np.percentile(received, [50, 99])
            subscriber = f"{p50:.1f} / {p99:.1f} ms"
        return [
            ("frames per second, frame to map", f"{self.speed:.0f}"),
            ("  on", f"{status.engine} {status.precision}" if status else "-"),
            ("latency p50 / p99, frame to verdict", verdict),
            ("  of alerts, frame to subscriber", subscriber),
        ]

    def _replay(self) -> list[Row]:
        labels = self.stream.labels
        score = score_replay(
            self.stream.defects,
            self.result.events(len(labels) - 1),
            delay=0 if self.parts else LATE_FRAMES,
        )
        good = labels.count("")
        allowed = f" ({self.found.threshold.alpha * good:.0f} allowed)" if self.parts else ""
        return [
            ("replay, frames with + without defect", f"{len(labels) - good} + {good}"),
            ("  defects found", f"{len(score.found)} of {len(self.stream.defects)}"),
            ("  missed defects", str(len(score.missed))),
            ("  false alarms", f"{len(score.false_alarms)}{allowed}"),
        ]


def summary_table(shown: Sequence[Demonstration]) -> Table:
    """Return a table with one column per product."""
    table = Table(title=f"method {shown[0].found.subject.method}", title_justify="left", title_style="dim")
    table.add_column("")
    for one in shown:
        table.add_column(one.name, justify="right")
    for cells in zip(*(one.rows() for one in shown), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    return table


def frames_per_second(bundle: Bundle, frames: Path, *, seconds: float = 2.0) -> float:
    """Measure how many decoded frames a detector turns into maps on this machine, one after another.

    Args:
        bundle: of the detector, on the engine and precision that a box would choose.
        frames: folder of images; the first 16 are used.
        seconds: to measure for.
    """
    detector = Detector.open(bundle)
    images = [cv2.imread(str(path)) for path in sorted(frames.iterdir())[:_SPEED_FRAMES]]
    now = datetime.now(timezone.utc)
    shots = [
        Frame(image=image, camera="cam-1", camera_seq=i, captured_ns=0, captured_at=now)
        for i, image in enumerate(images)
        if image is not None
    ]
    count, started = 0, time.monotonic()
    while (spent := time.monotonic() - started) < seconds:
        detector.predict(shots[count % len(shots)])
        count += 1
    return count / spent


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
