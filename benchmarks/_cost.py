"""What a detector costs on a box: milliseconds of its exported graphs on one thread, and bytes of its head.

It must not know methods or accuracy.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.export import export_head, tap_shapes
from deploy.quantize import quantize_head
from deploy.trunks import build_trunk_files
from edge.bundle import Engine, Precision
from edge.inference.engines import open_graph
from edge.inference.sessions import ANOMALY_MAP, IMAGE
from trainer.data.generic import generic_canvases

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from torch import nn

    from edge.inference.engines import GraphSession
    from trainer.methods.base import Head

_TURNS, _CALLS = 7, 20


@dataclass(frozen=True)
class Cost:
    """Of one detector.

    Attributes:
        ms: trunk and head in int8, OpenVINO, one thread, one image: the fastest turn's mean.
        float32_ms: the same in float32.
        bytes: of the head in int8, its state in float32 included.
        float32_bytes: of the head in float32.
    """

    ms: float
    float32_ms: float
    bytes: int
    float32_bytes: int


def measure_cost(trunk: nn.Module, head: Head, canvases: npt.NDArray[np.uint8]) -> Cost:
    """Export, quantise and time a detector.

    Args:
        trunk: the trunk, in eval mode on the CPU.
        head: the head, in eval mode on the CPU.
        canvases: uint8 [n, H, W, 3] RGB; ranges of the int8 head are measured on them.
    """
    files = build_trunk_files(trunk, generic_canvases())
    with tempfile.TemporaryDirectory() as folder:
        float32, int8 = Path(folder) / "head.onnx", Path(folder) / "head.int8.onnx"
        export_head(head, float32, tap_shapes=tap_shapes(trunk, canvases.shape[1:3]))
        source = _open(files.int8, Precision.INT8, head.tap_names, {IMAGE: (1, *canvases.shape[1:])})
        taps = [{name: np.array(tap) for name, tap in source.run({IMAGE: one[None]}).items()} for one in canvases]
        quantize_head(
            float32, int8, taps, state_names=head.state_names, float_ops=tuple(getattr(head, "float_ops", ()))
        )
        shapes = {name: taps[0][name].shape for name in head.tap_names}
        found = {}
        for precision, trunk_file, head_file in (
            (Precision.INT8, files.int8, int8),
            (Precision.FLOAT32, files.float32, float32),
        ):
            first = _open(trunk_file, precision, head.tap_names, {IMAGE: (1, *canvases.shape[1:])})
            second = _open(head_file, precision, [ANOMALY_MAP], shapes)
            image = {IMAGE: canvases[:1].copy()}
            found[precision] = _fastest(lambda first=first, second=second, image=image: second.run(first.run(image)))
        return Cost(found[Precision.INT8], found[Precision.FLOAT32], int8.stat().st_size, float32.stat().st_size)


def _open(path: Path, precision: Precision, outputs: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> GraphSession:
    return open_graph(
        path, engine=Engine.OPENVINO, precision=precision, threads=1, outputs=outputs, input_shapes=shapes
    )


def _fastest(step: Callable[[], object]) -> float:
    turns = []
    for _ in range(_TURNS):
        started = time.perf_counter()
        for _ in range(_CALLS):
            step()
        turns.append((time.perf_counter() - started) / _CALLS * 1e3)
    return min(turns[1:])
