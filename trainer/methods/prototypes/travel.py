"""Prototypes as rows of a memory: their places are columns, so that boxes may update, send and merge them.

A pure module; it does not know transport, boxes or messages.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from edge.bundle import MemoryLayout
from trainer.methods.base import Head
from trainer.methods.feddymem.model import BANKS, NearestRow, repeated
from trainer.methods.prototypes.model import STRIDES, Metric, PrototypeHead, PrototypeSet, places

PLACE = 2
"""Columns of a row that say where it lies."""


class PlacedRows:
    """A travelling head as training sees it: places are columns, so that no cost of place is added to theirs."""

    metric = Metric.EUCLID
    float16_state: tuple[str, ...] = ()

    def __init__(self, head: TravellingHead) -> None:
        self._head = head
        self.sets = (replace(head.set, alpha=0.0),)

    def rows(self, _: str, tap: torch.Tensor) -> torch.Tensor:
        """Return rows float32 [N, h * w, C + 2]."""
        return self._head.embed(tap)

    def spatial(self, _: int) -> torch.Tensor:
        """Return no distances, float32 [h * w, cells]."""
        height, width = self._head.grid
        cells = self.sets[0].cells
        return self._head.farthest.new_zeros(height * width, cells[0] * cells[1])


class TravellingHead(Head):
    """Distance to the nearest of two banks of prototypes, each a row of features and its place.

    ``z = [sqrt((1 - alpha) / farthest) f, sqrt(alpha / 2) g]``: f a patch by the metric, g its place in the unit
    square. So ``|z - p|^2 = (1 - alpha) |f - f_p|^2 / farthest + alpha |g - g_p|^2 / 2``, the cost of prototypes with
    distances squared, and a prototype's place moves as its features do (the published method's free structure).
    ``memory_layout`` says what is computed. State: ``bank_local`` float32 [K, C + 2] and ``bank_fleet`` [K', C + 2].
    The embedding is float32 [N, h * w, C + 2], row-major on the tap's grid, and depends on the graph's constants alone.

    Args:
        one: the set; its cells and copies are K.
        channels: of its tap.
        grid: (h, w) of its tap.
        metric: how features are compared; the root is taken for each.
        pooled: as in :class:`PrototypeHead`.
        whitened: as there.
        background: as there.
    """

    state_names = BANKS

    bank_local: torch.Tensor
    bank_fleet: torch.Tensor
    farthest: torch.Tensor
    where: torch.Tensor

    def __init__(
        self,
        one: PrototypeSet,
        *,
        channels: int,
        grid: tuple[int, int],
        metric: Metric,
        pooled: bool,
        whitened: bool,
        background: float,
    ) -> None:
        super().__init__()
        self.set, self.grid, self.background = one, grid, background
        # It knows how a tap becomes patches; its own prototypes are not used.
        plain = PrototypeSet(one.tap, 0.0, (1, 1), 1)
        self.features = PrototypeHead(
            [plain], channels={one.tap: channels}, grids={one.tap: grid}, metric=metric, pooled=pooled,
            whitened=whitened,
        )  # fmt: skip
        self.search = NearestRow()
        self.tap_names, self.map_stride = (one.tap,), STRIDES[one.tap]
        # A new state would meet ranges that another was measured with; and rows are rounded nowhere before they leave.
        self.float_ops = ("features", "search")
        for name in BANKS:
            self.register_buffer(name, torch.zeros(one.size, channels + PLACE))
        self.register_buffer("farthest", torch.ones(1))
        self.register_buffer("where", places(grid), persistent=False)

    @property
    def memory_layout(self) -> MemoryLayout:
        """What a box must know to compute this head's map from an embedding and two banks."""
        return MemoryLayout(local=BANKS[0], fleet=BANKS[1], grid=self.grid, smoothing=0, background=self.background)

    @torch.no_grad()
    def set_banks(self, local: torch.Tensor, fleet: torch.Tensor | None = None) -> None:
        """Take over rows float32 [n, C + 2], n at most K; None repeats the local ones for the fleet."""
        self.bank_local.copy_(repeated(local, len(self.bank_local)))
        self.bank_fleet.copy_(repeated(local if fleet is None else fleet, len(self.bank_fleet)))

    def embed(self, tap: torch.Tensor) -> torch.Tensor:
        """Return rows float32 [N, h * w, C + 2] of the tap."""
        features = self.features.rows(self.set.tap, tap) * ((1.0 - self.set.alpha) / self.farthest).sqrt()
        # Zeros of the batch's size: a constant repeated by a shape would be arithmetic on shapes in the graph.
        where = features[..., :PLACE] * 0.0 + self.where * (self.set.alpha / 2) ** 0.5
        return torch.cat([features, where], 2)

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the map float32 [N, h, w] on the tap's grid and the embedding float32 [N, h * w, C + 2]."""
        rows = self.embed(taps[0])
        nearest = torch.minimum(self.search(rows, self.bank_local), self.search(rows, self.bank_fleet))
        distance = (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt().unflatten(1, self.grid)
        return distance - self.background * distance.mean((1, 2), keepdim=True), rows
