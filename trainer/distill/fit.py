"""Training a student: a small memory detector, then a branch that learns what its map lacks.

The branch has two outputs while it learns: the teachers' map and, with or without a teacher, the masks of synthetic
defects. How much of each is shipped is chosen on kinds of defects that it has not seen; both fold into one layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from deploy.metrics import image_auroc
from trainer.distill.model import StudentHead, unfold
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.memory.model import LEVELS, MAP_STRIDE

if TYPE_CHECKING:
    import numpy.typing as npt

    from deploy.progress import Progress
    from trainer.distill.student import StudentConfig
    from trainer.methods.memory.fit import MemoryConfig
    from trainer.methods.memory.model import MemoryHead

_BATCH = 16
_TARGET_RANGE = (-2.0, 8.0)  # deviations; beyond it a defect is a defect
_VISIBLE = 0.3  # share of a cell that a defect must cover to be asked for there
_MARGIN, _DEFECT_WEIGHT = 2.0, 3.0  # deviations at which a defect counts as found; a defective cell against a good one
_DECAY = 1e-3
SHARES = (0.0, 0.25, 0.5, 1.0)
_POOLED = 0.002  # share of the cells whose mean compares shares; the pooling rule itself is chosen afterwards


@dataclass(frozen=True)
class Lesson:
    """What a student of one size learns from.

    Attributes:
        features: of the lesson's pictures: good, relit, defective.
        good: how many of the pictures are good and as they came.
        masks: float32 [n tiles, h, w], share of each map cell that a defect covers.
        target: float32 [n tiles, h, w], the teachers' map on the student's grid, or None without a teacher.
        holdout: features of held-out good pictures.
        spoiled: features of the hold-out with defects of unseen kinds.
    """

    features: Features
    good: int
    masks: torch.Tensor
    target: torch.Tensor | None
    holdout: Features
    spoiled: Features


@dataclass(frozen=True)
class Shares:
    """How much of the branch's outputs is shipped.

    Attributes:
        teacher: of the one that follows the teachers' map; 0 without a teacher.
        masks: of the one that finds synthetic defects. Both 0: the memory detector alone.
    """

    teacher: float
    masks: float


def fit_student(
    lesson: Lesson, config: StudentConfig, *, seed: int, device: torch.device, progress: Progress
) -> tuple[StudentHead, Shares]:
    """Train a head.

    Args:
        lesson: what to learn from.
        config: settings.
        seed: of every random choice.
        device: where to train.
        progress: progress function.

    Returns:
        The head, in eval mode on the CPU, and how much of the branch's outputs it ships.
    """
    generator = torch.Generator().manual_seed(seed)
    memory = fit_memory(lesson.features, lesson.good, config, seed=seed, device=device, progress=progress)
    head = StudentHead(memory, width=config.width, generator=generator).to(device)
    head.requires_grad_(requires_grad=False)
    held = level_inputs(head, lesson.holdout, device)
    with torch.no_grad():
        good = head.bank_map(held)
        head.offset.copy_(good.mean())
        head.gain.copy_(1.0 / good.std().clamp_min(1e-6))
    found = _learn(head, lesson, config, generator, progress)
    shares = _choose(head, found, held, level_inputs(head, lesson.spoiled, device), lesson)
    _fold(head, found, shares)
    return head.to("cpu").eval().requires_grad_(requires_grad=False), shares


def fit_memory(
    features: Features, pictures: int, config: MemoryConfig, *, seed: int, device: torch.device, progress: Progress
) -> MemoryHead:
    """Fit a memory detector to the first pictures of features.

    Args:
        features: with taps s4, s8 and s16.
        pictures: how many of them are good and as they came, >= 2.
        config: settings.
        seed: of every random choice.
        device: where to fit.
        progress: progress function.
    """
    rows = pictures * features.tiles_per_image
    taps = {name: features.taps[name][:rows] for name in LEVELS}
    good = Features(taps, features.tiles_per_image, features.groups[:pictures])

    def refuse(_tiles: npt.NDArray[np.uint8]) -> Features:
        raise AssertionError("the memory detector makes no pictures of its own")

    context = FitContext(
        features=good,
        images=np.empty((0, 0, 0, 3), np.uint8),
        extract=refuse,
        validation=Validation(good, good, np.empty((0, 0, 0), np.bool_)),  # it looks at neither
        seed=seed,
        device=device,
        progress=progress,
    )
    return MemoryMethod.fit(context, config)


def level_inputs(head: StudentHead, features: Features, device: torch.device) -> list[torch.Tensor]:
    """Return what the branch sees of features, finest level first, on the device."""
    with torch.no_grad():
        parts = [head.levels(taps) for taps in features.batches(LEVELS, _BATCH, device=device)]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


def _learn(
    head: StudentHead, lesson: Lesson, config: StudentConfig, generator: torch.Generator, progress: Progress
) -> nn.Conv2d:
    """Train the branch; return the layer of its second output, which finds the synthetic defects."""
    branch, device = head.branch, head.offset.device
    found = _silent_layer(branch.leave).to(device)
    levels = level_inputs(head, lesson.features, device)
    with torch.no_grad():
        banks = head.bank_map(levels)
    visible = (lesson.masks > _VISIBLE).float().to(device)
    target = None if lesson.target is None else lesson.target.clamp(*_TARGET_RANGE).to(device)
    branch.requires_grad_(requires_grad=True)
    optimiser = torch.optim.AdamW(
        [*branch.parameters(), *found.parameters()], config.learning_rate, weight_decay=_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=max(config.steps, 2))
    for step in range(config.steps):
        rows = torch.randint(len(lesson.features), (config.batch,), generator=generator).to(device)
        hidden = branch.hidden(*(level[rows] for level in levels))
        loss = _found_loss(banks[rows] + unfold(found(hidden)), visible[rows])
        if target is not None:
            loss = loss + functional.smooth_l1_loss(banks[rows] + unfold(branch.leave(hidden)), target[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress("train the branch", step + 1, config.steps)
    return found


def _silent_layer(like: nn.Conv2d) -> nn.Conv2d:
    layer = skip_init(nn.Conv2d, like.in_channels, like.out_channels, 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _found_loss(maps: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Ask for more than the margin on every visible cell of a defect, for less everywhere else."""
    weight = torch.tensor(_DEFECT_WEIGHT, device=maps.device)
    return functional.binary_cross_entropy_with_logits(maps - _MARGIN, visible, pos_weight=weight)


def _choose(
    head: StudentHead,
    found: nn.Conv2d,
    held: list[torch.Tensor],
    spoiled: list[torch.Tensor],
    lesson: Lesson,
) -> Shares:
    """Return the shares of the outputs that find most defects of unseen kinds; the smallest of equals."""
    good, bad = (_three_maps(head, found, levels) for levels in (held, spoiled))
    # Without a teacher the first output has learned nothing.
    offered = itertools.product(SHARES if lesson.target is not None else (0.0,), SHARES)

    def finds(shares: tuple[float, float]) -> float:
        weights = torch.tensor((1.0, *shares), device=good.device)[:, None, None, None]
        return _auroc((weights * good).sum(0), (weights * bad).sum(0), lesson.holdout.tiles_per_image)

    return Shares(*max(offered, key=finds))


def _three_maps(head: StudentHead, found: nn.Conv2d, levels: list[torch.Tensor]) -> torch.Tensor:
    """Return the memory's map and both outputs of the branch, [3, N, h, w]."""
    with torch.no_grad():
        hidden = head.branch.hidden(*levels)
        return torch.stack([head.bank_map(levels), unfold(head.branch.leave(hidden)), unfold(found(hidden))])


def _fold(head: StudentHead, found: nn.Conv2d, shares: Shares) -> None:
    """Leave the branch one output: both, by their shares."""
    with torch.no_grad():
        for first, second in zip(head.branch.leave.parameters(), found.parameters(), strict=True):
            first.mul_(shares.teacher).add_(shares.masks * second)


def _auroc(good: torch.Tensor, bad: torch.Tensor, tiles: int) -> float:
    cells = max(1, round(_POOLED * good[0].numel()))
    scores = []
    for maps in (good, bad):
        # An image's score is that of its worst tile.
        worst = maps.flatten(1).topk(cells, 1).values.mean(1)
        scores.append(worst.unflatten(0, (-1, tiles)).amax(1).cpu().numpy())
    labels = np.repeat([False, True], [len(part) for part in scores])
    return float(image_auroc(labels, np.concatenate(scores)) or 0.0)


def cut_maps(maps: torch.Tensor, rows: int, cols: int, tile: tuple[int, int], overlap: int) -> torch.Tensor:
    """Cut maps [n, H, W] of whole canvases into [n * rows * cols, h, w], a picture's tiles consecutive.

    Args:
        maps: on a grid of ``MAP_STRIDE``.
        rows: of tiles.
        cols: of tiles.
        tile: height and width of a tile in pixels.
        overlap: pixels that neighbours share.
    """
    h, w = (side // MAP_STRIDE for side in tile)
    step = overlap // MAP_STRIDE
    cut = [
        maps[:, r * (h - step) : r * (h - step) + h, c * (w - step) : c * (w - step) + w]
        for r in range(rows)
        for c in range(cols)
    ]
    return torch.stack(cut, 1).flatten(0, 1)
