"""The prototype head: cost from each patch to its nearest prototype, in features and in place.

A pure module; the transport that made the prototypes is not in it. Source: PRADOT (prototypes by optimal transport);
what differs is in the README.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import skip_init

from edge.errors import DataError
from trainer.methods.base import Head
from trainer.methods.patches import enlarge, patch_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

STRIDES = {"s4": 4, "s8": 8, "s16": 16}
FARTHEST = 2.0**0.5
"""Largest distance between two places of the unit square: what spatial costs are divided by."""
EMPTY = 1e3
"""Added to the cost of a prototype that no good patch stands behind: it explains nothing."""
STATE = ("prototypes", "mass", "farthest", "typical")
"""State tensors of each set, by their first word."""
_TINY = 1e-12


class Metric(str, Enum):
    """How patches are compared with prototypes.

    ``cosine``: 1 - cos, as published. ``euclid``: squared distance, which also sees how long a whitened patch is.
    ``soft``: squared distance of patches p / sqrt(|p|^2 + floor^2), between the two: a patch that is short beside
    others, such as a bare plate, has no direction to speak of.
    """

    COSINE = "cosine"
    SOFT = "soft"
    EUCLID = "euclid"


@dataclass(frozen=True)
class PrototypeSet:
    """One set of prototypes.

    Attributes:
        tap: that its patches are from.
        alpha: share of the place in the cost; 0 knows no places.
        cells: rows and columns of the grid that prototypes lie on.
        copies: prototypes of each cell.
        weight: in the map.
    """

    tap: str
    alpha: float
    cells: tuple[int, int]
    copies: int
    weight: float = 1.0

    @property
    def size(self) -> int:
        """K, the number of prototypes: all cells, then all cells again."""
        return self.copies * self.cells[0] * self.cells[1]


def places(grid: tuple[int, int]) -> torch.Tensor:
    """Return the middle of each cell in the unit square, float32 [h w, 2] as (y, x), row by row."""
    axes = [(torch.arange(side) + 0.5) / side for side in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), 2).flatten(0, 1)


def distances(sites: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return how far places [K, 2] lie from sites [L, 2], float32 [L, K]."""
    return (sites[:, None] - where).square().sum(2).sqrt()


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows float32 [..., C] of unit length; one of no length stays 0."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(_TINY)


def feature_costs(rows: torch.Tensor, prototypes: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Return costs float32 [..., L, K] of rows [..., L, C] at prototypes [..., K, C], not divided by anything.

    Of the cosine both must be of unit length already.
    """
    products = rows @ prototypes.transpose(-1, -2)
    if metric is Metric.COSINE:
        return 1.0 - products
    lengths = (prototypes * prototypes).sum(-1)
    return (rows * rows).sum(-1, keepdim=True) + (lengths[..., None, :] - 2.0 * products)


class PrototypeHead(Head):
    """Cost of each patch to its nearest prototype, summed over sets of prototypes.

    ``min_k (1 - alpha) D(f, p_k) / farthest + alpha |g - c_k| / sqrt 2``: f a patch at place g, p_k a prototype at
    place c_k, D by the metric; its root but for ``cosine``; over ``typical``, times the set's weight. Both
    normalisers are frozen: a maximum taken from the image itself would let a defect lower the scores of everything
    beside it.

    State, per set i: ``prototypes_i`` float32 [K, C], ``mass_i`` [K] (good patches behind each; one without any is
    left out), ``farthest_i`` [1] and ``typical_i`` [1]; of several products with an axis of products before. Places are
    constants: they follow from the grid.

    Args:
        sets: of prototypes.
        channels: of each tap.
        grids: (h, w) of each tap.
        metric: see above.
        pooled: patches of s8 and s16 are 3x3 means.
        whitened: a 1x1 convolution brings each tap's patches to about equal deviations first.
        background: share of its own mean that is taken off a map.
        float16: prototypes are float16 numbers and stored as such.
        products: None where there is one, and the state has no axis for it.
    """

    def __init__(
        self,
        sets: Sequence[PrototypeSet],
        *,
        channels: dict[str, int],
        grids: dict[str, tuple[int, int]],
        metric: Metric = Metric.COSINE,
        pooled: bool = False,
        whitened: bool = False,
        background: float = 0.0,
        float16: bool = False,
        products: int | None = None,
    ) -> None:
        super().__init__()
        if not sets:
            raise DataError("a prototype head needs at least one set of prototypes")
        self.sets, self.metric, self.pooled, self.background = tuple(sets), metric, pooled, background
        self.grids = dict(grids)
        self.tap_names = tuple(dict.fromkeys(one.tap for one in sets))
        self.map_stride = STRIDES["s4"] if "s4" in self.tap_names else STRIDES["s8"]
        self.takes_product = products is not None
        abreast = () if products is None else (products,)
        for index, one in enumerate(sets):
            shapes = {
                "prototypes": (one.size, channels[one.tap]),
                "mass": (one.size,),
                "farthest": (1,),
                "typical": (1,),
            }
            for what, shape in shapes.items():
                self.register_buffer(f"{what}_{index}", torch.ones(*abreast, *shape))
            # Of all products and for every state the same: written out, 154 kB of 196 sites and cells.
            apart = distances(places(self.grids[one.tap]), places(one.cells))
            self.register_buffer(f"spatial_{index}", apart, persistent=False)
        self.state_names = tuple(f"{what}_{index}" for index in range(len(sets)) for what in STATE)
        self.product_state = self.state_names if self.takes_product else ()
        self.float16_state = tuple(n for n in self.state_names if n.startswith("prototypes")) if float16 else ()
        # Small directions of the whitened space would drown in the rounding of larger ones.
        self.float_ops = tuple(f"whiten_{name}" for name in self.tap_names) if whitened else ()
        self.whitened = whitened
        for name in self.tap_names:
            # What rebuilding needs; the graph has no use for it.
            self.register_buffer(f"grid_{name}", torch.tensor(self.grids[name]))
            if metric is Metric.SOFT:
                self.register_buffer(f"floor_{name}", torch.ones(1))
            if whitened:
                # skip_init: the global generator is not ours to advance.
                self.register_module(f"whiten_{name}", skip_init(nn.Conv2d, channels[name], channels[name], 1))

    def patches(self, name: str, tap: torch.Tensor) -> torch.Tensor:
        """Return what is whitened, float32 [N, C, h, w]."""
        # A mean would blur what the finest tap is for, as in trainer/methods/memory.
        return patch_mean(tap) if self.pooled and name != "s4" else tap

    def compared(self, name: str, tap: torch.Tensor) -> torch.Tensor:
        """Return patches float32 [N, C, h, w], whitened where they are."""
        patches = self.patches(name, tap)
        whitened: torch.Tensor = self.get_submodule(f"whiten_{name}")(patches) if self.whitened else patches
        return whitened

    def rows(self, name: str, tap: torch.Tensor) -> torch.Tensor:
        """Return what is compared, float32 [N, h w, C] of a tap [N, C, h, w]; see :class:`Metric`."""
        rows = self.compared(name, tap).flatten(2).transpose(1, 2)
        if self.metric is Metric.SOFT:
            return rows / ((rows * rows).sum(2, keepdim=True) + self.get_buffer(f"floor_{name}").square()).sqrt()
        return unit_rows(rows) if self.metric is Metric.COSINE else rows

    def spatial(self, index: int) -> torch.Tensor:
        """Return the distances of a set's cells from the sites of its tap, float32 [L, cells]."""
        return self.get_buffer(f"spatial_{index}")

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the map float32 [N, H / stride, W / stride] of taps, and of the products where it takes them."""
        taps = inputs[:-1] if self.takes_product else inputs
        product = inputs[-1] if self.takes_product else None
        rows = {name: self.rows(name, tap) for name, tap in zip(self.tap_names, taps, strict=True)}
        found = None
        for index, one in enumerate(self.sets):
            cost = self.nearest(index, rows[one.tap], product)
            typical = self._state("typical", index, product)
            grid = cost.unflatten(1, self.grids[one.tap])[:, None] * (one.weight / typical[..., None, None])
            level = enlarge(grid, STRIDES[one.tap] // self.map_stride)
            found = level if found is None else found + level
        assert found is not None
        return ((found - self.background * found.mean((1, 2, 3), keepdim=True))[:, 0],)

    def nearest(self, index: int, rows: torch.Tensor, product: torch.Tensor | None = None) -> torch.Tensor:
        """Return the cost of each row's nearest prototype, float32 [N, L] of rows [N, L, C]."""
        one = self.sets[index]
        prototypes = self._state("prototypes", index, product)
        feature = feature_costs(rows, prototypes, self.metric)
        farthest, mass = self._state("farthest", index, product), self._state("mass", index, product)
        scaled = feature * ((1.0 - one.alpha) / farthest[..., None])
        scaled = scaled + (mass <= 0).to(torch.float32)[..., None, :] * EMPTY
        # The nearest copy of each cell first: its place is the same.
        cost = scaled.unflatten(2, (one.copies, one.cells[0] * one.cells[1])).amin(2)
        if one.alpha:
            cost = cost + self.spatial(index) * (one.alpha / FARTHEST)
        least = cost.amin(2)
        return least if self.metric is Metric.COSINE else least.clamp_min(0.0).sqrt()

    def _state(self, what: str, index: int, product: torch.Tensor | None) -> torch.Tensor:
        state = self.get_buffer(f"{what}_{index}")
        return state if product is None else state.index_select(0, product)
