"""How small may a defect be in camera pixels, with one network input for the whole frame and with tiles?

1080p frames of a generated web and of a photograph; the same frames and defects for every tiling. The threshold is
frozen on good frames before any defect is seen.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks._setting import HEIGHT, WIDTH, heading
from edge.bundle import Pooling, Preprocessing, Tiles
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.camera import Light, illuminate, sensor_noise
from trainer.data.generic import photograph_folder
from trainer.data.images import load_image
from trainer.data.textures import TextureWeb
from trainer.features import extract, extract_tiles, tiles_of
from trainer.fit import choose_pooling, head_maps
from trainer.methods.base import FitContext, Head, Validation
from trainer.methods.registry import get
from trainer.synthesis.image2d import synthesise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from trainer.methods.base import Features

    Picture = npt.NDArray[np.uint8]

SIDE = 224
TILINGS = ((1, 1), (2, 4))
SURFACES = ("metal", "gravel")
SIZES = (6, 12, 24, 48, 96, 192)
"""Longer side of a defect in camera pixels."""
ALPHA = 0.05
_CPU = torch.device("cpu")
# Positions of one kind of frame start this many frames apart from those of the next: no two show the same surface.
_APART = 1000


@dataclass(frozen=True, slots=True)
class Counts:
    """How many frames of each kind.

    Attributes:
        train: to learn from.
        calibration: good frames that the threshold is fitted on; the pooling rule is chosen on them and on the same
            frames with a defect each.
        test: good frames to count false alarms on; the same frames with a defect of each size are to be found.
    """

    train: int
    calibration: int
    test: int


@dataclass(frozen=True, slots=True)
class Detected:
    """What one tiling found on one surface.

    Attributes:
        name: of the tiling.
        canvas: height and width in pixels of what the network sees.
        false_alarms: share of good test frames at or above the threshold.
        recall: share of defective frames at or above it, by size.
    """

    name: str
    canvas: tuple[int, int]
    false_alarms: float
    recall: dict[int, float]


def camera_of(surface: str, seed: int) -> Callable[[int], Picture]:
    """Return a camera: frame number -> uint8 [1080, 1920, 3] BGR of a stretch of surface, lit and noisy in its own way.

    A photograph is smaller than a frame: it is mirrored at its edges, and frames differ by where they begin.
    """
    if surface in ("cloth", "wafer", "metal"):
        web = TextureWeb(surface, seed, WIDTH)

        def view(number: int) -> Picture:
            return web.view(number * HEIGHT, HEIGHT)
    else:
        photograph = load_image(photograph_folder() / f"{surface}.png")

        def view(number: int) -> Picture:
            rng = np.random.default_rng((seed, number, 0))
            rows, cols = (rng.integers(0, 2 * side) for side in photograph.shape[:2])
            return photograph[_mirrored(rows, HEIGHT, photograph.shape[0])][
                :, _mirrored(cols, WIDTH, photograph.shape[1])
            ]

    def shoot(number: int) -> Picture:
        rng = np.random.default_rng((seed, number, 1))
        return sensor_noise(illuminate(view(number), Light.draw(rng)), rng)

    return shoot


def _mirrored(start: int, count: int, extent: int) -> npt.NDArray[np.int64]:
    """Indices start, start + 1, ... of a picture that is mirrored at both edges."""
    place = np.arange(start, start + count) % (2 * extent)
    return np.minimum(place, 2 * extent - 1 - place)


def with_defect(frame: Picture, size: int, seed: tuple[int, ...]) -> Picture:
    """Put a plain defect whose longer side is ``size`` pixels somewhere on a frame."""
    share = size / float(np.hypot(*frame.shape[:2]))
    return synthesise(frame, rng=np.random.default_rng(seed), contrast=1.0, size=(share, share)).image


def measure(surface: str, counts: Counts, *, sizes: Sequence[int] = SIZES, seed: int = 0) -> list[Detected]:
    """Train, freeze a threshold and count, for every tiling on the same frames."""
    shoot = camera_of(surface, seed)
    tilings = {f"{rows} x {cols}": _preprocessing(rows, cols) for rows, cols in TILINGS}
    kept: dict[str, dict[object, list[Picture]]] = {name: defaultdict(list) for name in tilings}

    def keep(kind: object, frame: Picture) -> None:
        """Keep of a frame only what each tiling makes of it."""
        for name, preprocessing in tilings.items():
            kept[name][kind].append(to_canvas(frame, preprocessing))

    for number in range(counts.train):
        keep("train", shoot(number))
    for number in range(_APART, _APART + counts.calibration):
        frame = shoot(number)
        keep("calibration", frame)
        keep("chosen on", with_defect(frame, sizes[number % len(sizes)], (seed, number)))
    for number in range(2 * _APART, 2 * _APART + counts.test):
        frame = shoot(number)
        keep("good", frame)
        for size in sizes:
            keep(size, with_defect(frame, size, (seed, number)))
    found = []
    for name, preprocessing in tilings.items():
        frames = {kind: np.stack(canvases) for kind, canvases in kept[name].items()}
        score = _fit(preprocessing, frames["train"], frames["calibration"], frames["chosen on"], seed=seed)
        threshold = fit_threshold(score(frames["calibration"]), None, ALPHA).value
        recall = {size: float(np.mean(score(frames[size]) >= threshold)) for size in sizes}
        false_alarms = float(np.mean(score(frames["good"]) >= threshold))
        canvas = (preprocessing.canvas_height, preprocessing.canvas_width)
        found.append(Detected(name, canvas, false_alarms, recall))
    return found


def _preprocessing(rows: int, cols: int) -> Preprocessing:
    return Preprocessing(height=SIDE, width=SIDE, tiles=Tiles(rows=rows, cols=cols))


def _fit(
    preprocessing: Preprocessing, train: Picture, calibration: Picture, defective: Picture, *, seed: int
) -> Callable[[Picture], npt.NDArray[np.float32]]:
    """Fit a memory detector; returns canvases -> raw scores."""
    method, trunk = get("memory"), lite0_trunk()

    def features(canvases: Picture) -> Features:
        return extract(
            trunk, canvases, preprocessing, tap_names=method.tap_names, device=_CPU, progress=_quiet, what="",
            groups=np.array([str(index) for index in range(len(canvases))], np.str_),
        )  # fmt: skip

    validation = Validation(
        good=features(calibration),
        defective=features(defective),
        # No method in use here looks at masks; where a defect lies does not matter to a frame's score.
        masks=np.zeros(defective.shape[:3], np.bool_),
    )
    context = FitContext(
        features=features(train),
        images=tiles_of(train, preprocessing),
        extract=partial(extract_tiles, trunk=trunk, tap_names=method.tap_names, device=_CPU),
        validation=validation,
        seed=seed,
        device=_CPU,
        progress=_quiet,
    )
    head = method.fit(context, method.config("quick"))
    pooling, _ = choose_pooling(
        head_maps(head, validation.good, preprocessing, _CPU),
        head_maps(head, validation.defective, preprocessing, _CPU),
    )
    return lambda canvases: _scores(head, features(canvases), preprocessing, pooling)


def _scores(head: Head, features: Features, preprocessing: Preprocessing, pooling: Pooling) -> npt.NDArray[np.float32]:
    maps = head_maps(head, features, preprocessing, _CPU)
    return np.array([pool_score(one, pooling) for one in maps], np.float32)


def _quiet(_what: str, _done: int, _total: int) -> None:
    pass


def print_table(surface: str, found: Sequence[Detected]) -> None:
    """Print recall by size as a Markdown table."""
    sizes = list(found[0].recall)
    print(f"| {surface}: tiles | network sees | " + " | ".join(f"{size} px" for size in sizes) + " | false alarms |")
    print("|---" * (len(sizes) + 3) + "|")
    for one in found:
        cells = " | ".join(f"{one.recall[size]:.2f}" for size in sizes)
        print(f"| {one.name} | {one.canvas[1]} x {one.canvas[0]} | {cells} | {one.false_alarms:.2f} |")
    print(flush=True)


def draw(found: dict[str, list[Detected]], path: Path) -> None:
    """Draw recall over size, one panel per surface."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.2), sharey=True, squeeze=False)
    for panel, (surface, tilings) in zip(panels[0], found.items(), strict=True):
        for one in tilings:
            panel.plot(list(one.recall), list(one.recall.values()), marker="o", label=f"{one.name} tiles")
        panel.axhline(ALPHA, color="grey", linestyle=":", linewidth=1, label="false-alarm rate set")
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(tilings[0].recall), [str(size) for size in tilings[0].recall])
        panel.set(title=surface, xlabel="longer side of the defect, camera pixels", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("recall at the frozen threshold")
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Detected]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, help="PNG file to draw the curves into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="few frames of one surface, to see that it runs")
    options = parser.parse_args(argv)
    heading("resolution")
    counts = Counts(2, 8, 2) if options.tiny else Counts(16, 40, 40)
    surfaces = SURFACES[1:] if options.tiny else SURFACES
    sizes = SIZES[-1:] if options.tiny else SIZES
    print(
        f"{WIDTH} x {HEIGHT} frames, memory detector (quick) on {counts.train} frames, threshold for {ALPHA:.0%} false "
        f"alarms from {counts.calibration} good frames, {counts.test} other frames to test, each as it is and with a "
        "defect of each size; recall by the longer side of the defect in camera pixels\n"
    )
    found = {}
    for surface in surfaces:
        found[surface] = measure(surface, counts, sizes=sizes, seed=options.seed)
        print_table(surface, found[surface])
    if options.image:
        draw(found, options.image)
        print(f"curves: {options.image}")
    return found


if __name__ == "__main__":
    main()
