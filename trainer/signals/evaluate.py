"""Judging labelled recordings by a run or a bundle: windows, points, and the baselines beside them in one table.

The threshold is frozen before the first test window. It must not know how figures are shown.
"""

from __future__ import annotations

import json as jsonlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from deploy.evaluation import Subject, write_whole
from deploy.metrics import fpr_at_threshold, image_ap, recall_at_threshold
from deploy.running import pool_all
from edge.bundle import Bundle, Engine, Precision
from edge.errors import DataError, UsageError
from edge.inference.detector import Detector
from edge.inference.signals import lost_cells
from edge.judgement.threshold import fit_threshold
from trainer.signals.baselines import amplitude, pca, peak_to_peak
from trainer.signals.figures import Interval, point_auroc, window_auroc
from trainer.signals.fit import split_windows
from trainer.signals.reading import test_part, training_part
from trainer.signals.recording import cut_windows, one_kind
from trainer.signals.report import draw, write_signal_report
from trainer.signals.runs import SignalRun
from trainer.signals.trunk import SignalTrunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import SignalLayout
    from edge.judgement.threshold import Threshold
    from trainer.signals.recording import Recording, Windows

    Judge = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]

COMPONENTS = (8, 32)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: what scored.
        window: AUROC over windows.
        point: AUROC over the cells of anomalous windows; None where there is no map.
    """

    name: str
    window: Interval
    point: float | None


@dataclass(frozen=True, slots=True)
class SignalEvaluation:
    """How a detector did on labelled windows.

    Attributes:
        subject: which detector.
        layout: the signal.
        threshold: frozen, from held-out good windows.
        windows: that were judged.
        maps: float32 [n, K, cells].
        scores: float32 [n].
        milliseconds: float64 [n], wall time of each window.
        rows: the detector, then the baselines.
        notes: one sentence each.
    """

    subject: Subject
    layout: SignalLayout
    threshold: Threshold
    windows: Windows
    maps: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    milliseconds: npt.NDArray[np.float64]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """Return the figures by name; None where undefined."""
        labels = self.windows.anomalous
        own = self.rows[0]
        return {
            "product": self.subject.product,
            "method": self.subject.method,
            "engine": self.subject.engine,
            "precision": self.subject.precision,
            "window_auroc": own.window.value,
            "window_auroc_low": own.window.low,
            "window_auroc_high": own.window.high,
            "window_ap": image_ap(labels, self.scores),
            "point_auroc": own.point,
            "fpr_at_threshold": fpr_at_threshold(labels, self.scores, self.threshold.value),
            "recall_at_threshold": recall_at_threshold(labels, self.scores, self.threshold.value),
            "threshold": self.threshold.value,
            "alpha": self.threshold.alpha,
            "budget_supported": self.threshold.budget_supported,
            "ms_per_window": float(self.milliseconds.mean()),
            "ms_p99": float(np.quantile(self.milliseconds, 0.99)),
            "n_good": int((~labels).sum()),
            "n_anomalous": int(labels.sum()),
            "baselines": {
                row.name: {
                    "window_auroc": row.window.value,
                    "window_auroc_low": row.window.low,
                    "window_auroc_high": row.window.high,
                    "point_auroc": row.point,
                }
                for row in self.rows[1:]
            },
            "notes": list(self.notes),
        }


def evaluate_signal(
    *,
    run: Path | None,
    bundle: Path | None,
    data: Path,
    json: Path | None = None,
    report: Path | None = None,
    picture: Path | None = None,
    engine: Engine | None = None,
    precision: Precision | None = None,
    alpha: float = 0.01,
) -> SignalEvaluation:
    """Judge the test part of recordings, print the figures beside the baselines', and write what is asked for.

    Args:
        run: folder of a run; or
        bundle: folder of a bundle.
        data: recordings, see :func:`trainer.signals.reading.test_part`.
        json: where to write the figures.
        report: where to write the HTML report.
        picture: where to draw the strongest findings, PNG or SVG.
        engine: of a bundle; None for the box's own choice.
        precision: of a bundle; None for the box's own choice.
        alpha: false-alarm probability per good window for which the threshold is set.

    Raises:
        UsageError: not exactly one of run and bundle, or an engine or precision for a run.
        DataError: the recordings, the run or an output file cannot be used.
        BundleError: the bundle is damaged or not calibrated for the engine and precision.
        EngineError: no engine runs the bundle here.
    """
    if (run is None) == (bundle is None):
        raise UsageError("give exactly one of --run and --bundle")
    if run is not None and (engine is not None or precision is not None):
        raise UsageError("--engine and --precision belong to a bundle; a run is judged by torch in float32")
    subject = _of_run(run, alpha) if run is not None else _of_bundle(bundle, engine, precision, alpha)  # type: ignore[arg-type]
    named, layout, judge, pool, threshold, identity = subject
    recordings = test_part(data)
    kind = one_kind(recordings)
    if kind != (layout.channels, layout.unit, layout.rate_hz):
        raise DataError(
            f"{data}: is {', '.join(kind[0])} in {kind[1]} at {kind[2]:g} Hz, the detector judges "
            f"{', '.join(layout.channels)} in {layout.unit} at {layout.rate_hz:g} Hz"
        )
    windows = cut_windows(recordings, layout.window, layout.hop, max_lost=layout.max_lost)
    if not len(windows):
        raise DataError(f"{data}: no test recording is as long as a window of {layout.window} samples")
    maps, milliseconds = [], []
    for window in windows.values:
        started = time.perf_counter()
        maps.append(judge(window))
        milliseconds.append((time.perf_counter() - started) * 1e3)
    found = np.stack(maps)
    _hide_lost(found, recordings, windows, layout)
    scores = pool(found)
    rows, notes = _baselines(data, layout, windows)
    notes += _notes(windows, threshold)
    notes.append(f"{'Bundle' if run is None else 'Run'} {identity}, judged on {data}.")
    own = Row(named.method, window_auroc(windows.anomalous, scores, windows.groups), point_auroc(windows.points, found))
    evaluation = SignalEvaluation(
        named, layout, threshold, windows, found, scores, np.array(milliseconds), (own, *rows), tuple(notes)
    )
    if json is not None:
        write_whole(json, jsonlib.dumps(evaluation.figures(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if report is not None:
        write_signal_report(report, evaluation)
    if picture is not None:
        draw(evaluation, picture)
    _print(evaluation, Console())
    return evaluation


def baseline_rows(train: npt.NDArray[np.float32], windows: Windows, layout: SignalLayout) -> list[Row]:
    """Return what the baselines say of the same band, fitted on good windows float32 [n, K, Q] in the signal's unit."""
    trunk = SignalTrunk.of(train, layout)
    with torch.inference_mode():
        good = trunk(torch.from_numpy(train))[0]
        tap = trunk(torch.from_numpy(windows.values))[0]
    rows, scaled = [], tap[:, 0].numpy()
    for components in COMPONENTS:
        if len(good) > components:
            with torch.inference_mode():
                residual = pca(good[:, 0], components)(tap)[0].numpy()
            rows.append(_row(f"PCA-{components} residual", residual.mean((1, 2)), windows, residual))
    rows.append(_row("peak to peak", peak_to_peak(scaled), windows, None))
    rows.append(_row("amplitude", amplitude(scaled), windows, np.abs(scaled)))
    return rows


def _hide_lost(
    maps: npt.NDArray[np.float32], recordings: Sequence[Recording], windows: Windows, layout: SignalLayout
) -> None:
    """Give cells that cover too many lost samples the value 0, in place, as a box does."""
    samples = {one.name: one.samples for one in recordings}
    for name, map_ in zip(windows.names, maps, strict=True):
        recording, _, begin = str(name).rpartition("@")
        window = samples[recording][:, int(begin) : int(begin) + layout.window]
        dead = lost_cells(window, map_.shape, layout.max_lost)
        if dead is not None:
            map_[dead] = 0.0


def _baselines(data: Path, layout: SignalLayout, windows: Windows) -> tuple[list[Row], list[str]]:
    try:
        train = split_windows(training_part(data), layout.window)[0]
    except DataError as error:
        return [], [f"No baselines: {error}."]
    return baseline_rows(train.values, windows, layout), []


def _notes(windows: Windows, threshold: Threshold) -> list[str]:
    notes = []
    if windows.anomalous.any() and not windows.points.any():
        notes.append("Labels are of whole recordings, so that there is no AUROC over points.")
    if not threshold.budget_supported:
        notes.append(
            f"The false-alarm rate of {threshold.alpha:g} per window is extrapolated from {threshold.n_groups} good "
            f"stretches of a window's length; they support {threshold.smallest_supported_alpha:.3g} at best."
        )
    return notes


def _row(name: str, scores: npt.NDArray[np.floating], windows: Windows, maps: npt.NDArray[np.floating] | None) -> Row:
    point = None if maps is None else point_auroc(windows.points, maps)
    return Row(name, window_auroc(windows.anomalous, scores, windows.groups), point)


def _of_run(path: Path, alpha: float) -> tuple[Subject, SignalLayout, Judge, Judge, Threshold, str]:
    run = SignalRun.load(path)
    record = run.record
    return (
        Subject(record.product, record.method, "torch", Precision.FLOAT32.value),
        record.signal,
        lambda window: run.maps(window[np.newaxis])[0],
        lambda maps: pool_all(maps, record.pooling),
        fit_threshold(run.scores(run.holdout), run.groups, alpha),
        f"{path} of {record.created:%Y-%m-%d %H:%M} UTC",
    )


def _of_bundle(
    path: Path, engine: Engine | None, precision: Precision | None, alpha: float
) -> tuple[Subject, SignalLayout, Judge, Judge, Threshold, str]:
    detector = Detector.open(Bundle.open(path), engine=engine, precision=precision)
    manifest, status = detector.bundle.manifest, detector.status
    if manifest.signal is None:
        raise UsageError(f"--bundle {path}: judges no signal; give one whose modality is signal")
    calibration = detector.bundle.calibration(status.engine, status.precision)
    return (
        Subject(manifest.product, manifest.method, status.engine.value, status.precision.value),
        manifest.signal,
        detector.map_of_canvas,
        lambda maps: pool_all(maps, manifest.pooling),
        fit_threshold(calibration.scores, calibration.groups, alpha),
        detector.bundle.id,
    )


def _print(found: SignalEvaluation, console: Console) -> None:
    subject, figures = found.subject, found.figures()
    table = Table(title=f"{subject.product}: {subject.method} on {subject.engine} {subject.precision}")
    table.add_column("score")
    for heading in ("window AUROC", "95 % interval", "point AUROC"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(row.name, *cells_of(row))
    console.print(table)
    shares = " and ".join(
        f"{name} {'-' if figures[key] is None else format(figures[key], '.3f')}"
        for name, key in (("false alarms", "fpr_at_threshold"), ("recall", "recall_at_threshold"))
    )
    console.print(
        f"{figures['n_good']} good and {figures['n_anomalous']} anomalous windows of {found.layout.window_s:g} s; "
        f"at the threshold {shares}; {figures['ms_per_window']:.1f} ms per window",
        highlight=False,
    )
    for note in found.notes:
        console.print(note, style="dim", markup=False)


def cells_of(row: Row) -> tuple[str, str, str]:
    """Return the figures of a row as text."""
    window = row.window
    if window.value is None:
        return "-", "-", "-"
    return (
        f"{window.value:.3f}",
        f"{window.low:.3f} - {window.high:.3f}",
        "-" if row.point is None else f"{row.point:.3f}",
    )
