"""One small interface over ONNX Runtime and OpenVINO: open a graph, run it.

Engines are imported when first used, so a box needs only one of them. This module must not know what a bundle is.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from edge.bundle import Engine, Precision
from edge.errors import EngineError, MissingExtraError
from edge.inference import openvino_session
from edge.inference.onnx_file import with_initialisers
from edge.inference.onnxruntime_session import Accelerator, OnnxRuntimeSession, Provider
from edge.inference.openvino_session import OpenVinoSession
from edge.inference.session import GraphSession

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from edge.inference.session import Arrays

__all__ = ["Accelerator", "GraphSession", "Provider", "available_engines", "open_graph", "supports"]

_EXTRA = {Engine.ONNXRUNTIME: "box-cpu", Engine.OPENVINO: "box-openvino"}


def available_engines() -> tuple[Engine, ...]:
    """Return the engines that are installed, the preferred one first, without importing them."""
    return tuple(engine for engine in (Engine.OPENVINO, Engine.ONNXRUNTIME) if importlib.util.find_spec(engine.value))


def supports(engine: Engine, precision: Precision) -> bool:
    """Whether an installed engine runs a precision natively on this machine's processor."""
    if engine not in available_engines():
        return False
    if precision is Precision.BFLOAT16:
        return engine is Engine.OPENVINO and "BF16" in openvino_session.core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        )
    return True


def open_graph(
    path: Path,
    *,
    engine: Engine,
    precision: Precision,
    threads: int,
    outputs: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    state: Arrays | None = None,
    more_rows: Collection[str] = (),
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    streams: int = 1,
    accelerator: Accelerator | None = None,
) -> GraphSession:
    """Open an ONNX file.

    Args:
        path: the file; the float32 one for ``float32`` and ``bfloat16``, the quantised one for ``int8``.
        engine: who runs it.
        precision: numerics; the non-quantised rest of an int8 graph runs in float32.
        threads: of the whole session, shared by its streams; 0 lets the engine take the machine.
        outputs: names wanted; what only the others need is not computed. None means all.
        optional: names wanted beside those where the graph has them.
        state: float32 values by name of initialiser, of the graph's shapes.
        more_rows: names among them whose first axis may be longer than in the graph.
        input_shapes: shapes that the session is compiled for, by input name; other shapes are refused afterwards.
        streams: how many clones may run at the same time without waiting for each other, >= 1.
        accelerator: of ONNX Runtime; the processor where None.

    Raises:
        MissingExtraError: the engine is not installed.
        EngineError: the file is no graph, lacks an output or state tensor, has other shapes, or the machine lacks
            the precision or the accelerator.
    """
    if engine not in available_engines():
        raise MissingExtraError(f"{engine.value} is not installed; run: pip install 'lineward[{_EXTRA[engine]}]'")
    if not supports(engine, precision):
        raise EngineError(
            f"{engine.value} does not run {precision.value} on this machine; choose float32 or int8, which every "
            "engine and processor runs"
        )
    try:
        model = path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); fetch the bundle again") from error
    try:
        model = with_initialisers(model, state or {}, more_rows=more_rows)
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from error
    common: dict[str, Any] = {
        "label": str(path),
        "model": model,
        "precision": precision,
        "threads": threads,
        "streams": streams,
        "outputs": outputs,
        "optional": optional,
        "input_shapes": dict(input_shapes or {}),
    }
    if engine is Engine.OPENVINO:
        if accelerator is not None and accelerator.provider is not Provider.CPU:
            raise EngineError(f"{path}: {accelerator.provider.value} belongs to ONNX Runtime; set engine: onnxruntime")
        return OpenVinoSession.open(**common)
    return OnnxRuntimeSession.open(**common, accelerator=accelerator or Accelerator())
