"""How soon, how surely and how often wrongly is a camera called unwell? On generated video of lines that run and stop.

Thresholds are the defaults of the settings. Lines and textures that served to choose them are not those reported on.
About 4 minutes.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from benchmarks._scene import HEIGHT, WIDTH, Conditions, Scene
from benchmarks._setting import Goal, frames_1080p, heading, print_goals, spread
from edge.health.camera_health import CameraHealth
from edge.health.camera_measures import take_sample
from edge.health.settings import CameraFault, CameraHealthSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Image = npt.NDArray[np.uint8]
    Injected = tuple[CameraFault, str, dict[str, float]]
    Faults = Callable[[float], dict[str, float]]

FIRST_REPORTED_LINE = 100
CHOSEN_ON = ("grain", "stripes", "parts", "plain", "gravel.png", "weave", "brick.png", "grass.png")
REPORTED = ("coins.png", "page.png", "camera.png", "text.png")
# From here on a fault is in the picture; the baseline is learnt after 30 s.
FAULT_S = 60.0
# A delay beyond this counts as missed.
PATIENCE_S = 60.0
CPU_GOAL_MS, FRAME_RATE = 0.3, 25.0
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})

USUAL = {
    "running": {},
    "stops": {"stop_at": FAULT_S},
    "starts late": {"start_at": FAULT_S},
    "stands": {"speed": 0.0},
    "stands, low noise": {"speed": 0.0, "noise": 0.6},
    "little noise": {"noise": 0.6},
    "much noise": {"noise": 5.0},
    "fast": {"speed": 900.0},
    "light drifts by 25 %": {"drift": 0.25},
    "nothing stands still": {"fixtures": False},
}
FAULTS: tuple[Injected, ...] = (
    (CameraFault.FROZEN, "same frame", {"freeze": 1.0}),
    (CameraFault.DARK, "light at 30 %", {"gain": 0.3}),
    (CameraFault.DARK, "light at 10 %", {"gain": 0.1}),
    (CameraFault.DARK, "no light", {"gain": 0.0}),
    (CameraFault.OVEREXPOSED, "light at 200 %", {"gain": 2.0}),
    (CameraFault.OVEREXPOSED, "light at 400 %", {"gain": 4.0}),
    (CameraFault.OVEREXPOSED, "stray light of 160 levels", {"lift": 160.0}),
    (CameraFault.BLURRED, "sigma 1 px", {"blur": 1.0}),
    (CameraFault.BLURRED, "sigma 1.5 px", {"blur": 1.5}),
    (CameraFault.BLURRED, "sigma 2 px", {"blur": 2.0}),
    (CameraFault.BLURRED, "sigma 4 px", {"blur": 4.0}),
    (CameraFault.BLURRED, "sigma 10 px", {"blur": 10.0}),
    (CameraFault.MOVED, "8 px", {"shift_x": 6.4, "shift_y": 4.8}),
    (CameraFault.MOVED, "16 px", {"shift_x": 12.8, "shift_y": 9.6}),
    (CameraFault.MOVED, "30 px", {"shift_x": 24.0, "shift_y": 18.0}),
    (CameraFault.MOVED, "100 px", {"shift_x": -80.0, "shift_y": 60.0}),
    (CameraFault.MOVED, "turned by 1 degree", {"turn": 1.0}),
    (CameraFault.MOVED, "turned by 3 degrees", {"turn": 3.0}),
    (CameraFault.MOVED, "turned by 10 degrees", {"turn": 10.0}),
)
# These show where seeing ends.
TINY = frozenset({"no light", "sigma 4 px", "100 px"})
WEAK = frozenset({"light at 200 %", "sigma 1 px", "sigma 1.5 px", "8 px", "turned by 1 degree"})


@dataclass(frozen=True, slots=True)
class Played:
    """What one run gave: (seconds, fault, whether it began), and the seconds played."""

    told: list[tuple[float, CameraFault, bool]]
    seconds: float
    unobservable: list[str]


def play(scene: Scene, seconds: float, *, seed: int, fault: Faults = lambda _: {}) -> Played:
    """Let a camera watch a line, at the irregular moments at which a box looks.

    Args:
        scene: the line.
        seconds: of video.
        seed: of noise, vibration and moments.
        fault: strengths at a moment, see :meth:`Scene.frame`; ``freeze`` repeats the last frame.
    """
    rng = np.random.default_rng(seed)
    settings = CameraHealthSettings()
    health = CameraHealth(settings)
    told: list[tuple[float, CameraFault, bool]] = []
    now, last = 0.0, None
    while now < seconds:
        now += rng.uniform(0.5, 1.5) / settings.looks_per_second
        strengths = fault(now)
        if not strengths.pop("freeze", 0.0) or last is None:
            last = take_sample(scene.frame(now, rng=rng, **strengths))
        told += [(now, change.fault, change.lasting) for change in health.take(last, round(now * 1e9), good=True)]
    return Played(told, now, health.status()["unobservable"])


def texture_of(line: int) -> str:
    textures = REPORTED if line >= FIRST_REPORTED_LINE else CHOSEN_ON
    return textures[line % len(textures)]


def false_alarms(lines: Sequence[int], seconds: float, usual: Sequence[str]) -> tuple[int, float]:
    """Play usual conditions; print the alarms of each kind. Returns alarms and hours."""
    print("| usual conditions | hours | false alarms |\n|---|---|---|")
    total, hours = 0, 0.0
    for name in usual:
        conditions = USUAL[name]
        found: list[str] = []
        played_s = 0.0
        for line in lines:
            texture = texture_of(line)
            one = play(Scene(line, Conditions(texture=texture, **conditions)), seconds, seed=line)
            played_s += one.seconds
            found += [f"{fault.value} ({texture})" for _, fault, lasting in one.told if lasting]
        print(f"| {name} | {played_s / 3600:.2f} | {len(found)} {', '.join(sorted(set(found)))} |", flush=True)
        total, hours = total + len(found), hours + played_s / 3600
    more, longer = through_encoder(lines[0], min(seconds, 60.0))
    return total + more, hours + longer


def through_encoder(line: int, seconds: float) -> tuple[int, float]:
    """Watch a standing line through H.264 of 0.5 Mbit/s, whose frames repeat between key frames 2 s apart.

    Returns:
        Alarms and hours; nothing where there is no ffmpeg.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        print("no ffmpeg: nothing was watched through an encoder\n")
        return 0, 0.0
    scene, rng, rate = Scene(line, Conditions(speed=0.0, jitter=0.0, noise=1.0)), np.random.default_rng(line), 10
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/line.mp4"
        command = f"{program} -loglevel error -f rawvideo -pix_fmt bgr24 -s {WIDTH}x{HEIGHT} -r {rate} -i -"
        command += f" -c:v libx264 -threads 1 -pix_fmt yuv420p -g {2 * rate} -b:v 500k {path}"
        with subprocess.Popen(command.split(), stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            for index in range(round(seconds * rate)):
                process.stdin.write(scene.frame(index / rate, rng=rng).tobytes())
            process.stdin.close()
        health, capture, told, index = CameraHealth(CameraHealthSettings()), cv2.VideoCapture(path), [], 0
        due = 0
        while (read := capture.read())[0]:
            if index >= due:
                due = index + int(rng.integers(3, 8))
                changes = health.take(take_sample(read[1]), round(index / rate * 1e9), good=True)
                told += [change.fault.value for change in changes if change.lasting]
            index += 1
        capture.release()
    print(f"| stands, seen through H.264 | {index / rate / 3600:.2f} | {len(told)} {', '.join(sorted(set(told)))} |\n")
    return len(told), index / rate / 3600


def detections(lines: Sequence[int], faults: Sequence[Injected]) -> dict[tuple[CameraFault, str], list[float]]:
    """Play each fault on running lines; print delays and misses. Returns delays, infinite where missed."""
    print("| fault | strength | found | delay in s: median, longest | other faults told |\n|---|---|---|---|---|")
    delays: dict[tuple[CameraFault, str], list[float]] = {}
    for fault, strength, injected in faults:
        found, others = [], set()
        for line in lines:
            conditions = Conditions(texture=texture_of(line))

            def at(now: float, injected: dict[str, float] = injected) -> dict[str, float]:
                return dict(injected) if now >= FAULT_S else {}

            one = play(Scene(line, conditions), FAULT_S + PATIENCE_S, seed=line, fault=at)
            entered = [when - FAULT_S for when, which, lasting in one.told if lasting and which is fault]
            found.append(entered[0] if entered else math.inf)
            others |= {which.value for _, which, lasting in one.told if lasting and which is not fault}
        seen = [one for one in found if math.isfinite(one)]
        said = f"{np.median(seen):.1f}, {max(seen):.1f}" if seen else "-"
        print(f"| {fault.value} | {strength} | {len(seen)} of {len(found)} | {said} | {', '.join(sorted(others))} |",
              flush=True)  # fmt: skip
        delays[fault, strength] = found
    print()
    return delays


def cost(rounds: int) -> tuple[float, float, float]:
    """Return processor milliseconds per look in the camera's thread, per look in the other one, and per 1080p frame."""
    frames = frames_1080p(4)
    health = CameraHealth(CameraHealthSettings(baseline_frames=20))
    for index in range(24):
        health.take(take_sample(frames[index % 4]), index * 500_000_000, good=True)
    samples = [take_sample(frame) for frame in frames]
    started = time.thread_time()
    for index in range(rounds):
        take_sample(frames[index % 4])
    sampled = time.thread_time()
    for index in range(rounds):
        health.take(samples[index % 4], (index + 24) * 500_000_000, good=True)
    ended = time.thread_time()
    here, there = 1e3 * (sampled - started) / rounds, 1e3 * (ended - sampled) / rounds
    return here, there, (here + there) * CameraHealthSettings().looks_per_second / FRAME_RATE


def sequences(folder: Path, *, limit: int) -> None:
    """Print what is told of real images, each sub-folder a camera that looks twice a second. Nothing is chosen here."""
    print("| images of | looks | told |\n|---|---|---|")
    found = {path.parent for path in folder.rglob("*") if path.suffix.lower() in PICTURES}
    folders = sorted(one for one in found if "ground_truth" not in one.parts)
    for one in folders:
        paths = sorted(path for path in one.iterdir() if path.suffix.lower() in PICTURES)[:limit]
        health, told, looks = CameraHealth(CameraHealthSettings()), [], 0
        for path in paths:
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if image is None:
                continue
            looks += 1
            changes = health.take(take_sample(image), looks * 500_000_000, good=True)
            told += [f"{change.fault.value} at {looks}" for change in changes if change.lasting]
        print(f"| {one.relative_to(folder)} | {looks} | {', '.join(told) or 'nothing'} |", flush=True)
    print()


def main(arguments: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=4, help="generated lines, of every texture in turn")
    parser.add_argument("--seconds", type=float, default=300.0, help="of video per line and usual condition")
    parser.add_argument("--chosen-on", action="store_true", help="play the lines that thresholds were chosen on")
    parser.add_argument("--data", type=Path, help="folder of real images: each sub-folder is played as one camera")
    parser.add_argument("--images", type=int, default=200, help="most images of a sub-folder")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    usual, faults = list(USUAL), list(FAULTS)
    if options.tiny:
        options.lines, options.seconds = 1, 30.0
        usual, faults = usual[:1], [one for one in FAULTS if one[1] in TINY]
    cv2.setNumThreads(1)
    heading("camera health")
    first = 0 if options.chosen_on else FIRST_REPORTED_LINE
    lines = range(first, first + options.lines)
    alarms, hours = false_alarms(lines, options.seconds, usual)
    delays = detections(lines, faults)
    if options.data is not None:
        sequences(options.data, limit=options.images)
    here, there, per_frame = cost(20 if options.tiny else 200)
    goals = [
        Goal("false alarms per hour of video", alarms / hours, 0.0, at_least=False, spread=f"{hours:.2f} hours"),
        Goal(f"CPU per 1080p frame at {FRAME_RATE:g} frames/s", per_frame, CPU_GOAL_MS, at_least=False, unit="ms",
             spread=f"per look {here:.2f} in the camera's thread, {there:.2f} in the other"),
    ]  # fmt: skip
    for fault in CameraFault:
        strong = [values for (which, name), values in delays.items() if which is fault and name not in WEAK]
        if strong:
            flat = [value for values in strong for value in values]
            seen = [value for value in flat if math.isfinite(value)]
            share = len(seen) / len(flat)
            text = spread(seen, "{:.1f}") if seen else "none"
            goals.append(Goal(f"found: {fault.value}", share, 0.95, at_least=True, spread=f"delay in s: {text}"))
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
    sys.exit(0)
