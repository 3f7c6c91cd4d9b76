"""A box whose engine hangs in its twentieth call, or takes long in it, where that is the first of a new graph or not.

``hanging_box.py CONFIG hang`` or ``hanging_box.py CONFIG (first|later) SECONDS``
"""

from __future__ import annotations

import itertools
import sys
import threading
from pathlib import Path
from typing import Any

from edge.box import Box
from edge.inference.onnxruntime_session import OnnxRuntimeSession
from edge.settings import load_settings

AT = 20


def main(config: str, kind: str, seconds: str = "0") -> None:
    real = OnnxRuntimeSession.run
    compute = OnnxRuntimeSession._run
    numbers = itertools.count(1)
    turn, forever = threading.local(), threading.Event()

    def run(self: OnnxRuntimeSession, inputs: Any) -> Any:
        turn.now = next(numbers) == AT
        if turn.now and kind == "first":
            # As a graph that was just compiled: its engine goes on compiling.
            self._warm.clear()
        return real(self, inputs)

    def computed(self: OnnxRuntimeSession, inputs: Any) -> Any:
        if turn.now:
            forever.wait(None if kind == "hang" else float(seconds))
        return compute(self, inputs)

    OnnxRuntimeSession.run = run  # type: ignore[method-assign] (the fault)
    OnnxRuntimeSession._run = computed  # type: ignore[method-assign] (the fault)
    Box(load_settings(Path(config))).run(drain_s=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
