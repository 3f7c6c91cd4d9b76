"""Folders embedded by the fleet memory's shared generator, and what benchmarks of a box's memory share.

It must not know what is measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from benchmarks._images import CPU
from benchmarks._setting import quiet
from deploy.metrics import image_auroc
from edge.bundle import MemoryLayout, Pooling, Preprocessing
from edge.judgement.score import pool_score
from edge.memory.bank import MemoryBank
from edge.memory.search import anomaly_map
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.backbones.registry import trunk_id
from trainer.data.folder import read_folder
from trainer.features import extract_tiles, load_canvases
from trainer.methods.feddymem.fit import FedDyMemMethod, recipe_of
from trainer.methods.feddymem.model import LEVELS, MAP_STRIDE
from trainer.methods.feddymem.sources import generic_generator
from trainer.synthesis.image2d import synthesise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Canvases = npt.NDArray[np.uint8]
    Frames = npt.NDArray[np.float16]
    Rows = npt.NDArray[np.float32]
    Scores = npt.NDArray[np.float64]
    Embed = Callable[[Canvases], Frames]

T = TypeVar("T")

_BATCH = 32
_FIT = 40  # images of the trainer's bank
_DRAWS = 20_000
_SCAR_SIZE = (0.05, 0.2)
_JITTER = 4  # pixels that a recurring defect moves from part to part


@dataclass(frozen=True)
class Product:
    """One folder, embedded.

    Attributes:
        name: of the folder and the one above it.
        train: float16 [n, L, D], training images, all good.
        canvases: uint8 [n, H, W, 3] RGB, those images.
        good: float16 [k, L, D], good test images.
        bad: float16 [m, L, D], defective test images.
        layout: of the head whose maps are scored.
        preprocessing: one tile.
        embed: canvases to frames.
    """

    name: str
    train: Frames
    canvases: Canvases
    good: Frames
    bad: Frames
    layout: MemoryLayout
    preprocessing: Preprocessing
    embed: Embed

    def scores(self, frames: Frames, bank: Rows) -> Scores:
        """Return the image scores float64 [n] of frames float16 [n, L, D] under a bank."""
        judge = partial(
            anomaly_map, banks=[bank], layout=self.layout, preprocessing=self.preprocessing, map_stride=MAP_STRIDE
        )
        return np.array([pool_score(judge(frame[None].astype(np.float32)), Pooling()) for frame in frames])


def open_product(folder: Path, embed: Embed, layout: Callable[[int], MemoryLayout], *, size: int, most: int) -> Product:
    """Read and embed a folder, at most ``most`` training images, as many test images, half of them good."""
    found = read_folder(folder)
    good = [sample for sample in found.test if not sample.anomalous]
    bad = [sample for sample in found.test if sample.anomalous]
    preprocessing = Preprocessing(height=size, width=size)
    train, good, bad = (
        thinned(part, count) for part, count in ((found.train, most), (good, most // 2), (bad, most // 2))
    )
    canvases = load_canvases(train, preprocessing, progress=quiet, what="")
    seen = [embed(load_canvases(part, preprocessing, progress=quiet, what="")) for part in (good, bad)]
    print(f"  read {folder}: {len(train)} to learn, {len(good)} good and {len(bad)} bad", file=sys.stderr, flush=True)
    name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
    return Product(name, embed(canvases), canvases, *seen, layout(size), preprocessing, embed)


def open_embedder() -> tuple[Embed, Callable[[int], MemoryLayout]]:
    """Return what turns canvases into frames, and what gives the head's layout for a size."""
    trunk, config = lite0_trunk(), FedDyMemMethod.config("quick")
    extract = partial(extract_tiles, trunk=trunk, tap_names=LEVELS, device=CPU)
    made = generic_generator(extract, recipe_of(config), trunk_id=trunk_id(trunk), progress=quiet)

    def embed(canvases: Canvases) -> Frames:
        parts = []
        for start in range(0, len(canvases), _BATCH):
            taps = extract(canvases[start : start + _BATCH]).taps
            with torch.inference_mode():
                rows = made.generator(*(taps[name].float() for name in LEVELS))
            parts.append(rows.flatten(2).transpose(1, 2).to(torch.float16).numpy())
        return np.concatenate(parts)

    def layout(size: int) -> MemoryLayout:
        cells = size // MAP_STRIDE
        return MemoryLayout(grid=(cells, cells), smoothing=config.smoothing, background=config.background)

    return embed, layout


@dataclass(frozen=True)
class Pool:
    """Good frames by what they are for; images are drawn apart, whatever their groups.

    Attributes:
        fit: float16 [40, L, D], of the trainer's bank.
        commissioning: declared good, for gates and thresholds.
        held: for judging.
        stream: what passes the camera.
    """

    fit: Frames
    commissioning: Frames
    held: Frames
    stream: Frames

    @classmethod
    def cut(cls, good: Frames, rng: np.random.Generator) -> Pool:
        """Cut frames drawn in random order: 40 to fit, then a quarter, a quarter and half of the others."""
        mixed, rest = good[rng.permutation(len(good))], cls.share(len(good))
        return cls(*np.split(mixed, np.cumsum([_FIT, rest, rest])))

    @staticmethod
    def share(good: int) -> int:
        """Return how many of so many good frames are for commissioning."""
        return (good - _FIT) // 4

    def round(self, number: int, rounds: int) -> Frames:
        """Return the frames of one of several rounds: an equal share of the stream each, then again from the first."""
        share = len(self.stream) // rounds
        return self.stream[np.arange(number * share, (number + 1) * share) % len(self.stream)]


def scar(canvases: Canvases, rng: np.random.Generator) -> Canvases:
    """Put one and the same defect on every canvas, within 4 pixels of one place: a scratched mould, a dirty roller."""
    made = synthesise(np.ascontiguousarray(canvases[0]), rng=rng, size=_SCAR_SIZE)
    change = made.image.astype(np.int16) - canvases[0]
    moved = [np.roll(change, tuple(rng.integers(-_JITTER, _JITTER + 1, 2)), (0, 1)) for _ in canvases]
    return np.clip(canvases + np.stack(moved), 0, 255).astype(np.uint8)


def auroc(product: Product, good: Sequence[Frames], bad: Sequence[Frames], bank: Rows) -> float:
    """Return the I-AUROC of good against defective frames under a bank."""
    return area(product.scores(good, bank), product.scores(bad, bank))


def area(good: Scores, bad: Scores) -> float:
    """Return the I-AUROC of good scores against those of defective images."""
    found = image_auroc(np.r_[np.zeros(len(good), bool), np.ones(len(bad), bool)], np.r_[good, bad])
    if found is None:
        raise ValueError("no good or no defective images to tell apart")
    return found


def raw_bank(frames: Frames | Rows) -> MemoryBank:
    """Return the patch rows of frames [..., D] as a bank, each with support and frames 1."""
    rows = frames.reshape(-1, frames.shape[-1]).astype(np.float32)
    return MemoryBank(rows=rows, support=np.ones(len(rows), np.float32), frames=np.ones(len(rows), np.float32))


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many items, evenly drawn."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def rate_interval(counts: Sequence[tuple[int, int]], alpha: float, *, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the false-alarm rate over products that a kept budget allows.

    With a threshold on the k-th of n calibration scores, the rate on new good images is Beta(n + 1 - k, k); the false
    alarms of m images are binomial in it.

    Args:
        counts: m judged images and n calibration scores of each product.
        alpha: the budget per image; 1 / (n + 1) at least.
        level: of the interval.
    """
    rng, total = np.random.default_rng(0), np.zeros(_DRAWS)
    for judged, calibration in counts:
        k = min(calibration, int(np.ceil((calibration + 1) * (1 - alpha))))
        total += rng.binomial(judged, rng.beta(calibration + 1 - k, k, _DRAWS))
    low, high = np.quantile(total / sum(judged for judged, _ in counts), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
