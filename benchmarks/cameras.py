"""How many cameras does a box carry: frames judged, latency, drops under each strategy, memory of one camera more.

A box of its own per point, with a real mosquitto; its cameras replay decoded 1080p frames from memory at a fixed pace,
so that beyond its capacity the strategy decides. Takes about 4 minutes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks._load_box import Report, Spec, box_settings, load_box, replay_frames, report_of
from benchmarks._setting import Goal, add_bundle_option, bundle_and_broker, print_goals
from edge.capture.settings import DropPolicy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.bundle import Bundle

COUNTS = (1, 2, 4, 8, 16, 32)
FPS = 15.0
CAMERA_GOAL_MB = 15.0
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "load.png"
Curve = dict[DropPolicy, dict[int, Report]]


def measure(bundle: Bundle, folder: Path, url: str, options: argparse.Namespace) -> Curve:
    """Run a box per strategy and count of cameras."""
    frames, threshold = replay_frames(bundle, folder)
    found: Curve = {policy: {} for policy in DropPolicy}
    for count in options.counts:
        for policy in DropPolicy:
            place = folder / f"{policy.value}-{count}"
            external = {"value": threshold, "bundle_id": bundle.id, "memory_version": 0}
            spec = Spec(
                settings=box_settings(
                    bundle, place / "state", url, source={"policy": policy.value}, threshold=external
                ),
                cameras=count,
                fps=options.fps,
                frames=str(frames),
                cycle=(0, 2, 4, 6, 8, 10),  # good ones: what is measured is the judging
                warm_s=options.warm,
                seconds=options.seconds,
            )
            with load_box(spec, place) as process:
                found[policy][count] = report_of(process)
            shutil.rmtree(place)
    return found


def memory_per_camera(reports: dict[int, Report]) -> float:
    """MB of resident memory for one camera more: least squares over the counts."""
    counts = np.array(sorted(reports))
    return float(np.polyfit(counts, [reports[count].rss_mb for count in sorted(reports)], 1)[0])


def print_curve(curve: Curve, fps: float) -> None:
    print(f"1080p BGR frames from memory, {fps:g} frames/s offered by each camera\n")
    print(
        "| cameras | strategy | offered/s | judged/s | dropped | latency p50 | p99 | ms processor a frame |"
        " resident besides frames |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for count in next(iter(curve.values())):
        for policy, reports in curve.items():
            one = reports[count]
            print(
                f"| {count} | {policy.value} | {one.offered / one.seconds:.0f} | {one.judged / one.seconds:.0f} | "
                f"{100 * one.dropped / max(1, one.offered):.0f} % | {one.latency_ms['p50']:.0f} ms | "
                f"{one.latency_ms['p99']:.0f} ms | {1000 * one.cpu_s / max(1, one.judged):.2f} | {one.rss_mb:.0f} MB |"
            )
    print()


def goals_of(curve: Curve) -> list[Goal]:
    """Memory per camera, frames unaccounted for, and what overload costs."""
    every = [report for reports in curve.values() for report in reports.values()]
    slopes = {policy: memory_per_camera(reports) for policy, reports in curve.items()}
    oldest = curve[DropPolicy.DROP_OLDEST]
    rates = {count: report.judged / report.seconds for count, report in oldest.items()}
    best = max(rates.values())
    most = max(rates)
    text = ", ".join(f"{policy.value} {slope:.2f}" for policy, slope in slopes.items())
    return [
        Goal("resident memory per extra camera besides its frames", max(slopes.values()), CAMERA_GOAL_MB, False,
             f"{text}; least squares over {min(rates)} to {most} cameras", "MB"),
        Goal("frames neither judged nor counted", sum(abs(report.unaccounted) for report in every), 0, False,
             f"of {sum(report.totals['captured'] for report in every)} in {len(every)} runs"),
        Goal(f"throughput at {most} cameras over the best", rates[most] / best, float("nan"), True,
             f"drop_oldest, {rates[most]:.0f} of {best:.0f} frames/s"),
    ]  # fmt: skip


def draw(curve: Curve, fps: float, path: Path) -> None:
    """Draw the load curve."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((rate, delay), (drops, memory)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for policy, reports in curve.items():
        counts = list(reports)
        runs = list(reports.values())
        (line,) = rate.plot(counts, [one.judged / one.seconds for one in runs], "o-", label=policy.value)
        delay.plot(counts, [one.latency_ms["p50"] for one in runs], "o-", color=line.get_color(), label="p50")
        delay.plot(counts, [one.latency_ms["p99"] for one in runs], "^--", color=line.get_color(), label="p99")
        drops.plot(counts, [100 * one.dropped / max(1, one.offered) for one in runs], "o-", label=policy.value)
        memory.plot(counts, [one.rss_mb for one in runs], "o-", label=policy.value)
    counts = list(next(iter(curve.values())))
    rate.plot(counts, [fps * count for count in counts], "k:", label=f"offered: {fps:g} frames/s a camera")
    rate.set(title="frames judged per second", ylim=(0, None))
    delay.set(title="capture to verdict, ms (o p50, ^ p99)", yscale="log")
    drops.set(title="frames dropped, %")
    most = max(one.rss_mb for reports in curve.values() for one in reports.values())
    memory.set(title="resident memory of the box besides frames, MB", ylim=(0, 1.2 * most))
    for axes in (rate, delay, drops, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("cameras")
        axes.grid(visible=True, alpha=0.3)
    rate.legend()
    drops.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="of cameras")
    parser.add_argument("--fps", type=float, default=FPS, help="of each camera")
    parser.add_argument("--seconds", type=float, default=6.0, help="that each point is measured")
    parser.add_argument("--warm", type=float, default=2.0, help="seconds before, in each point")
    parser.add_argument("--image", type=Path, default=IMAGE, help="where the curve is drawn")
    parser.add_argument("--tiny", action="store_true", help="two short points, to see that it runs")
    options = parser.parse_args(argv)
    if options.tiny:
        options.counts, options.seconds, options.warm, options.fps = [1, 2], 0.5, 0.1, 60.0
    with bundle_and_broker("cameras", options.bundle) as (folder, bundle, broker):
        curve = measure(bundle, folder, broker.url, options)
    print_curve(curve, options.fps)
    draw(curve, options.fps, options.image)
    goals = goals_of(curve)
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
