"""What a trunk and a head cost on this machine: export, quantise, and time them in turns on one thread.

Times are processor times of this process, so other work on the machine counts little; it must not know how the
modules were trained.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy.export import export_head, tap_shapes
from deploy.quantize import quantize_head
from deploy.trunks import build_trunk_files
from edge.bundle import Engine, Precision
from edge.errors import EngineError
from edge.inference.engines import available_engines, open_graph
from edge.inference.preprocessing import cut_tiles
from edge.inference.sessions import ANOMALY_MAP, IMAGE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import Preprocessing
    from edge.inference.engines import GraphSession
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.methods.base import Head

TURNS = 15
_TURN_SECONDS = 0.03
_RANGE_IMAGES = 32  # canvases of each kind that the head's int8 ranges are measured on, as packing does


@dataclass(frozen=True)
class Exported:
    """An int8 trunk and head, ready to be timed.

    Attributes:
        trunk: file.
        head: file.
        bytes: of both.
        preprocessing: of the input.
        taps: that the head takes.
    """

    trunk: Path
    head: Path
    bytes: int
    preprocessing: Preprocessing
    taps: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of processor time for one image, all its tiles, from prepared input to map: quartiles of turns."""

    median: float
    low: float
    high: float


def engine() -> Engine:
    """Return the engine that a box with this machine's packages would use.

    Raises:
        EngineError: none is installed.
    """
    engines = available_engines()
    if not engines:
        raise EngineError("no inference engine is installed; run: pip install 'lineward[deploy]'")
    return engines[0]


def export_int8(
    trunk: Trunk,
    head: Head,
    preprocessing: Preprocessing,
    *,
    canvases: npt.NDArray[np.uint8],
    generic: npt.NDArray[np.uint8],
    folder: Path,
) -> Exported:
    """Write the int8 files that a bundle would hold.

    Args:
        trunk: in eval mode on the CPU.
        head: in eval mode on the CPU.
        preprocessing: of the input.
        canvases: uint8 [n, canvas_height, canvas_width, 3], good and defective, to measure the head's ranges on.
        generic: the generic set that trunks are quantised on.
        folder: where the head goes; the trunk stays in the cache.
    """
    files = build_trunk_files(trunk, generic)
    folder.mkdir(parents=True, exist_ok=True)
    size = (preprocessing.height, preprocessing.width)
    export_head(head, folder / "head.onnx", tap_shapes=tap_shapes(trunk, size))
    session = _trunk_session(files.int8, head.tap_names, preprocessing)
    taps = []
    for canvas in canvases[: 2 * _RANGE_IMAGES]:
        found = session.run({IMAGE: np.ascontiguousarray(cut_tiles(canvas, preprocessing))})
        taps.append({name: np.array(found[name]) for name in head.tap_names})
    quantize_head(
        folder / "head.onnx",
        folder / "head.int8.onnx",
        taps,
        state_names=tuple(head.state_names),
        float_ops=tuple(getattr(head, "float_ops", ())),
    )
    total = files.int8.stat().st_size + (folder / "head.int8.onnx").stat().st_size
    return Exported(files.int8, folder / "head.int8.onnx", total, preprocessing, tuple(head.tap_names))


def measure(candidates: Sequence[Exported], *, turns: int = TURNS) -> list[Timing]:
    """Time candidates in turns, so that a slow moment of the machine falls on all alike.

    Args:
        candidates: what :func:`export_int8` gave.
        turns: of each, >= 1.
    """
    runners = [_Runner(candidate) for candidate in candidates]
    found: list[list[float]] = [[] for _ in runners]
    for turn in range(turns):
        order = range(len(runners)) if turn % 2 == 0 else reversed(range(len(runners)))
        for index in order:
            found[index].append(runners[index].turn())
    quartiles = [np.quantile(values, (0.5, 0.25, 0.75)) for values in found]
    return [Timing(*(round(float(value), 3) for value in three)) for three in quartiles]


class _Runner:
    def __init__(self, candidate: Exported) -> None:
        preprocessing = candidate.preprocessing
        self._trunk = _trunk_session(candidate.trunk, candidate.taps, preprocessing)
        rng = np.random.default_rng(0)
        shape = _input_shape(preprocessing)
        self._input = {IMAGE: rng.integers(0, 256, shape, dtype=np.uint8)}
        shapes = {name: value.shape for name, value in self._trunk.run(self._input).items()}
        self._head = open_graph(
            candidate.head,
            engine=engine(),
            precision=Precision.INT8,
            threads=1,
            outputs=[ANOMALY_MAP],
            input_shapes=shapes,
        )
        self.turn()  # caches, lazy buffers

    def turn(self) -> float:
        """Return milliseconds of processor time for one image."""
        count, end = 0, time.monotonic() + _TURN_SECONDS
        start = time.process_time()
        while count == 0 or time.monotonic() < end:
            self._head.run(self._trunk.run(self._input))
            count += 1
        return 1000.0 * (time.process_time() - start) / count


def _input_shape(preprocessing: Preprocessing) -> tuple[int, int, int, int]:
    tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
    return (tiles, preprocessing.height, preprocessing.width, 3)


def _trunk_session(path: Path, taps: Sequence[str], preprocessing: Preprocessing) -> GraphSession:
    return open_graph(
        path,
        engine=engine(),
        precision=Precision.INT8,
        threads=1,
        outputs=list(taps),
        input_shapes={IMAGE: _input_shape(preprocessing)},
    )
