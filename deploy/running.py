"""Run a trunk and a head that are not in a bundle yet, as the box will: one canvas at a time.

It must not know what the results are compared with.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from edge.inference.engines import open_graph
from edge.inference.preprocessing import cut_tiles, join_maps
from edge.inference.sessions import ANOMALY_MAP, EMBEDDING, IMAGE
from edge.judgement.score import pool_score

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt
    from torch import nn

    from edge.bundle import Engine, Pooling, Precision, Preprocessing

    Canvases = npt.NDArray[np.uint8]
    Maps = npt.NDArray[np.float32]


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
    """

    def __init__(
        self,
        trunk: Path,
        head: Path,
        *,
        engine: Engine,
        precision: Precision,
        taps: Sequence[str],
        preprocessing: Preprocessing,
        map_stride: int,
    ) -> None:
        self._preprocessing, self._stride, self._taps = preprocessing, map_stride, tuple(taps)
        tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
        shape = (tiles, preprocessing.height, preprocessing.width, 3)
        self._trunk = open_graph(
            trunk, engine=engine, precision=precision, threads=0, outputs=self._taps, input_shapes={IMAGE: shape}
        )
        first = self._trunk.run({IMAGE: np.zeros(shape, np.uint8)})
        shapes = {name: tuple(first[name].shape) for name in self._taps}
        self._head = open_graph(head, engine=engine, precision=precision, threads=0, input_shapes=shapes)

    @property
    def has_embedding(self) -> bool:
        """Whether the head gives patch rows."""
        return EMBEDDING in self._head.output_names

    def taps(self, canvas: Canvases) -> dict[str, npt.NDArray[np.float32]]:
        """Return copies of the taps of one canvas's tiles."""
        taps = self._trunk.run({IMAGE: cut_tiles(canvas, self._preprocessing)})
        return {name: np.array(taps[name], dtype=np.float32) for name in self._taps}

    def maps(self, canvases: Canvases) -> Maps:
        """Return float32 [n, h, w], one joined map per canvas."""
        return np.stack([join_maps(self._run(one, ANOMALY_MAP), self._preprocessing, self._stride) for one in canvases])

    def embeddings(self, canvases: Canvases) -> npt.NDArray[np.float16]:
        """Return float16 [n, tiles, L, D]."""
        return np.stack([self._run(one, EMBEDDING).astype(np.float16) for one in canvases])

    def _run(self, canvas: Canvases, output: str) -> Maps:
        taps = self._trunk.run({IMAGE: cut_tiles(canvas, self._preprocessing)})
        return np.array(self._head.run(taps)[output], dtype=np.float32)


def torch_maps(
    trunk: nn.Module, head: nn.Module, canvases: Canvases, preprocessing: Preprocessing, *, batch: int = 8
) -> Maps:
    """Return the maps float32 [n, h, w] that the modules give in torch, float32."""
    import torch  # noqa: PLC0415 (a machine that only verifies bundles has no torch)

    tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
    maps = []
    # The same sums in another memory layout: about twice as fast on a CPU.
    trunk = copy.deepcopy(trunk).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for start in range(0, len(canvases), batch):
            cut = np.concatenate([cut_tiles(one, preprocessing) for one in canvases[start : start + batch]])
            taps = dict(zip(trunk.tap_names, trunk(torch.from_numpy(np.ascontiguousarray(cut))), strict=True))
            result = head(*(taps[name] for name in head.tap_names))[0].numpy()
            maps += [
                join_maps(result[i : i + tiles], preprocessing, head.map_stride) for i in range(0, len(result), tiles)
            ]
    return np.stack(maps).astype(np.float32)


def pool_all(maps: npt.NDArray[np.floating], pooling: Pooling) -> npt.NDArray[np.float32]:
    """Pool float [n, h, w] to raw scores float32 [n]."""
    return np.array([pool_score(one, pooling) for one in maps], dtype=np.float32)
