"""Run a trunk and a head that are not in a bundle yet, as the box will: one canvas at a time.

It must not know what the results are compared with.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.inference.engines import open_graph
from edge.inference.preprocessing import cut_tiles, join_maps
from edge.inference.sessions import ANOMALY_MAP, EMBEDDING, IMAGE, PRODUCT, ROUTE
from edge.judgement.score import pool_score

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt
    from torch import nn

    from edge.adaptation.moments import Moments
    from edge.bundle import Engine, Inputs, Pooling, Precision

    Canvases = npt.NDArray[Any]
    Products = npt.NDArray[np.int64] | None
    Maps = npt.NDArray[np.float32]


ROUTE_AXES = 2
"""Of a route, which is the last output of a head that has one; maps and rows have three."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a trunk and a head said of some canvases.

    Attributes:
        maps: float32 [n, h, w], one joined map per canvas.
        routes: float32 [n, E], see :data:`edge.inference.sessions.ROUTE`, the mean of a canvas's tiles; None where the
            head has no router.
    """

    maps: Maps
    routes: Maps | None = None


class GraphPair:
    """A trunk file and a head file on one engine and precision.

    Args:
        trunk: the trunk's file of that precision.
        head: the head's file of that precision.
        engine: who runs them.
        precision: numerics.
        taps: names of the taps that the head takes.
        preprocessing: how canvases are cut.
        map_stride: canvas pixels per map cell.
        takes_product: whether the head has the input ``product``.
    """

    def __init__(
        self,
        trunk: Path,
        head: Path,
        *,
        engine: Engine,
        precision: Precision,
        taps: Sequence[str],
        preprocessing: Inputs,
        map_stride: int,
        takes_product: bool = False,
    ) -> None:
        self._preprocessing, self._stride, self._taps = preprocessing, map_stride, tuple(taps)
        self._tiles = tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
        self._takes_product = takes_product
        shape = (tiles, *preprocessing.tile_shape)
        self._trunk = open_graph(
            trunk, engine=engine, precision=precision, threads=0, outputs=self._taps, input_shapes={IMAGE: shape}
        )
        first = self._trunk.run({IMAGE: np.zeros(shape, preprocessing.dtype)})
        shapes: dict[str, tuple[int, ...]] = {name: tuple(first[name].shape) for name in self._taps}
        if takes_product:
            shapes[PRODUCT] = (tiles,)
        # As a box compiles it, without the embedding: in bfloat16 what else is written changes how sums are rounded.
        self._open = partial(open_graph, head, engine=engine, precision=precision, threads=0, input_shapes=shapes)
        self._head = self._open(outputs=[ANOMALY_MAP], optional=[ROUTE])

    @property
    def has_embedding(self) -> bool:
        """Whether the head gives patch rows."""
        return EMBEDDING in self._head.graph_outputs

    def taps(self, canvas: Canvases) -> dict[str, npt.NDArray[np.float32]]:
        """Return copies of the taps of one canvas's tiles."""
        taps = self._trunk.run({IMAGE: cut_tiles(canvas, self._preprocessing)})
        return {name: np.array(taps[name], dtype=np.float32) for name in self._taps}

    def inputs(self, canvas: Canvases, product: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Return what the head is given for one canvas: its tiles' taps, and the product where it takes that."""
        taps: dict[str, npt.NDArray[Any]] = dict(self._trunk.run({IMAGE: cut_tiles(canvas, self._preprocessing)}))
        return taps | self._product(product)

    def kept_inputs(self, canvas: Canvases, product: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Return :meth:`inputs` as copies, to be kept while others are seen."""
        return self.taps(canvas) | self._product(product)

    def _product(self, product: int) -> dict[str, npt.NDArray[Any]]:
        return {PRODUCT: np.full(self._tiles, product, np.int64)} if self._takes_product else {}

    def moments(self, canvas: Canvases) -> Moments:
        """Return the moments of one canvas and its taps, as a box measures them."""
        tiles = cut_tiles(canvas, self._preprocessing)
        return joined((measure_canvas(tiles), measure_taps(self.taps(canvas))))

    def maps(self, canvases: Canvases, products: Products = None) -> Maps:
        """Return float32 [n, h, w], one joined map per canvas."""
        return self.judged(canvases, products).maps

    def judged(self, canvases: Canvases, products: Products = None) -> Judged:
        """Return maps and routes of canvases.

        Args:
            canvases: as the preprocessing gives them.
            products: int64 [n], which product each is judged as; the first where there are none.
        """
        maps, routes = [], []
        for index, canvas in enumerate(canvases):
            result = self._head.run(self.inputs(canvas, 0 if products is None else int(products[index])))
            # Copies: the engine's buffers are used again by the next canvas.
            maps.append(join_maps(np.array(result[ANOMALY_MAP], np.float32), self._preprocessing, self._stride))
            if ROUTE in result:
                routes.append(np.array(result[ROUTE], np.float32).mean(0))
        return Judged(np.stack(maps), np.stack(routes) if routes else None)

    def embeddings(self, canvases: Canvases, products: Products = None) -> npt.NDArray[np.float16]:
        """Return float16 [n, tiles, L, D]; ``products`` as for :meth:`judged`."""
        shown = [0] * len(canvases) if products is None else products.tolist()
        head = self._open(outputs=[EMBEDDING])
        found = [
            np.asarray(head.run(self.inputs(canvas, product))[EMBEDDING], np.float32).astype(np.float16)
            for canvas, product in zip(canvases, shown, strict=True)
        ]
        return np.stack(found)


def torch_maps(trunk: nn.Module, head: nn.Module, canvases: Canvases, preprocessing: Inputs, *, batch: int = 8) -> Maps:
    """Return the maps float32 [n, h, w] that the modules give in torch, float32."""
    return torch_judged(trunk, head, canvases, preprocessing, batch=batch).maps


def torch_judged(
    trunk: nn.Module,
    head: nn.Module,
    canvases: Canvases,
    preprocessing: Inputs,
    *,
    products: Products = None,
    batch: int = 8,
) -> Judged:
    """Return what the modules say of canvases in torch, float32, each as the product of its number in ``products``."""
    import torch  # noqa: PLC0415 (a machine that only verifies bundles has no torch)

    tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
    maps, routes = [], []
    # The same sums in another memory layout: about twice as fast on a CPU.
    trunk = copy.deepcopy(trunk).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for start in range(0, len(canvases), batch):
            cut = np.concatenate([cut_tiles(one, preprocessing) for one in canvases[start : start + batch]])
            taps = dict(zip(trunk.tap_names, trunk(torch.from_numpy(np.ascontiguousarray(cut))), strict=True))
            inputs = [taps[name] for name in head.tap_names]
            if getattr(head, "takes_product", False):
                shown = np.zeros(len(canvases), np.int64) if products is None else products
                inputs.append(torch.from_numpy(np.repeat(shown[start : start + batch], tiles)))
            outputs = head(*inputs)
            result = outputs[0].numpy()
            maps += [
                join_maps(result[i : i + tiles], preprocessing, head.map_stride) for i in range(0, len(result), tiles)
            ]
            if outputs[-1].ndim == ROUTE_AXES:
                routes.append(outputs[-1].unflatten(0, (-1, tiles)).mean(1).numpy())
    return Judged(np.stack(maps).astype(np.float32), np.concatenate(routes) if routes else None)


def pool_all(maps: npt.NDArray[np.floating], pooling: Pooling) -> npt.NDArray[np.float32]:
    """Pool float [n, h, w] to raw scores float32 [n]."""
    return np.array([pool_score(one, pooling) for one in maps], dtype=np.float32)
