"""The prototype head: cost from each patch to its nearest prototype, in features and in place.

A pure module; the transport that made the prototypes is not in it. Source: PRADOT (prototypes by optimal transport);
what differs is in the README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edge.errors import DataError
from trainer.methods.base import Head
from trainer.methods.patches import enlarge

if TYPE_CHECKING:
    from collections.abc import Sequence

MAP_STRIDE = 8
STRIDES = {"s8": 8, "s16": 16}
FARTHEST = 2.0**0.5
"""Largest distance between two places of the unit square: what spatial costs are divided by."""
_TINY = 1e-12


def places(grid: tuple[int, int]) -> torch.Tensor:
    """Return the middle of each cell in the unit square, float32 [h w, 2] as (y, x), row by row."""
    axes = [(torch.arange(side) + 0.5) / side for side in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), 2).flatten(0, 1)


def unit_rows(tap: torch.Tensor) -> torch.Tensor:
    """Return patches of unit length float32 [N, h w, C] of a tap [N, C, h, w]; one of no length stays 0."""
    rows = tap.flatten(2).transpose(1, 2)
    return rows / rows.norm(dim=2, keepdim=True).clamp_min(_TINY)


def costs(
    rows: torch.Tensor, prototypes: torch.Tensor, spatial: torch.Tensor, *, alpha: float, farthest: float
) -> torch.Tensor:
    """Return the costs float32 [..., L, K] that prototypes were trained with and are judged by.

    (1 - alpha) (1 - cos) / farthest + alpha distance / sqrt(2).

    Args:
        rows: [..., L, C] of unit length.
        prototypes: [K, C] of unit length.
        spatial: distances [L, K] in the unit square.
        alpha: share of the place, 0..1.
        farthest: largest 1 - cos of training patches, frozen: a maximum taken from the image itself would let a defect
            lower the scores of everything beside it.
    """
    feature = 1.0 - rows @ prototypes.transpose(-1, -2)
    return feature * ((1.0 - alpha) / farthest) + spatial * (alpha / FARTHEST)


class PrototypeHead(Head):
    """Cost of each patch to its nearest prototype, summed over sets of prototypes, on the stride-8 grid.

    State, per set i: ``prototypes_i`` float32 [K, C] of unit length, ``where_i`` [K, 2] in the unit square,
    ``mass_i`` [K] (patches that stand behind each, for merging; not judged by), ``farthest_i`` [1].

    Args:
        sets: (tap, share of the place, number of prototypes) of each set.
        channels: of each tap.
        grids: (h, w) of each tap.
        weights: of the sets in the map.
    """

    map_stride = MAP_STRIDE

    def __init__(
        self,
        sets: Sequence[tuple[str, float, int]],
        *,
        channels: dict[str, int],
        grids: dict[str, tuple[int, int]],
        weights: Sequence[float],
    ) -> None:
        super().__init__()
        if not sets or len(sets) != len(weights):
            raise DataError(f"{len(sets)} sets of prototypes and {len(weights)} weights; give one weight for each set")
        self.sets, self.weights, self.grids = tuple(sets), tuple(weights), dict(grids)
        self.tap_names = tuple(dict.fromkeys(tap for tap, _, _ in sets))
        names = []
        for index, (tap, _, count) in enumerate(sets):
            shapes = {"prototypes": (count, channels[tap]), "where": (count, 2), "mass": (count,), "farthest": (1,)}
            for what, shape in shapes.items():
                self.register_buffer(f"{what}_{index}", torch.zeros(shape))
                names.append(f"{what}_{index}")
        self.state_names = tuple(name for name in names if not name.startswith("mass"))
        for tap, grid in self.grids.items():
            self.register_buffer(f"places_{tap}", places(grid), persistent=False)
            # What rebuilding needs; the graph has no use for it.
            self.register_buffer(f"grid_{tap}", torch.tensor(grid))

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the map."""
        rows = {name: unit_rows(tap) for name, tap in zip(self.tap_names, taps, strict=True)}
        found = torch.zeros(())
        for index, ((tap, alpha, _), weight) in enumerate(zip(self.sets, self.weights, strict=True)):
            found = found + weight * self._map(index, tap, alpha, rows[tap])
        return (found,)

    def _map(self, index: int, tap: str, alpha: float, rows: torch.Tensor) -> torch.Tensor:
        prototypes, where, farthest = (self.get_buffer(f"{w}_{index}") for w in ("prototypes", "where", "farthest"))
        apart = self.get_buffer(f"places_{tap}")[:, None] - where
        spatial = apart.square().sum(2).sqrt()
        cost = costs(rows, prototypes, spatial, alpha=alpha, farthest=farthest)
        grid = cost.amin(2).unflatten(1, self.grids[tap])[:, None]
        return enlarge(grid, STRIDES[tap] // MAP_STRIDE)[:, 0]
