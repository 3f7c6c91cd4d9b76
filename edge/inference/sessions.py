"""The compiled graphs of a bundle: a trunk that detectors share, a head for each state, sessions lent to threads.

It must not know frames, maps or golden scores.
"""

from __future__ import annotations

import functools
import queue
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge.bundle import Bundle, Engine, Graph, Precision
from edge.errors import EngineError
from edge.inference.engines import GraphSession, open_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    State = Mapping[str, npt.NDArray[Any]]

IMAGE = "image"
ANOMALY_MAP = "anomaly_map"
EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Runtime:
    """What graphs are compiled for: ``threads`` in all (0: the machine), shared by ``streams`` sessions."""

    engine: Engine
    precision: Precision
    threads: int
    streams: int


class Lanes:
    """One compiled graph with a session for each stream; a thread borrows one at a time."""

    def __init__(self, session: GraphSession, streams: int) -> None:
        self.graph_outputs = session.graph_outputs
        self._free: queue.SimpleQueue[GraphSession] = queue.SimpleQueue()
        self._free.put(session)
        for _ in range(streams - 1):
            self._free.put(session.clone())

    @contextmanager
    def borrow(self) -> Iterator[GraphSession]:
        """Lend a session to this thread; waits for one where all are lent."""
        session = self._free.get()
        try:
            yield session
        finally:
            self._free.put(session)


class Head:
    """A head with one state: sessions for the map, and sessions for the embedding once somebody asks for it."""

    def __init__(self, bundle: Bundle, runtime: Runtime, shapes: dict[str, tuple[int, ...]], state: State) -> None:
        self._open = functools.partial(
            open_graph,
            graph_file(bundle, bundle.manifest.head, runtime.precision),
            engine=runtime.engine,
            precision=runtime.precision,
            threads=runtime.threads,
            streams=runtime.streams,
            state=state,
            input_shapes=shapes,
        )
        self._streams = runtime.streams
        self._lock = threading.Lock()
        # Each graph is pruned to the output it is for: a map does not pay for writing the embedding.
        self._lanes = {ANOMALY_MAP: Lanes(self._open(outputs=[ANOMALY_MAP]), self._streams)}
        self.outputs = self._lanes[ANOMALY_MAP].graph_outputs

    def lanes(self, output: str) -> Lanes:
        """Return the sessions that compute one output.

        Raises:
            EngineError: the head has no such output.
        """
        # Whoever needs the map must not wait while somebody compiles the graph of the embedding.
        found = self._lanes.get(output)
        if found is not None:
            return found
        with self._lock:
            if output not in self._lanes:
                self._lanes[output] = Lanes(self._open(outputs=[output]), self._streams)
            return self._lanes[output]

    def has_lanes(self, output: str) -> bool:
        """Whether the graph of an output was compiled already."""
        return output in self._lanes


# Bundles of one trunk share its sessions for as long as a detector holds them.
_trunks: weakref.WeakValueDictionary[tuple[object, ...], Lanes] = weakref.WeakValueDictionary()
_trunks_lock = threading.Lock()


def shared_trunk(bundle: Bundle, runtime: Runtime) -> Lanes:
    """Return the trunk's sessions, compiled once in the process for all bundles that name it.

    Raises:
        EngineError: the engine cannot run it, or it lacks a tap.
    """
    manifest = bundle.manifest
    path = graph_file(bundle, manifest.trunk, runtime.precision)
    preprocessing = manifest.preprocessing
    tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
    shape = (tiles, preprocessing.height, preprocessing.width, 3)
    # By the hash of the file that is run: the manifest's trunk id is that of the float32 file alone.
    key = (manifest.files[path.relative_to(bundle.path).as_posix()], runtime, manifest.taps, shape)
    with _trunks_lock:
        lanes = _trunks.get(key)
        if lanes is None:
            session = open_graph(
                path,
                engine=runtime.engine,
                precision=runtime.precision,
                threads=runtime.threads,
                streams=runtime.streams,
                outputs=manifest.taps,
                input_shapes={IMAGE: shape},
            )
            lanes = _trunks[key] = Lanes(session, runtime.streams)
        return lanes


def graph_file(bundle: Bundle, graph: Graph, precision: Precision) -> Path:
    """Return the file of a graph for a precision.

    Raises:
        EngineError: there is no int8 file.
    """
    if precision is not Precision.INT8:
        return bundle.file(graph.float32)
    if graph.int8 is None:
        raise EngineError(f"{bundle.path}: has no int8 file beside {graph.float32}; choose float32 or export again")
    return bundle.file(graph.int8)
