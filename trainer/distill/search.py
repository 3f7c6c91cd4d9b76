"""Train a few students, time each as a box would run it, keep the best that fits the budget.

Which shapes are worth training is known before any is trained: what a graph costs does not depend on its weights.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploy.progress import no_progress
from edge.bundle import Preprocessing, Tiles
from edge.errors import UsageError
from trainer.backbones.registry import TrunkSpec, build_trunk
from trainer.distill.fit import Lesson, cut_maps, fit_student
from trainer.distill.latency import Timing, export_int8, measure
from trainer.distill.model import StudentHead
from trainer.features import extract
from trainer.fit import choose_pooling, head_maps
from trainer.methods.memory.model import LEVELS, MAP_STRIDE, MemoryHead
from trainer.methods.memory.sites import SiteModel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Pooling
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.distill.fit import Shares
    from trainer.distill.gallery import Gallery
    from trainer.distill.latency import Exported
    from trainer.distill.student import StudentConfig
    from trainer.distill.teachers import Taught
    from trainer.methods.base import Features

_STEP = 32  # pixels: heads and trunks take multiples of it


@dataclass(frozen=True)
class Shape:
    """What a student costs, before it is trained.

    Attributes:
        trunk: its trunk.
        preprocessing: its input.
        rows: of a level's bank.
    """

    trunk: TrunkSpec
    preprocessing: Preprocessing
    rows: int

    def __str__(self) -> str:
        size = f"{self.preprocessing.height}x{self.preprocessing.width}"
        return f"{self.trunk.name} of {self.trunk.blocks} blocks at {size}, {self.rows} rows"


@dataclass(frozen=True)
class Trained:
    """A student that learned.

    Attributes:
        shape: what it costs.
        config: its settings.
        trunk: its trunk.
        head: in eval mode on the CPU.
        shares: of the branch's outputs that it ships.
        pooling: from map to score.
        validation: I-AUROC of every pooling rule on unseen kinds of synthetic defects.
        seconds: to train, features included.
    """

    shape: Shape
    config: StudentConfig
    trunk: Trunk
    head: StudentHead
    shares: Shares
    pooling: Pooling
    validation: dict[str, float]
    seconds: float

    @property
    def image_auroc(self) -> float:
        """The best I-AUROC on synthetic validation."""
        return max(self.validation.values())


def shapes(
    base: Preprocessing, *, trunk: str, blocks: Sequence[int], sizes: Sequence[int], rows: Sequence[int]
) -> list[Shape]:
    """Return every combination.

    Args:
        base: whose crop, tiles and proportions students keep.
        trunk: name of their network.
        blocks: numbers of blocks.
        sizes: heights of the input in pixels, multiples of 32.
        rows: of a level's bank.

    Raises:
        UsageError: nothing to combine, a trunk is unknown or too short to have a tap at stride 16, or a size is no
            multiple of 32 or does not suit the tiles.
    """
    if not (blocks and sizes and rows):
        raise UsageError("--blocks, --sizes and --rows: give at least one value each")
    for count in blocks:
        if LEVELS[-1] not in build_trunk(TrunkSpec(name=trunk, blocks=count)).tap_names:
            raise UsageError(f"--blocks {count}: {trunk} has no tap at stride 16 there; give 6 to 11 blocks")
    return [
        Shape(TrunkSpec(name=trunk, blocks=count), scaled(base, size), bank)
        for count, size, bank in itertools.product(blocks, sizes, rows)
    ]


def scaled(base: Preprocessing, height: int) -> Preprocessing:
    """Return the same view at another height; see :func:`shapes`."""
    if height < _STEP or height % _STEP:
        raise UsageError(f"--sizes {height}: give heights in pixels that are multiples of {_STEP}")
    width = max(_STEP, round(base.width * height / base.height / _STEP) * _STEP)
    overlap = base.tiles.overlap * height / base.height
    if overlap % _STEP:
        raise UsageError(
            f"--sizes {height}: tiles that overlap by {base.tiles.overlap} of {base.height} pixels would overlap by "
            f"{overlap:g}, no multiple of {_STEP}; take another size"
        )
    tiles = Tiles(rows=base.tiles.rows, cols=base.tiles.cols, overlap=int(overlap))
    return Preprocessing(height=height, width=width, tiles=tiles, crop=base.crop, resize=base.resize)


def export_shapes(
    wanted: Sequence[Shape], config: StudentConfig, generic: npt.NDArray[np.uint8], folder: Path, *, progress: Progress
) -> list[Exported]:
    """Export students of these shapes with weights that mean nothing: they cost what trained ones do."""
    exported = []
    for index, shape in enumerate(wanted):
        trunk = build_trunk(shape.trunk)
        generator = torch.Generator().manual_seed(0)
        head = _untrained(shape, trunk, config, generator)
        for parameter in (*head.parameters(), *(head.get_buffer(name) for name in head.state_names)):
            torch.nn.init.normal_(parameter.data, std=0.1, generator=generator)
        noise = np.random.default_rng(0).integers(0, 256, (4, *_canvas(shape.preprocessing), 3), dtype=np.uint8)
        exported.append(
            export_int8(
                trunk,
                head.eval().requires_grad_(requires_grad=False),
                shape.preprocessing,
                canvases=noise,
                generic=generic,
                folder=folder / f"shape{index}",
            )
        )
        progress("export shapes", index + 1, len(wanted))
    return exported


def _untrained(shape: Shape, trunk: Trunk, config: StudentConfig, generator: torch.Generator) -> StudentHead:
    channels = tuple(int(trunk.tap_channels[name]) for name in LEVELS)
    grid = (shape.preprocessing.height // 8, shape.preprocessing.width // 8)
    memory = MemoryHead(
        rows=(max(1, shape.rows // 2), shape.rows, shape.rows),
        channels=channels,
        background=config.background,
        sites=SiteModel(channels=channels, components=config.site_components, grid=grid),
        site_weight=config.site_weight,
    )
    return StudentHead(memory, width=config.width, generator=generator)


def _canvas(preprocessing: Preprocessing) -> tuple[int, int]:
    return preprocessing.canvas_height, preprocessing.canvas_width


def train_student(
    shape: Shape,
    gallery: Gallery,
    taught: Taught | None,
    config: StudentConfig,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Trained:
    """Train one student.

    Args:
        shape: its trunk, input and rows.
        gallery: the pictures.
        taught: what the teachers said of them; None trains on synthetic masks alone, the control.
        config: settings; ``rows`` comes from the shape.
        seed: of every random choice.
        device: where to train.
        progress: progress function.
    """
    started = time.monotonic()
    config = config.model_copy(update={"rows": shape.rows})
    trunk = build_trunk(shape.trunk)
    views, preprocessing = gallery.at(shape.preprocessing), shape.preprocessing

    def features(canvases: npt.NDArray[np.uint8], what: str) -> Features:
        return extract(
            trunk,
            canvases,
            preprocessing,
            tap_names=LEVELS,
            groups=np.arange(len(canvases)).astype(np.str_),
            device=device,
            progress=progress,
            what=what,
        )

    grid = (preprocessing.canvas_height // MAP_STRIDE, preprocessing.canvas_width // MAP_STRIDE)
    lesson = Lesson(
        features=features(views.lesson(), "features of the lesson"),
        good=len(views.good),
        masks=_tiles(gallery.lesson_masks(grid), preprocessing),
        target=None if taught is None else _tiles(taught.target(grid), preprocessing),
        holdout=features(views.holdout, "features of hold-out"),
        spoiled=features(views.spoiled, "features of synthetic defects"),
    )
    head, shares = fit_student(lesson, config, seed=seed, device=device, progress=progress)
    pooling, validation = choose_pooling(
        head_maps(head, lesson.holdout, preprocessing, device), head_maps(head, lesson.spoiled, preprocessing, device)
    )
    seconds = time.monotonic() - started
    return Trained(shape, config, trunk.to("cpu"), head, shares, pooling, validation, seconds)


def _tiles(maps: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    tiles = preprocessing.tiles
    return cut_maps(maps, tiles.rows, tiles.cols, (preprocessing.height, preprocessing.width), tiles.overlap)


def time_trained(
    students: Sequence[Trained], gallery: Gallery, generic: npt.NDArray[np.uint8], folder: Path
) -> tuple[list[Exported], list[Timing]]:
    """Export trained students in int8 and time them in turns."""
    exported = []
    for index, student in enumerate(students):
        views = gallery.at(student.shape.preprocessing, progress=no_progress)
        exported.append(
            export_int8(
                student.trunk,
                student.head,
                student.shape.preprocessing,
                canvases=np.concatenate([views.holdout[:32], views.spoiled[:32]]),
                generic=generic,
                folder=folder / f"student{index}",
            )
        )
    return exported, measure(exported)
