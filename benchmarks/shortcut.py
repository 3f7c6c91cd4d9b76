"""Can a reconstructor copy what it should not know? The identical shortcut, with and without what UniAD bars it with.

Error on defective patches over their own length, along training: 1 where a defect is not rebuilt, towards 0 where it
is copied. Run ``python -m benchmarks.shortcut --picture shortcut.png``: six generated classes, three seeds, about 25
minutes on 2 idle cores; ``--seeds 1`` about 8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from benchmarks._setting import Goal, heading, print_goals
from deploy.metrics import image_auroc
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.texture_factory import TextureSubclass
from trainer.methods.uniad.fit import UniADConfig, reconstructor, train
from trainer.methods.uniad.model import STRIDE, TAP_NAMES, Features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Images = npt.NDArray[np.uint8]

CLASSES = (("cloth", 1), ("cloth", 7), ("wafer", 3), ("wafer", 9), ("metal", 2), ("metal", 6))
MLP, CONVOLUTION, PLAIN, QUERIES, FULL = (
    "perceptron per patch",
    "convolutions",
    "plain transformer",
    "transformer with queries",
    "UniAD: queries, hidden neighbours, noise",
)
KINDS = (MLP, CONVOLUTION, PLAIN, QUERIES, FULL)
DEFECTS = ("patch of another class", "flat", "scratch")
COVERED = 0.5
"""Share of a cell that a defect covers in a defective patch; cells that it only touches count neither way."""
LEAST_RATIO, MOST_FALL = 0.9, 0.005
PLAIN_MARGIN, MLP_MARGIN = 0.08, 0.15
_WARM = 1 / 8  # of training: before it every network is still finding the mean
_STYLES = {
    MLP: {"color": "#d55e00", "linestyle": "--", "marker": "^"},
    CONVOLUTION: {"color": "#e69f00", "linestyle": "-.", "marker": "v"},
    PLAIN: {"color": "#cc79a7", "linestyle": ":", "marker": "s"},
    QUERIES: {"color": "#56b4e9", "linestyle": "--", "marker": "D"},
    FULL: {"color": "#0072b2", "linestyle": "-", "marker": "o"},
}


@dataclass(frozen=True)
class Size:
    """How much is made and trained.

    Attributes:
        side: of images in pixels.
        train: good images of each class to learn from.
        test: further good images of each class, each of which is seen with every defect as well.
        steps: of the optimiser, for every network.
        batch: images of a step.
    """

    side: int = 160
    train: int = 30
    test: int = 10
    steps: int = 600
    batch: int = 18


TINY = Size(side=64, train=2, test=1, steps=8, batch=4)


@dataclass(frozen=True)
class Patches:
    """Features of all classes.

    Attributes:
        grid: (h, w).
        train: float32 [n, L, C].
        good: float32 [m, L, C] of good test images, class after class.
        bad: float32 [k, L, C] of defective ones.
        cover: float32 [k, L], share of each cell that the defect covers.
    """

    grid: tuple[int, int]
    train: torch.Tensor
    good: torch.Tensor
    bad: torch.Tensor
    cover: torch.Tensor


@dataclass(frozen=True)
class Point:
    """What a network did at one time.

    Attributes:
        seed: of its training.
        kind: one of ``KINDS``.
        step: of the optimiser.
        normal: mean length of the error on good images.
        ratio: mean length of the error on defective patches over the mean length of those patches.
        image: I-AUROC, mean over classes, of the largest error of an image.
        patch: AUROC of defective patches against all patches without a defect.
    """

    seed: int
    kind: str
    step: int
    normal: float
    ratio: float
    image: float
    patch: float


class PerPatch(nn.Module):
    """Layers that see one patch at a time, or its surroundings: what copies most easily.

    Args:
        channels: of features.
        grid: (h, w).
        reach: side of the kernels; 1 is a perceptron per patch.
        width: of hidden layers.
        layers: how many of them.
    """

    def __init__(self, channels: int, grid: tuple[int, int], reach: int, width: int, *, layers: int = 4) -> None:
        super().__init__()
        self.grid = grid
        widths = [channels, *([width] * layers)]
        hidden = [
            part
            for one, other in itertools.pairwise(widths)
            for part in (nn.Conv2d(one, other, reach, padding=reach // 2), nn.ReLU())
        ]
        self.layers = nn.Sequential(*hidden, nn.Conv2d(width, channels, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, L, C]."""
        rebuilt: torch.Tensor = self.layers(tokens.transpose(1, 2).unflatten(2, self.grid))
        return rebuilt.flatten(2).transpose(1, 2)


def make_network(
    kind: str, size: Size, channels: int, grid: tuple[int, int], seed: int
) -> tuple[nn.Module, UniADConfig]:
    """Return an untrained network and how it is trained."""
    full = kind == FULL
    config = UniADConfig(
        hidden=256,
        neighbours=None if full else 0,
        jitter=None if full else 0.0,
        queries=kind in (QUERIES, FULL),
        dropout=0.0,
        steps=size.steps,
        batch_tiles=size.batch,
        rate=1e-3,
    )
    if kind in (MLP, CONVOLUTION):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reach, width = (1, 256) if kind == MLP else (3, 96)
            return PerPatch(channels, grid, reach, width), config
    network = reconstructor(config, grid, channels)
    network.initialise(torch.Generator().manual_seed(seed))
    return network, config


def put_defect(
    image: Images, other: Images, kind: str, rng: np.random.Generator
) -> tuple[Images, npt.NDArray[np.bool_]]:
    """Return a copy with a defect, and its mask bool [S, S].

    Args:
        image: uint8 [S, S, 3].
        other: a good image of another class, to cut from.
        kind: one of ``DEFECTS``.
        rng: of place and size.
    """
    side = len(image)
    mask = np.zeros((side, side), np.uint8)
    h, w = (int(n) for n in rng.integers(round(0.25 * side), round(0.4 * side), 2))
    y, x = int(rng.integers(0, side - h)), int(rng.integers(0, side - w))
    content = np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), image.shape)
    if kind == "scratch":
        # As wide as a cell, so that some cells are covered.
        start, end = ((x, y), (x + w, y + h)) if rng.random() < 0.5 else ((x + w, y), (x, y + h))
        cv2.line(mask, start, end, 1, max(2, round(0.1 * side)))
    else:
        mask[y : y + h, x : x + w] = 1
        content = other if kind == DEFECTS[0] else content
    return np.where(mask[..., None] > 0, content, image), mask > 0


def make_patches(size: Size, *, seed: int) -> Patches:
    """Draw all classes and their defects, and compute their features."""
    makes = [TextureSubclass(material, number, 17 + seed, size.side) for material, number in CLASSES]
    trunk = lite0_trunk()
    grid = (size.side // STRIDE, size.side // STRIDE)
    together = Features(grid)

    def tokens(images: Sequence[Images]) -> torch.Tensor:
        found = []
        with torch.inference_mode():
            for start in range(0, len(images), 16):
                taps = dict(
                    zip(trunk.tap_names, trunk(torch.from_numpy(np.stack(images[start : start + 16]))), strict=True)
                )
                found.append(together(*(taps[name] for name in TAP_NAMES)))
        return torch.cat(found).clone()

    good = [[make.good("good", index)[..., ::-1].copy() for index in range(size.test)] for make in makes]
    rng = np.random.default_rng((17, seed))
    marred, covers = [], []
    for own, images in enumerate(good):
        for index, image in enumerate(images):
            for kind in DEFECTS:
                other = good[(own + 1 + int(rng.integers(len(good) - 1))) % len(good)][index]
                found, mask = put_defect(image, other, kind, rng)
                marred.append(found)
                covers.append(cv2.resize(mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA).ravel())
    return Patches(
        grid=grid,
        train=tokens([make.good("train", index)[..., ::-1].copy() for make in makes for index in range(size.train)]),
        good=tokens([image for images in good for image in images]),
        bad=tokens(marred),
        cover=torch.from_numpy(np.stack(covers)),
    )


def look(network: nn.Module, patches: Patches, *, seed: int, kind: str, step: int) -> Point:
    """Say what a network does now."""
    with torch.inference_mode():
        good, bad = (
            torch.cat([(part - network(part)).norm(dim=2) for part in of.split(32)])
            for of in (patches.good, patches.bad)
        )
    marred, clean = patches.cover >= COVERED, patches.cover == 0
    images = []
    for own in range(len(CLASSES)):
        per_good, per_bad = len(good) // len(CLASSES), len(bad) // len(CLASSES)
        scores = torch.cat(
            [good[own * per_good : (own + 1) * per_good].amax(1), bad[own * per_bad : (own + 1) * per_bad].amax(1)]
        )
        images.append(image_auroc(np.arange(len(scores)) >= per_good, scores.numpy()))
    rest = torch.cat([good.flatten(), bad[clean]])
    labels = np.arange(len(rest) + int(marred.sum())) >= len(rest)
    return Point(
        seed=seed,
        kind=kind,
        step=step,
        normal=float(good.mean()),
        ratio=float(bad[marred].mean() / patches.bad.norm(dim=2)[marred].mean()),
        image=float(np.mean([value or 0.0 for value in images])),
        patch=float(image_auroc(labels, torch.cat([rest, bad[marred]]).numpy()) or 0.0),
    )


def looks_at(steps: int) -> list[int]:
    """Return when to look: closely at first, since what copies learns fast, then at eighths of training."""
    early = [steps * part // 128 for part in (1, 2, 4, 8)]
    return sorted({max(1, one) for one in (*early, *(steps * part // 8 for part in range(1, 9)))})


def run_seed(size: Size, seed: int, kinds: Sequence[str] = KINDS) -> list[Point]:
    """Train every network on the same patches and look at each along the way."""
    patches, found = make_patches(size, seed=seed), []
    for kind in kinds:
        network, config = make_network(kind, size, patches.train.shape[2], patches.grid, seed)
        times = set(looks_at(size.steps))

        def report(step: int, network: nn.Module = network, kind: str = kind, times: set[int] = times) -> None:
            if step in times:
                found.append(look(network.eval(), patches, seed=seed, kind=kind, step=step))
                network.train()

        started = time.monotonic()
        train(
            network,
            lambda rows: patches.train[rows],
            torch.ones(len(patches.train), dtype=torch.float64),
            config,
            generator=torch.Generator().manual_seed(seed),
            report=report,
        )
        last = found[-1]
        said = f"error {last.normal:.1f}, on defects {last.ratio:.3f}, {time.monotonic() - started:.0f} s"
        print(f"  seed {seed}, {kind}: {said}", file=sys.stderr, flush=True)
    return found


def matched(points: Sequence[Point], kinds: Sequence[str]) -> dict[str, Point]:
    """Return what each network of one seed does where all have the same error on good images.

    That error is the least that the slowest of them reaches; between two looks figures are interpolated.
    """
    curves = {kind: sorted((p for p in points if p.kind == kind), key=lambda p: p.normal) for kind in kinds}
    level = max(curve[0].normal for curve in curves.values())
    found = {}
    for kind, curve in curves.items():
        values = {
            name: float(np.interp(level, [p.normal for p in curve], [getattr(p, name) for p in curve]))
            for name in ("step", "ratio", "image", "patch")
        }
        found[kind] = Point(curve[0].seed, kind, round(values.pop("step")), level, **values)
    return found


def goals(points: Sequence[Point]) -> list[Goal]:
    """Hold the curves to what UniAD claims of the shortcut; the figures are means over seeds, the goals bind them."""
    seeds = sorted({p.seed for p in points})

    def course(seed: int, kind: str) -> list[Point]:
        return sorted((p for p in points if p.seed == seed and p.kind == kind), key=lambda p: p.step)

    def goal(name: str, of: Callable[[int], float], limit: float, *, at_least: bool = True) -> Goal:
        values = [of(seed) for seed in seeds]
        said = ", ".join(f"{value:.3f}" for value in values)
        return Goal(name, float(np.mean(values)), limit, at_least, f"seeds {said}")

    def late_change(seed: int) -> float:
        full = course(seed, FULL)
        middle = next(p for p in full if 2 * p.step >= full[-1].step)
        return full[-1].ratio - middle.ratio

    def largest_rise(kind: str) -> Callable[[int], float]:
        def rise(seed: int) -> float:
            curve = course(seed, kind)
            late = [p.ratio for p in curve if p.step >= _WARM * curve[-1].step]
            return float(np.diff(late).max())

        return rise

    at = {seed: matched([p for p in points if p.seed == seed], (MLP, PLAIN, FULL)) for seed in seeds}

    def ahead(name: str, *kinds: str) -> Callable[[int], float]:
        return lambda seed: getattr(at[seed][FULL], name) - max(getattr(at[seed][kind], name) for kind in kinds)

    return [
        goal("(a) full: error on defects at the end", lambda seed: course(seed, FULL)[-1].ratio, LEAST_RATIO),
        goal("(a) full: its change over the last half", late_change, -MOST_FALL),
        goal("(b) perceptron: largest rise from look to look", largest_rise(MLP), MOST_FALL, at_least=False),
        goal("(b) plain transformer: largest rise", largest_rise(PLAIN), MOST_FALL, at_least=False),
        goal("(b) full above plain transformer, same error on good", ahead("ratio", PLAIN), PLAIN_MARGIN),
        goal("(b) full above perceptron, same error on good", ahead("ratio", MLP), MLP_MARGIN),
        goal("(c) I-AUROC of full above both, same error on good", ahead("image", MLP, PLAIN), 0.0),
        goal("(c) patch AUROC of full above both, same error on good", ahead("patch", MLP, PLAIN), 0.0),
    ]


def print_points(points: Sequence[Point]) -> None:
    """Print every look, and what networks do at the same error on good images; means over seeds."""
    print("| network | steps | error on good | error on defects | I-AUROC | patch AUROC |\n|---|---|---|---|---|---|")
    for kind in dict.fromkeys(p.kind for p in points):
        for step in sorted({p.step for p in points if p.kind == kind}):
            _print_row(f"{kind} | {step}", [p for p in points if p.kind == kind and p.step == step])
    print("\nwhere the perceptron, the plain transformer and UniAD have the same error on good images\n")
    print("| network | steps | error on good | error on defects | I-AUROC | patch AUROC |\n|---|---|---|---|---|---|")
    found = [matched([p for p in points if p.seed == seed], (MLP, PLAIN, FULL)) for seed in {p.seed for p in points}]
    for kind in (MLP, PLAIN, FULL):
        own = [one[kind] for one in found]
        _print_row(f"{kind} | {np.mean([p.step for p in own]):.0f}", own)
    print()


def _print_row(head: str, points: Sequence[Point]) -> None:
    normal, ratio, image, patch = (
        float(np.mean([getattr(p, name) for p in points])) for name in ("normal", "ratio", "image", "patch")
    )
    print(f"| {head} | {normal:.1f} | {ratio:.3f} | {image:.3f} | {patch:.3f} |")


def draw(points: Sequence[Point], path: Path) -> None:
    """Write a PNG: error on defective patches over training, and over the error on good images."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, 2, sharey=True)
    for kind in dict.fromkeys(p.kind for p in points):
        steps = sorted({p.step for p in points if p.kind == kind})
        looked = [[p for p in points if p.kind == kind and p.step == step] for step in steps]
        ratio = np.array([np.mean([p.ratio for p in some]) for some in looked])
        low, high = (np.array([f(p.ratio for p in some) for some in looked]) for f in (min, max))
        style = {**_STYLES[kind], "markersize": 5, "linewidth": 1.8}
        panels[0].plot(steps, ratio, label=kind, **style)
        panels[0].fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        panels[1].plot([np.mean([p.normal for p in some]) for some in looked], ratio, **style)
    panels[0].set_xlabel("optimiser steps")
    panels[0].set_ylabel("error on defective patches over their length")
    panels[1].set_xlabel("mean error on good images (training goes to the right)")
    panels[1].invert_xaxis()
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle("1: a defect is not rebuilt; lower: it is copied")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    heading("shortcut")
    size = TINY if options.tiny else Size()
    points = [point for seed in range(options.seeds) for point in run_seed(size, seed)]
    print_points(points)
    if options.picture:
        draw(points, options.picture)
    if options.json:
        options.json.write_text(json.dumps([asdict(point) for point in points]))
    found = goals(points)
    print_goals(found)
    return found


if __name__ == "__main__":
    main()
