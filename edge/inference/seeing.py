"""One frame's way through a slot of the trunk and a head, at once or in the background, seen as a look says.

It must not know who lends slots, nor when a head is replaced.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.errors import EngineError
from edge.frames import Frame, Prediction
from edge.inference.fitness import hide_lost, require_enough
from edge.inference.preprocessing import join_maps, tiles_of
from edge.inference.sessions import ANOMALY_MAP, IMAGE, PRODUCT, ROUTE, Head, Slot, Trunk

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.adaptation.look import Look, Taps
    from edge.adaptation.moments import Moments
    from edge.bundle import Manifest


@dataclass(frozen=True, slots=True)
class InForce:
    """A head, the version of the memory in it, and the products that its state has rows for, empty in a bundle of one.

    Read and replaced together, so that no map gets the other's.
    """

    head: Head
    memory_version: int
    products: tuple[str, ...] = ()


def with_product(taps: Taps, manifest: Manifest, in_force: InForce, product: int) -> Taps:
    """Return the inputs of a head: the taps, and which product each tile shows where the head takes that.

    Args:
        taps: float32 [T, C, h, w] by name.
        manifest: of the bundle.
        in_force: head that will judge.
        product: index into its products, the same for all tiles of a frame.

    Raises:
        EngineError: it has no such product. An engine may read beyond its state's end without a word.
    """
    if in_force.products and not 0 <= product < len(in_force.products):
        raise EngineError(f"product {product} of {len(in_force.products)}: the head has no such product")
    if not manifest.takes_product:
        return taps
    tiles = len(next(iter(taps.values())))
    return {**taps, PRODUCT: np.full(tiles, product, np.int64)}


class Seeing:
    """A frame in a slot: canvas, correction, trunk, correction, head. For one thread.

    Making it writes the slot's image; whoever made it runs the trunk and hands the taps to :meth:`judged`.

    Args:
        manifest: of the bundle.
        slot: lent until the end of :meth:`judged`.
        in_force: head that will judge.
        frame: of a camera.
        look: what to correct, and whether to measure.

    Raises:
        CaptureError: the frame does not fit the bundle, or shows too little to be judged.
    """

    def __init__(self, manifest: Manifest, slot: Slot, in_force: InForce, frame: Frame, look: Look) -> None:
        self.frame = frame
        self._manifest, self._slot, self._in_force, self._look = manifest, slot, in_force, look
        self._measured: list[Moments] = []
        started = time.monotonic_ns()
        tiles_of(frame.image, manifest.preprocessing, out=slot.image, scratch=slot.scratch)
        require_enough(manifest, frame, slot.image)
        if look.measure:
            self._measured.append(measure_canvas(slot.image))
        if look.correction is not None:
            look.correction.canvas(slot.image)
        self._ready_ns = time.monotonic_ns()
        self._preprocess_ns = self._ready_ns - started

    def judged(self, taps: Taps) -> Prediction:
        """Return what the head says of the trunk's taps, which are written to where they are corrected.

        Raises:
            EngineError: the engine gives up.
        """
        look = self._look
        if look.measure:
            self._measured.append(measure_taps(taps))
        if look.correction is not None:
            # In the trunk's own buffers: they stay bound as the head's inputs, and the next frame is written over them.
            taps = look.correction.taps(taps, in_place=True)
        inputs = with_product(taps, self._manifest, self._in_force, look.expert)
        found = self._in_force.head.session(ANOMALY_MAP, self._slot.index).run(inputs)
        maps, manifest = found[ANOMALY_MAP], self._manifest
        # One tile is its own map, and the request's buffers are used again by the next frame.
        joined_map = (
            np.array(maps[0]) if len(maps) == 1 else join_maps(maps, manifest.preprocessing, manifest.map_stride)
        )
        hide_lost(manifest, self.frame, joined_map)
        # The tiles of a frame show one product.
        route = np.asarray(found[ROUTE].mean(axis=0), np.float32) if ROUTE in found else None
        return Prediction(
            anomaly_map=joined_map,
            frame=self.frame,
            preprocess_ns=self._preprocess_ns,
            inference_ns=time.monotonic_ns() - self._ready_ns,
            memory_version=self._in_force.memory_version,
            moments_version=look.version,
            moments=joined(self._measured) if look.measure else None,
            route=route,
            subclass=self._subclass(route),
        )

    def _subclass(self, route: npt.NDArray[np.float32] | None) -> str:
        """The product that the frame is seen as; where sub-classes are no products, the one that the head takes."""
        if self._in_force.products:
            return self._in_force.products[self._look.expert]
        return _subclass(self._manifest.subclasses, route)


class PendingPrediction:
    """A frame whose trunk runs in the background; made by ``Detector.begin``. For one thread.

    :meth:`result` must be called, once: until then it holds a request that others wait for.
    """

    def __init__(self, trunk: Trunk, slot: Slot, seeing: Seeing) -> None:
        self.frame = seeing.frame
        self._trunk, self._slot, self._seeing = trunk, slot, seeing
        slot.session.start({IMAGE: slot.image})

    def result(self) -> Prediction:
        """Wait for the trunk, run the head and return what ``Detector.predict`` does.

        Raises:
            EngineError: the engine gives up.
        """
        try:
            return self._seeing.judged(self._slot.session.finish())
        finally:
            self._trunk.give_back(self._slot)


def _subclass(names: tuple[str, ...], route: npt.NDArray[np.float32] | None) -> str:
    """The sub-class whose expert a head chose: it takes the nearest."""
    if route is None or len(route) != len(names):
        return names[0] if len(names) == 1 else ""
    return names[int(np.argmax(route))]
