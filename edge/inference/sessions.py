"""The compiled graphs of a bundle: a trunk that detectors share, a head for each state, requests lent to threads.

It must not know frames, maps or golden scores.
"""

from __future__ import annotations

import functools
import queue
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.bundle import Bundle, Engine, Graph, Precision
from edge.errors import EngineError
from edge.inference.engines import Accelerator, GraphSession, open_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    State = Mapping[str, npt.NDArray[Any]]

IMAGE = "image"
ANOMALY_MAP = "anomaly_map"
EMBEDDING = "embedding"
ROUTE = "route"
"""How near an image is to each sub-class with an expert, float32 [N, E]; below 0 everywhere: to none of them."""
PRODUCT = "product"
"""Input of a head with a state per product: which one each tile shows, int64 [N], an index into the products."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What graphs are compiled for: ``threads`` in all (0: the machine), shared by ``streams`` sessions."""

    engine: Engine
    precision: Precision
    threads: int
    streams: int
    accelerator: Accelerator = field(default_factory=Accelerator)


@dataclass(slots=True)
class Slot:
    """One request of a trunk and what belongs to it: whoever holds it may use request ``index`` of every head too.

    Attributes:
        index: of the request, 0, 1, ...
        session: of the trunk.
        image: uint8 [tiles, height, width, 3], or as the modality says: the trunk's input, written in place.
        ahead: whether it is for frames that are begun while their camera still has another one in hand.
        scratch: buffers of the preprocessing, by shape.
    """

    index: int
    session: GraphSession
    image: npt.NDArray[Any]
    ahead: bool = False
    scratch: dict[tuple[int, ...], npt.NDArray[np.uint8]] = field(default_factory=dict)


class Trunk:
    """A compiled trunk and its requests: for each stream one that runs, and one that is begun ahead.

    They are lent apart: a camera that stores an alert while its next frame is begun keeps nobody else from the engine.
    """

    def __init__(
        self, session: GraphSession, shape: tuple[int, ...], streams: int, dtype: npt.DTypeLike = np.uint8
    ) -> None:
        self.requests = 2 * streams
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._free_ahead: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for index in range(self.requests):
            slot = Slot(index, session.clone() if index else session, np.zeros(shape, dtype), index >= streams)
            (self._free_ahead if slot.ahead else self._free).put(slot)

    def take_ahead(self) -> Slot | None:
        """Lend a slot for a frame that is begun ahead; None where all are lent. :meth:`give_back` ends the loan."""
        try:
            return self._free_ahead.get_nowait()
        except queue.Empty:
            return None

    def give_back(self, slot: Slot) -> None:
        """End a loan of :meth:`take_ahead`."""
        self._free_ahead.put(slot)

    @contextmanager
    def borrow(self) -> Iterator[Slot]:
        """Lend a slot for as long as the block lasts; waits for one where all are lent."""
        slot = self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)


class Head:
    """A head with one state: requests for the map, and requests for the embedding once somebody asks for it.

    Where the graph has a route, it is computed with the map, which needs it anyway.

    Args:
        bundle: whose head it is.
        runtime: what to compile for.
        shapes: of the inputs, by name: the taps, and the product where the head takes one.
        state: tensors by name; of those in ``product_state`` a row per product, at least those of the bundle.
        requests: of the trunk; the head has as many.
    """

    def __init__(
        self, bundle: Bundle, runtime: Runtime, shapes: dict[str, tuple[int, ...]], state: State, requests: int
    ) -> None:
        self._open = functools.partial(
            open_graph,
            graph_file(bundle, bundle.manifest.head, runtime.precision),
            engine=runtime.engine,
            precision=runtime.precision,
            threads=runtime.threads,
            streams=runtime.streams,
            state=state,
            more_rows=bundle.manifest.product_state,
            input_shapes=shapes,
            accelerator=runtime.accelerator,
        )
        self._requests = requests
        self._lock = threading.Lock()
        # Each graph is pruned to the outputs it is for: a map does not pay for writing the embedding.
        self._sessions = {ANOMALY_MAP: self._compile(ANOMALY_MAP)}
        self.outputs = self._sessions[ANOMALY_MAP][0].graph_outputs

    def session(self, output: str, index: int) -> GraphSession:
        """Return the request that computes one output for the holder of the trunk's slot ``index``.

        Always the same for one slot, so that the trunk's buffers stay bound as its inputs.

        Raises:
            EngineError: the head has no such output.
        """
        # Whoever needs the map must not wait while somebody compiles the graph of the embedding.
        found = self._sessions.get(output)
        if found is None:
            with self._lock:
                if output not in self._sessions:
                    self._sessions[output] = self._compile(output)
                found = self._sessions[output]
        return found[index]

    def has(self, output: str) -> bool:
        """Whether the graph of an output was compiled already."""
        return output in self._sessions

    def _compile(self, output: str) -> list[GraphSession]:
        session = self._open(outputs=[output], optional=[ROUTE] if output == ANOMALY_MAP else [])
        return [session, *(session.clone() for _ in range(self._requests - 1))]


# Bundles of one trunk share its requests for as long as a detector holds them.
_trunks: weakref.WeakValueDictionary[tuple[object, ...], Trunk] = weakref.WeakValueDictionary()
_trunks_lock = threading.Lock()


def shared_trunk(bundle: Bundle, runtime: Runtime) -> Trunk:
    """Return the trunk's requests, compiled once in the process for all bundles that name it.

    Raises:
        EngineError: the engine cannot run it, or it lacks a tap.
    """
    manifest = bundle.manifest
    path = graph_file(bundle, manifest.trunk, runtime.precision)
    preprocessing = manifest.preprocessing
    shape = (preprocessing.tiles.rows * preprocessing.tiles.cols, *preprocessing.tile_shape)
    # By the hash of the file that is run: the manifest's trunk id is that of the float32 file alone.
    key = (manifest.files[path.relative_to(bundle.path).as_posix()], runtime, manifest.taps, shape)
    with _trunks_lock:
        trunk = _trunks.get(key)
        if trunk is None:
            session = open_graph(
                path,
                engine=runtime.engine,
                precision=runtime.precision,
                threads=runtime.threads,
                streams=runtime.streams,
                outputs=manifest.taps,
                input_shapes={IMAGE: shape},
                accelerator=runtime.accelerator,
            )
            trunk = _trunks[key] = Trunk(session, shape, runtime.streams, preprocessing.dtype)
        return trunk


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
