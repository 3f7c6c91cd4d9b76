"""Training a student: banks in an embedding, then a branch that learns what the banks' map lacks.

The branch has two outputs while it learns: one brings the banks' map to the teacher's (on good parts and on parts
with synthetic defects), one finds the synthetic defects themselves. How much of each is shipped is chosen on kinds
of defects that the branch has not seen; the two are then folded into one layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from deploy.metrics import image_auroc
from trainer.distill.model import MAP_STRIDE, unfold
from trainer.distill.student import empty_head
from trainer.distill.teachers import tile_rows
from trainer.methods.memory.reduce import greedy_coreset, weighted_average_reduce, whitening
from trainer.methods.patches import patch_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.progress import Progress
    from trainer.distill.model import StudentHead
    from trainer.distill.student import StudentConfig
    from trainer.distill.teachers import Taught
    from trainer.methods.base import Features

_BATCH = 16
_UNSEEN_SHARE = 0.25  # of the good pictures, left out of the banks: distances to them are as on a line
_RIDGE = 0.01
_TARGET_RANGE = (-2.0, 8.0)  # deviations; beyond it a defect is a defect
_VISIBLE = 0.3  # share of a cell that a defect must cover to be asked for there
_MARGIN, _DEFECT_WEIGHT = 2.0, 3.0  # deviations at which a defect counts as found; a defective cell against a good one
SOFT_SHARES, HARD_SHARES = (0.0, 0.5, 1.0), (0.0, 0.25, 0.5, 1.0)
_POOLED = 0.002  # share of the cells whose mean compares shares; the pooling rule itself is chosen afterwards


@dataclass(frozen=True)
class Lesson:
    """What a student of one size learns from.

    Attributes:
        features: of the lesson's pictures: good, relit, defective.
        good: how many of the pictures are good and as they came.
        masks: float32 [n tiles, h, w], share of each map cell that a defect covers.
        target: float32 [n tiles, h, w], the teachers' map on the student's grid, or None without a teacher.
        taught: what else the teachers said, or None.
        holdout: features of held-out good pictures.
        spoiled: features of the hold-out with defects of unseen kinds.
    """

    features: Features
    good: int
    masks: torch.Tensor
    target: torch.Tensor | None
    taught: Taught | None
    holdout: Features
    spoiled: Features


@dataclass(frozen=True)
class Shares:
    """How much of the branch's outputs is shipped, and the I-AUROC on unseen kinds of defects that chose it."""

    soft: float
    hard: float
    image_auroc: float
    embedding: str


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
        The head, in eval mode on the CPU, and what was chosen on the way.
    """
    return _Fit(lesson, config, seed, device, progress).run()


class _Fit:
    def __init__(
        self, lesson: Lesson, config: StudentConfig, seed: int, device: torch.device, progress: Progress
    ) -> None:
        self.lesson, self.config, self.device, self.progress = lesson, config, device, progress
        self.generator = torch.Generator().manual_seed(seed)
        self.names = tuple(name for name in ("s4", "s8", "s16") if name in lesson.features.taps)
        self.tiles = lesson.features.tiles_per_image
        order = torch.randperm(lesson.good, generator=self.generator).numpy()
        kept = max(1, lesson.good - max(1, round(_UNSEEN_SHARE * lesson.good)))
        self.seen, self.unseen = (tile_rows(np.sort(part), self.tiles) for part in (order[:kept], order[kept:]))

    def run(self) -> tuple[StudentHead, Shares]:
        own = self._whitenings()
        choices = {"own": own}
        if self.lesson.taught is not None and self.config.embedding != "own":
            choices["teacher"] = self._adapters(own)
        if self.config.embedding == "teacher" and "teacher" in choices:
            del choices["own"]
        heads = {name: self._banks(embeddings) for name, embeddings in choices.items()}
        embedding = max(heads, key=lambda name: self._bank_auroc(heads[name])) if len(heads) > 1 else next(iter(heads))
        head = heads[embedding]
        hard = self._learn(head)
        shares = self._choose(head, hard, embedding)
        with torch.no_grad():
            leave = head.branch.leave
            leave.weight.mul_(shares.soft).add_(shares.hard * hard.weight)
            assert leave.bias is not None
            assert hard.bias is not None
            leave.bias.mul_(shares.soft).add_(shares.hard * hard.bias)
        return head.to("cpu").eval().requires_grad_(requires_grad=False), shares

    def _rows(self, name: str, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield patch rows float32 [n, C] of a level."""
        for (tap,) in self.lesson.features.batches((name,), _BATCH, device=self.device, order=rows):
            yield patch_mean(tap).permute(0, 2, 3, 1).flatten(0, 2)

    def _whitenings(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        for name in self.names:
            mean, matrix = whitening(
                self._rows(name, tile_rows(np.arange(self.lesson.good), self.tiles)), self.config.whitening
            )
            found[name] = (matrix, -(mean @ matrix))
        return found

    def _adapters(
        self, own: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Regress the teacher's whitened features of a level on the student's tap of that level: ridge, closed form."""
        taught, found = self.lesson.taught, dict(own)
        assert taught is not None
        rows = tile_rows(taught.embedded, self.tiles)
        for name in self.names:
            if name not in taught.embedding:
                continue
            wanted, (matrix, bias) = taught.embedding[name], own[name]
            given = patch_mean(self.lesson.features.taps[name][rows].float())
            wanted = functional.interpolate(wanted, size=given.shape[2:], mode="bilinear", antialias=True)
            x = given.permute(0, 2, 3, 1).flatten(0, 2) @ matrix + bias
            y = wanted.permute(0, 2, 3, 1).flatten(0, 2)
            weight, offset = _ridge(x, y)
            found[name] = (matrix @ weight, bias @ weight + offset)
        return found

    def _banks(self, embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> StudentHead:
        """Make a head with banks and scales, and a branch that corrects nothing yet."""
        config = self.config
        sizes = [max(1, config.rows // 2) if name == self.names[0] else config.rows for name in self.names]
        rows = {name: self._bank(name, embeddings[name], size) for name, size in zip(self.names, sizes, strict=True)}
        head = empty_head(
            config,
            [len(rows[name]) for name in self.names],
            [(int(m.shape[0]), int(m.shape[1])) for m, _ in (embeddings[name] for name in self.names)],
            self._places(),
            self.generator,
        )
        with torch.no_grad():
            for name in self.names:
                matrix, bias = embeddings[name]
                layer = head.get_submodule(f"embed_{name}")
                layer.weight.copy_(matrix.T[:, :, None, None])
                layer.bias.copy_(bias)
                head.get_buffer(f"bank_{name}").copy_(rows[name])
            head.to(self.device)
            levels = self._levels(head, self.lesson.features, self.unseen)
            for index, level in enumerate(levels):
                weight = config.fine_weight if index == 0 else 1.0
                head.scales[index] = weight / max(float(level[:, -1].mean()), 1e-6)
                level[:, -1] *= head.scales[index]
            good = head.bank_map(levels)
            head.offset.fill_(float(good.mean()))
            head.gain.fill_(1.0 / max(float(good.std()), 1e-6))
        return head

    def _places(self) -> tuple[int, int]:
        """Return how many places of 32 pixels a tile has; the stride-8 tap says its size."""
        height, width = self.lesson.features.taps["s8"].shape[2:]
        return height // 4, width // 4

    def _bank(self, name: str, embedding: tuple[torch.Tensor, torch.Tensor], size: int) -> torch.Tensor:
        matrix, bias = (part.to(self.device) for part in embedding)
        sites = self.lesson.features.taps[name][0, 0].numel() * len(self.seen)
        share, drawn = min(1.0, self.config.candidates / sites), []
        for batch in self._rows(name, self.seen):
            keep = torch.randperm(len(batch), generator=self.generator)[: max(1, round(share * len(batch)))]
            drawn.append(batch[keep.to(batch.device)] @ matrix + bias)
        pool = torch.cat(drawn)
        chosen = greedy_coreset(pool, min(size, len(pool)), self.generator)
        every = (batch @ matrix + bias for batch in self._rows(name, self.seen))
        return weighted_average_reduce(every, pool[chosen.to(pool.device)])[0].cpu()

    def _levels(self, head: StudentHead, features: Features, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Return the branch's inputs of some rows, on the CPU."""
        with torch.no_grad():
            parts = [head.levels(taps) for taps in features.batches(self.names, _BATCH, device=self.device, order=rows)]
        return [torch.cat([part[index].cpu() for part in parts]) for index in range(len(self.names))]

    def _bank_auroc(self, head: StudentHead) -> float:
        held, spoiled = (self._levels(head, part) for part in (self.lesson.holdout, self.lesson.spoiled))
        with torch.no_grad():
            head.to("cpu")
            found = self._auroc(head.bank_map(held), head.bank_map(spoiled))
            head.to(self.device)
        return found

    def _learn(self, head: StudentHead) -> nn.Conv2d:
        """Train the branch; return the layer of its second output, which finds the synthetic defects."""
        config, lesson, branch = self.config, self.lesson, head.branch
        hard = nn.Conv2d(branch.leave.in_channels, branch.leave.out_channels, 1).to(self.device)
        nn.init.zeros_(hard.weight)
        assert hard.bias is not None
        nn.init.zeros_(hard.bias)
        levels = self._levels(head, lesson.features)
        head.requires_grad_(requires_grad=False)
        branch.requires_grad_(requires_grad=True)
        parameters = [*branch.parameters(), *hard.parameters()]
        optimiser = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, config.learning_rate, total_steps=max(config.steps, 2)
        )
        for step in range(config.steps):
            rows = torch.randint(len(lesson.features), (config.batch,), generator=self.generator)
            batch = [level[rows].to(self.device) for level in levels]
            bank = head.bank_map(batch)
            hidden = branch.hidden(dict(zip(self.names, batch, strict=True)))
            loss = config.hard * _found_loss(bank + unfold(hard(hidden)), lesson.masks[rows].to(self.device))
            if lesson.target is not None:
                target = lesson.target[rows].to(self.device).clamp(*_TARGET_RANGE)
                loss = loss + config.soft * functional.smooth_l1_loss(bank + unfold(branch.leave(hidden)), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            self.progress("train the branch", step + 1, config.steps)
        return hard

    def _choose(self, head: StudentHead, hard: nn.Conv2d, embedding: str) -> Shares:
        """Choose how much of each output is shipped, on kinds of defects that neither has seen."""
        parts = []
        for features in (self.lesson.holdout, self.lesson.spoiled):
            maps = []
            levels = self._levels(head, features)
            with torch.no_grad():
                for start in range(0, len(features), _BATCH):
                    batch = [level[start : start + _BATCH].to(self.device) for level in levels]
                    hidden = head.branch.hidden(dict(zip(self.names, batch, strict=True)))
                    three = (head.bank_map(batch), unfold(head.branch.leave(hidden)), unfold(hard(hidden)))
                    maps.append(torch.stack([one.cpu() for one in three]))
            parts.append(torch.cat(maps, 1))
        soft_shares = SOFT_SHARES if self.lesson.target is not None else (0.0,)
        best = Shares(0.0, 0.0, -1.0, embedding)
        for soft, share in itertools.product(soft_shares, HARD_SHARES):
            good, bad = (bank + soft * first + share * second for bank, first, second in parts)
            found = self._auroc(good, bad)
            if found > best.image_auroc:
                best = Shares(soft, share, found, embedding)
        return best

    def _auroc(self, good: torch.Tensor, bad: torch.Tensor) -> float:
        cells = max(1, round(_POOLED * good[0].numel()))
        scores = []
        for maps in (good, bad):
            # An image's score is that of its worst tile.
            tiles = maps.flatten(1).topk(cells, 1).values.mean(1)
            scores.append(tiles.unflatten(0, (-1, self.tiles)).amax(1).numpy())
        labels = np.repeat([False, True], [len(part) for part in scores])
        return float(image_auroc(labels, np.concatenate(scores)) or 0.0)


def _ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight [C, D] and offset [D] of the ridge regression of y [n, D] on x [n, C], in float64 sums."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    gram += _RIDGE * len(x) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y))
    return weight.float(), (mean_y - mean_x @ weight).float()


def _found_loss(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Ask for more than the margin on every visible cell of a defect, for less everywhere else."""
    return functional.binary_cross_entropy_with_logits(
        maps - _MARGIN, (masks > _VISIBLE).float(), pos_weight=torch.tensor(_DEFECT_WEIGHT, device=maps.device)
    )


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
