"""MMAE-ECG on an annotated record and on generated signals, beside PCA, peak to peak and amplitude; and its cost.

    python -m benchmarks.mmae_ecg --part cost                                  1 minute, on a quiet machine
    python -m benchmarks.mmae_ecg --part record --record 208.hea --seeds 0 1 2 3 4
    python -m benchmarks.mmae_ecg --part ecg vibration --seeds 0 1 2 3 4

Each seed is one training of about 2 minutes on a quiet core. What it found is kept in ``--out`` as one JSON a seed, and
is not computed again with the same settings: run it with one seed at a time, then with all for the table. The record's
last 34 % decide nothing: settings are constants below, chosen on generated signals and on the first 66 %, and the
pooling rule of a detector on held-out windows of the first 66 %. Nothing here is, or belongs to, a medical device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks._setting import Goal, heading, machine
from deploy.counting import multiply_accumulates, parameters
from deploy.export import export_fixed_trunk, export_head
from deploy.metrics import image_auroc
from deploy.quantize import quantize_head
from edge.bundle import Engine, Precision, SignalLayout
from edge.inference.engines import available_engines, open_graph
from trainer.data.signals import Bearing, EcgLike
from trainer.methods.mmae_ecg.fit import MmaeConfig, MmaeMethod, autoencoder
from trainer.methods.mmae_ecg.masks import fixed_masks
from trainer.methods.mmae_ecg.model import SIGNAL, MmaeHead, Space
from trainer.signals.evaluate import baseline_rows
from trainer.signals.figures import point_auroc, window_auroc
from trainer.signals.fit import layout_for, split_windows, train
from trainer.signals.reading import test_part, training_part, write_recording
from trainer.signals.recording import cut_windows
from trainer.signals.trunk import SignalTrunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.signals.recording import Windows
    from trainer.signals.runs import SignalRun

PASSES = (1, 12)
SHIFTED_WINDOWS = 100
PEAK_TO_PEAK, POINT, SHIFT = 0.860, 0.80, 0.10
"""What the record must exceed, reach, and stay within."""
PARAMETERS, ACCUMULATES, MILLISECONDS = 417_000, 385e6, 30.0


@dataclass(frozen=True, slots=True)
class Subject:
    """A signal to learn.

    Attributes:
        window_s: seconds of a window; the next begins after half of it.
        settings: of the method.
        band: Hz that are kept, from and to; None for all.
    """

    window_s: float
    settings: dict[str, object]
    band: tuple[float, float] | None = None


SUBJECTS = {
    # 30 segments of 24 samples, runs of 10: the design's sizes for windows of 2 s at 360 Hz. The band is that of the
    # published benchmark of electrocardiograms.
    "record": Subject(2.0, {"segments": 30, "local": 10}, (1.0, 25.0)),
    "ecg": Subject(2.0, {"segments": 30, "local": 10}, (1.0, 25.0)),
    # A knock is shorter than a segment: smoothed over time it lies nowhere.
    "vibration": Subject(0.2, {"segments": 32, "local": 10, "smooth": 0}),
}


def generated(name: str, folder: Path) -> Path:
    """Write the generated recordings of a subject, once."""
    if not (folder / "train").is_dir():
        if name == "ecg":
            parts = {"train": EcgLike().recording(600, 1), "test": EcgLike(ectopic=0.15).recording(300, 2)}
        else:
            parts = {
                "train": Bearing().recording(60, 1),
                "test": Bearing(fault=0.6, episodes=((10, 20), (30, 35))).recording(40, 2),
            }
        for part, recording in parts.items():
            write_recording(folder / part / f"{name}.npz", recording)
    return folder


def one_seed(name: str, data: Path, out: Path, seed: int, overrides: dict[str, object]) -> dict[str, Any]:
    """Train and judge with one seed, or read what the same settings gave before."""
    kept = out / f"{name}-{seed}.json"
    subject, started = SUBJECTS[name], time.monotonic()
    settings = {**subject.settings, **overrides}
    asked = {
        "data": str(data.resolve()), "window_s": subject.window_s, "band": subject.band and list(subject.band),
        "settings": MmaeMethod.config("quick").model_copy(update=settings).model_dump(mode="json"),
    }  # fmt: skip
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["asked"] == asked:
            return found
        print(f"{kept}: is of other settings", flush=True)
    low_hz, high_hz = subject.band or (None, None)
    print(f"{name}, seed {seed}: training", flush=True)
    run = train(
        method="mmae_ecg",
        data=data,
        out=out / f"{name}-{seed}",
        window_s=subject.window_s,
        seed=seed,
        device="cpu",
        low_hz=low_hz,
        high_hz=high_hz,
        settings=settings,
        progress=lambda what, done, total: (
            print(f"  {what} {done}/{total}", flush=True) if done and done % 1000 == 0 else None
        ),
    )
    windows = cut_windows(test_part(data), run.record.signal.window, run.record.signal.hop)
    found = figures(run, windows) | {
        "asked": asked,
        "seed": seed,
        "loss": run.record.loss,
        "train_windows": run.record.train_windows,
        "pooling_cells": run.record.pooling.cells,
        "good": int((~windows.anomalous).sum()),
        "anomalous": int(windows.anomalous.sum()),
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine(),
    }
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def figures(run: SignalRun, windows: Windows) -> dict[str, Any]:
    """Return what a trained detector says of labelled windows."""
    found: dict[str, Any] = {}
    labels = windows.anomalous
    for passes in PASSES:
        head = with_passes(run, passes)
        with torch.inference_mode():
            tap = run.trunk(torch.from_numpy(windows.values))[0]
            scores = [torch.cat(part).numpy() for part in zip(*map(head.sample_scores, tap.split(64)), strict=True)]
            maps = [
                head.smoothed(torch.cat(part)).numpy()
                for part in zip(*map(head.point_scores, tap.split(64)), strict=True)
            ]
        for space, score, points in zip(("raw", "normalised"), scores, maps, strict=True):
            interval = window_auroc(labels, score, windows.groups)
            found[f"{space} H={passes}"] = {
                "auroc": interval.value, "low": interval.low, "high": interval.high,
                "highest_point_auroc": image_auroc(labels, points.max((1, 2))),
                "point_auroc": point_auroc(windows.points, points),
            }  # fmt: skip
    pooled = window_auroc(labels, run.scores(windows.values), windows.groups)
    found["as on a box"] = {"auroc": pooled.value, "low": pooled.low, "high": pooled.high}
    found["shift"] = shift_change(run)
    return found


def with_passes(run: SignalRun, passes: int) -> MmaeHead:
    """Return the same network judged by another number of passes."""
    head = run.head
    assert isinstance(head, MmaeHead)
    masks = fixed_masks(head.network.scales, passes, run.record.seed)
    smooth = float(run.record.config["smooth"])
    return MmaeHead(head.network, masks, floor=head.floor, space=head.space, cell=head.map_stride, smooth=smooth).eval()


def shift_change(run: SignalRun) -> float:
    """Return the median relative change of held-out good windows' scores when each is turned by whole segments."""
    head = with_passes(run, PASSES[-1])
    windows = run.holdout[:SHIFTED_WINDOWS]
    length, segments = head.network.length, head.network.scales.segments
    turns = np.random.default_rng(0).integers(1, segments, len(windows)) * length
    turned = np.stack([np.roll(one, int(turn), 1) for one, turn in zip(windows, turns, strict=True)])
    with torch.inference_mode():
        before, after = (
            head.sample_scores(run.trunk(torch.from_numpy(one))[0])[1].numpy() for one in (windows, turned)
        )
    return float(np.median(np.abs(after - before) / before))


def table(name: str, data: Path, found: Sequence[dict[str, Any]]) -> list[Goal]:
    """Print means over seeds beside the baselines, and return the figures with goals."""
    subject = SUBJECTS[name]
    recordings = training_part(data)
    low_hz, high_hz = subject.band or (None, None)
    layout = layout_for(recordings, window_s=subject.window_s, hop_s=None, low_hz=low_hz, high_hz=high_hz)
    windows = cut_windows(test_part(data), layout.window, layout.hop)
    rows = baseline_rows(split_windows(recordings, layout.window)[0].values, windows, layout)
    first = found[0]
    print(
        f"\n{name}: {first['train_windows']} good windows learned, {first['good']} good and {first['anomalous']} "
        f"anomalous judged; seeds {[one['seed'] for one in found]}, loss {[round(one['loss'], 3) for one in found]}"
    )
    print(f"{'score':28s}{'window AUROC':>14s}{'95 % interval':>18s}{'over seeds':>16s}{'point AUROC':>13s}")
    for row in rows:
        point = "-" if row.point is None else f"{row.point:.3f}"
        interval = f"{row.window.low:.3f} - {row.window.high:.3f}"
        print(f"{row.name:28s}{row.window.value:14.3f}{interval:>18s}{'':16s}{point:>13s}")
    for score in [f"{space} H={passes}" for space in ("normalised", "raw") for passes in PASSES] + ["as on a box"]:
        values = [one[score]["auroc"] for one in found]
        points = [one[score]["point_auroc"] for one in found if "point_auroc" in one[score]]
        # The median seed's interval: of the windows, not of the seeds.
        middle = found[int(np.argsort(values)[len(values) // 2])][score]
        interval = f"{middle['low']:.3f} - {middle['high']:.3f}"
        spread = f"{min(values):.3f} - {max(values):.3f}"
        point = f"{statistics.mean(points):.3f}" if points else "-"
        print(f"{'MMAE ' + score:28s}{statistics.mean(values):14.3f}{interval:>18s}{spread:>16s}{point:>13s}")
    few, many = ([one[f"normalised H={passes}"]["auroc"] for one in found] for passes in PASSES)
    ranges = {row.name: row.window.value or 0.0 for row in rows}
    points = [one["raw H=12"]["point_auroc"] for one in found]
    shifts = [one["shift"] for one in found]
    goals = [
        Goal(f"{name}: 12 passes above one", statistics.mean(many) - statistics.mean(few), 0.0, at_least=True,
             spread=f"spread {np.ptp(many):.3f} beside {np.ptp(few):.3f}"),
        Goal(f"{name}: point AUROC, raw", statistics.mean(points), POINT, at_least=True,
             spread=f"{np.ptp(points):.3f}"),
        Goal(f"{name}: change by a circular shift", statistics.mean(shifts), SHIFT, at_least=False,
             spread=f"{np.ptp(shifts):.3f}"),
    ]  # fmt: skip
    if name == "record":
        for what, limit in (("as published", PEAK_TO_PEAK), ("in the same band", ranges["peak to peak"])):
            goals.insert(0, Goal(f"record: above peak to peak {what}", statistics.mean(many), limit, at_least=True,
                                 spread=f"{np.ptp(many):.3f}"))  # fmt: skip
    return goals


def cost(folder: Path, repeats: int) -> list[Goal]:
    """Count and time the graphs of 12 leads and 10 s of 480 samples each: the band, and 12 passes in one call."""
    config = MmaeConfig()
    leads = tuple(f"lead {index}" for index in range(12))
    layout = SignalLayout(channels=leads, unit="mV", rate_hz=480, window=4800, hop=480, low_hz=1.0, high_hz=25.0)
    window = np.random.default_rng(0).standard_normal((1, 12, 4800)).astype(np.float32)
    trunk = folder / "trunk.onnx"
    export_fixed_trunk(SignalTrunk.of(window, layout), trunk, shape=window.shape[1:])
    network = autoencoder(config, channels=12, samples=4800)
    network.initialise(torch.Generator().manual_seed(0))
    masks = fixed_masks(network.scales, config.passes, 0)
    head = MmaeHead(
        network, masks, floor=torch.full((12, 1), 0.3), space=Space.BOTH, cell=16, smooth=config.smooth
    ).eval()
    plain, small = folder / "head.onnx", folder / "head.int8.onnx"
    export_head(head, plain, tap_shapes={SIGNAL: (1, 12, 4800)})
    generator = np.random.default_rng(0)
    quantised = quantize_head(
        plain, small, [{SIGNAL: generator.standard_normal((1, 1, 12, 4800)).astype(np.float32)} for _ in range(8)],
        float_ops=head.float_ops,
    )  # fmt: skip
    print(f"{len(quantised)} matrix products in int8")
    of_passes = multiply_accumulates(plain, {SIGNAL: (1, *window.shape)}) / 1e6
    with_band = of_passes + multiply_accumulates(trunk, {"image": window.shape}) / 1e6
    goals = [
        Goal("parameters, in the graph", parameters(plain), PARAMETERS, at_least=False, spread="exact"),
        Goal("million multiply-accumulates, 12 passes", of_passes, ACCUMULATES / 1e6, at_least=False, spread="exact"),
        Goal("... and the band", with_band, ACCUMULATES / 1e6, at_least=False, spread="exact"),
    ]  # fmt: skip
    for engine in available_engines():
        for precision, path in ((Precision.FLOAT32, plain), (Precision.INT8, small)):
            band = open_graph(trunk, engine=engine, precision=Precision.FLOAT32, threads=2)
            session = open_graph(
                path, engine=engine, precision=precision, threads=2, input_shapes={SIGNAL: (1, *window.shape)}
            )
            times = []
            for _ in range(repeats + 5):
                started = time.perf_counter()
                session.run({SIGNAL: band.run({"image": window})[SIGNAL]})
                times.append((time.perf_counter() - started) * 1e3)
            kept = sorted(times[5:])
            spread = f"{kept[len(kept) // 10]:.1f} - {kept[-1 - len(kept) // 10]:.1f}"
            goals.append(
                Goal(f"{Engine(engine).value} {precision.value}, 2 threads", statistics.median(kept), MILLISECONDS,
                     at_least=False, spread=spread, unit="ms")
            )  # fmt: skip
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=("cost", *SUBJECTS), default=["cost"])
    parser.add_argument("--record", type=Path, help="an annotated record: NAME.hea with NAME.atr beside it, or an npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("mmae_ecg_runs"), help="runs and what they gave, kept")
    parser.add_argument("--steps", type=int, help="fewer, to try it; kept apart from what counts")
    parser.add_argument("--repeats", type=int, default=60, help="of the timing")
    options = parser.parse_args()
    heading("mmae_ecg")
    torch.set_num_threads(1)
    out = options.out if options.steps is None else options.out / f"steps-{options.steps}"
    overrides = {} if options.steps is None else {"steps": options.steps, "loss_gate": 9.0}
    out.mkdir(parents=True, exist_ok=True)
    goals: list[Goal] = []
    for part in options.part:
        if part == "cost":
            work = Path(tempfile.mkdtemp())
            goals += cost(work, options.repeats)
            shutil.rmtree(work, ignore_errors=True)
            continue
        if part == "record" and options.record is None:
            parser.error("--part record needs --record, such as the header of MIT-BIH record 208")
        data = options.record if part == "record" else generated(part, options.out / part)
        goals += table(part, data, [one_seed(part, data, out, seed, overrides) for seed in options.seeds])
    print()
    for goal in goals:
        limit = f"goal {'>=' if goal.at_least else '<='} {goal.limit:g}: {'met' if goal.met else 'missed'}"
        print(f"{goal.name:45s}{goal.value:12.4g} {goal.unit:3s}({goal.spread})  {limit}")


if __name__ == "__main__":
    main()
