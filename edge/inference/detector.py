"""Detector: a verified bundle, an engine and a precision; Frame in, Prediction out.

It proves itself on the bundle's golden frames before it judges anything. It must not know thresholds or events.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.look import PLAIN, Look
from edge.bundle import Bundle, Engine, Precision, load_arrays
from edge.errors import BundleError, EngineError
from edge.inference.choice import attempts, choose, key, tolerance
from edge.inference.engines import Accelerator, Provider
from edge.inference.preprocessing import cut_tiles, join_maps
from edge.inference.seeing import InForce, PendingPrediction, Seeing, with_product
from edge.inference.sessions import ANOMALY_MAP, EMBEDDING, IMAGE, PRODUCT, ROUTE, Head, Runtime, shared_trunk
from edge.inference.state import check_state, stored_state
from edge.judgement.score import pool_score
from edge.products.product_file import MoreProducts, with_products

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    import numpy.typing as npt

    from edge.adaptation.look import Taps
    from edge.frames import Frame, Prediction
    from edge.inference.sessions import State
    from edge.products.product_file import ProductFile

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DetectorStatus:
    """What a detector runs on, and why.

    Attributes:
        engine: in use.
        precision: in use.
        requested_engine: asked for, or picked first.
        requested_precision: asked for, or picked first.
        fallback_reason: empty, or why something else is in use than was requested.
        golden_max_error: largest absolute difference of a golden score from what the bundle promises.
        accelerator: what computes: cpu, cuda, tensorrt or tensorrt float16.
    """

    engine: Engine
    precision: Precision
    requested_engine: Engine
    requested_precision: Precision
    fallback_reason: str
    golden_max_error: float
    accelerator: str = Provider.CPU.value


class Detector:
    """Frames of a bundle's products in, raw anomaly maps out. Safe to call from several threads.

    Made by :meth:`open`. As many calls run side by side as it was opened with ``streams``; others wait. Detectors of
    one trunk, engine, precision and size share its requests, and wait for each other there.

    Attributes:
        bundle: what it was opened with.
        status: engine and precision in use, and the result of the self-test.
    """

    bundle: Bundle
    status: DetectorStatus

    def __init__(self, bundle: Bundle, runtime: Runtime, state: State) -> None:
        self.bundle = bundle
        self._runtime = runtime
        self._trunk = shared_trunk(bundle, runtime)
        with self._trunk.borrow() as slot:
            taps = slot.session.run({IMAGE: slot.image})
            self._shapes = {name: tuple(taps[name].shape) for name in bundle.manifest.taps}
            if bundle.manifest.takes_product:
                self._shapes[PRODUCT] = (len(slot.image),)
        self._state: State = state
        self._added: dict[str, ProductFile] = {}
        self._in_force = InForce(self._build_head(state), 0, bundle.manifest.products)
        # One worker: of two switches the one asked for last is in force in the end.
        self._switcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="switch-state")
        self.status = DetectorStatus(
            runtime.engine, runtime.precision, runtime.engine, runtime.precision, "", float("nan")
        )

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        engine: Engine | None = None,
        precision: Precision | None = None,
        threads: int = 0,
        streams: int = 1,
        accelerator: Accelerator | None = None,
    ) -> Detector:
        """Build the sessions and run the golden frames.

        Where the golden frames miss their scores, float32 of the same engine is taken, then float32 of the other;
        ``status`` says so. TensorRT is tried in float16, then in float32, then CUDA, before the processor. In float16
        the thresholds are those of ONNX Runtime's float32: a golden score may then differ from its own by a tenth of
        the good scores' interquartile range.

        Args:
            bundle: a verified bundle.
            engine: who runs it; None takes OpenVINO where installed, else ONNX Runtime.
            precision: numerics; None takes int8 where the bundle was calibrated for it, else float32.
            threads: shared by the streams; 0 lets the engine take the machine.
            streams: calls that run side by side. 1 gives the lowest latency, the number of cores the most frames.
            accelerator: of ONNX Runtime, which it implies; the processor where None.

        Raises:
            MissingExtraError: no engine, or not the one asked for, is installed.
            BundleError: the bundle was not calibrated for the pair asked for, or its files do not fit each other.
            EngineError: no engine gives the golden scores; the message has the figures.
        """
        wanted = accelerator or Accelerator()
        if wanted.provider is not Provider.CPU:
            engine, precision = engine or Engine.ONNXRUNTIME, precision or Precision.FLOAT32
        requested = choose(bundle, engine, precision)
        state = stored_state(bundle)
        reasons: list[str] = []
        for pair, one in attempts(bundle, requested, wanted):
            allowed = tolerance(bundle, pair, one)
            name = " ".join((*(part.value for part in pair), *([] if one == Accelerator() else [one.label])))
            try:
                detector = cls(bundle, Runtime(*pair, threads, streams, one), state)
                error = detector.golden_error()
            except EngineError as problem:
                reasons.append(str(problem))
                continue
            # A NaN on either side compares False, which is a miss.
            if error <= allowed:
                detector.status = DetectorStatus(*pair, *requested, "; ".join(reasons), error, one.label)
                if reasons:
                    _LOG.warning("%s: runs on %s: %s", bundle.path, name, detector.status.fallback_reason)
                return detector
            reasons.append(f"{name} misses the golden scores by {error:.6g} (tolerance {allowed:.6g})")
        raise EngineError(
            f"{bundle.path}: no engine reproduces the bundle: {'; '.join(reasons)}; export it again on a machine of "
            "this kind"
        )

    def predict(self, frame: Frame, look: Look = PLAIN) -> Prediction:
        """Judge one frame.

        Args:
            frame: of a camera.
            look: what to correct and whether to measure; with :data:`edge.adaptation.look.PLAIN` nothing is done.

        Raises:
            CaptureError: the frame does not fit the bundle, or shows too little to be judged.
            EngineError: the engine gives up.
        """
        # Read once: a switch in the middle of this call must not mix two heads, nor name the wrong one.
        in_force = self._in_force
        with self._trunk.borrow() as slot:
            seeing = Seeing(self.bundle.manifest, slot, in_force, frame, look)
            return seeing.judged(slot.session.run({IMAGE: slot.image}))

    def begin(self, frame: Frame, look: Look = PLAIN) -> PendingPrediction | None:
        """Prepare a frame and let the engine begin, so that another frame can be finished meanwhile.

        Args:
            frame: of a camera.
            look: as in :meth:`predict`.

        Returns:
            What will have the prediction; None where all requests for that are in use.

        Raises:
            CaptureError: the frame does not fit the bundle, or shows too little to be judged.
            EngineError: the engine gives up.
        """
        slot = self._trunk.take_ahead()
        if slot is None:
            return None
        try:
            return PendingPrediction(self._trunk, slot, Seeing(self.bundle.manifest, slot, self._in_force, frame, look))
        except BaseException:
            self._trunk.give_back(slot)
            raise

    def map_of_canvas(self, canvas: npt.NDArray[Any], look: Look = PLAIN) -> npt.NDArray[np.float32]:
        """Return the raw anomaly map of a canvas; a NaN in it is left to be seen.

        Args:
            canvas: uint8 [canvas_height, canvas_width, 3] RGB, or as the modality says.
            look: as in :meth:`predict`; nothing is measured.

        Returns:
            float32 [canvas_height / map_stride, canvas_width / map_stride].

        Raises:
            EngineError: the canvas has another size, or the engine gives up.
        """
        manifest = self.bundle.manifest
        maps = self._run(self._in_force, canvas, ANOMALY_MAP, look)
        return join_maps(maps, manifest.preprocessing, manifest.map_stride)

    def embeddings_of_canvas(self, canvas: npt.NDArray[Any], look: Look = PLAIN) -> npt.NDArray[np.float32]:
        """Return the patch rows that feed the memory; the first call compiles a graph for them.

        Args:
            canvas: uint8 [canvas_height, canvas_width, 3] RGB, or as the modality says.
            look: as in :meth:`predict`; nothing is measured.

        Returns:
            float32 [tiles, L, D].

        Raises:
            EngineError: the head has no output ``embedding``, the canvas has another size, or the engine gives up.
        """
        if not self.has_embedding:
            raise EngineError(
                f"{self.bundle.path}: method {self.bundle.manifest.method} gives no embeddings; use a bundle of a "
                "memory method"
            )
        return self._run(self._in_force, canvas, EMBEDDING, look)

    def route_of_canvas(self, canvas: npt.NDArray[np.uint8], look: Look = PLAIN) -> npt.NDArray[np.float32]:
        """Return how near a canvas is to each sub-class, float32 [E], see :data:`edge.inference.sessions.ROUTE`.

        Raises:
            EngineError: the head has no router, the canvas has another size, or the engine gives up.
        """
        if not self.has_router:
            raise EngineError(f"{self.bundle.path}: its head has no router; train it with one")
        return np.asarray(self._run(self._in_force, canvas, ROUTE, look).mean(axis=0), np.float32)

    @property
    def has_embedding(self) -> bool:
        """Whether the head gives patch rows."""
        return EMBEDDING in self._in_force.head.outputs

    @property
    def memory_version(self) -> int:
        """Of the memory in force, 0 for the one packed in the bundle; the next prediction may name a newer one."""
        return self._in_force.memory_version

    def switch_state(
        self, tensors: State, *, memory_version: int = 0, before: Callable[[], None] | None = None
    ) -> Future[None]:
        """Build a head with another state in the background and switch to it in one step.

        Calls in progress finish with the old head, and their predictions name the old version. The golden frames
        belong to the bundle's own state and are not run again.

        Args:
            tensors: every state tensor of the manifest, float32, of its shape; copied before this returns.
            memory_version: that predictions of the new head name.
            before: called once the new head is built and nothing can fail any more, just before it is in force: to
                store what will judge, and to have its thresholds ready. What it raises stops the switch.

        Returns:
            Done when the new head is in force. Its error may be an EngineError or what ``before`` raised; the old
            head then stays.

        Raises:
            BundleError: names, shapes or types differ from the manifest's, or a value is not finite.
        """
        check_state(self.bundle, tensors, "the new state")
        copies = {name: np.array(values, order="C") for name, values in tensors.items()}

        def build() -> None:
            state = self._with_added(copies, self._added)
            head = self._build_head(state)
            # Whoever has used embeddings goes on to: their graph is compiled here, not in that call.
            if self._in_force.head.has(EMBEDDING):
                head.session(EMBEDDING, 0)
            if before is not None:
                before()
            self._in_force, self._state = InForce(head, memory_version, self._in_force.products), copies

        return self._switcher.submit(build)

    @property
    def products(self) -> tuple[str, ...]:
        """That it can judge, by index: the bundle's, and those added since; empty in a bundle of one product.

        No index ever means another product: products are added behind, and none is taken away.
        """
        return self._in_force.products

    @property
    def added(self) -> tuple[ProductFile, ...]:
        """Products that were added, in the order of their indices."""
        return tuple(self._added.values())

    @property
    def has_router(self) -> bool:
        """Whether the head says which product or sub-class it sees."""
        return ROUTE in self._in_force.head.outputs

    def prepare_products(self, products: Sequence[ProductFile]) -> Future[MoreProducts]:
        """Build a head with the rows of more products in the background; nobody judges by it yet.

        A product that was added before gets its new rows. The rows of the others are as they were, so golden frames
        keep their scores. Of two that are prepared the one put in force last holds, and a state that was switched
        meanwhile is lost.

        Args:
            products: that fit the bundle, see :func:`edge.products.product_file.require_fit`.

        Returns:
            Done when they can be put in force. Its error may be an EngineError.
        """

        def build() -> MoreProducts:
            added = self._added | {one.product: one for one in products}
            head = self._build_head(self._with_added(self._state, added))
            if self._in_force.head.has(EMBEDDING):
                head.session(EMBEDDING, 0)
            names = (*self.bundle.manifest.products, *added)

            def put_in_force() -> None:
                self._added, self._in_force = added, InForce(head, self._in_force.memory_version, names)

            return MoreProducts(tuple(added.values()), put_in_force)

        return self._switcher.submit(build)

    def golden_error(self) -> float:
        """Run the golden frames with the head in force.

        Returns:
            The largest absolute difference from the promised scores, in raw score units; NaN where a score is NaN.

        Raises:
            EngineError: the bundle promises no scores for this engine and precision.
            BundleError: the golden file is damaged.
        """
        manifest = self.bundle.manifest
        path = self.bundle.file(manifest.golden.file)
        arrays = load_arrays(path)
        name = key(self._runtime.engine, self._runtime.precision)
        if f"score_{name}" not in arrays:
            raise EngineError(f"{path}: no golden scores for {name}; export the bundle again with that engine")
        if "canvas" not in arrays or len(arrays["canvas"]) != len(arrays[f"score_{name}"]):
            raise BundleError(f"{path}: frames and scores do not match; fetch the bundle again")
        products = self._golden_products(path, arrays)
        scores = [
            pool_score(self.map_of_canvas(canvas, Look(product)), manifest.pooling)
            for canvas, product in zip(arrays["canvas"], products, strict=True)
        ]
        return float(np.max(np.abs(np.array(scores) - arrays[f"score_{name}"].astype(np.float64))))

    def _with_added(self, state: State, added: Mapping[str, ProductFile]) -> State:
        if not added:
            return state
        own = {
            name: values[: len(self.bundle.manifest.products)] if name in self.bundle.manifest.product_state else values
            for name, values in state.items()
        }
        return with_products(own, list(added.values()))

    def _golden_products(self, path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> list[int]:
        """Which product each golden frame shows, by index."""
        count, known = len(arrays["canvas"]), len(self.bundle.manifest.products)
        products = arrays.get(PRODUCT, np.zeros(count, np.int64))
        if products.shape != (count,) or products.dtype != np.int64 or (products < 0).any():
            raise BundleError(f"{path}: its products do not match its frames; fetch the bundle again")
        if count and products.max() >= max(known, 1):
            raise BundleError(f"{path}: a frame shows product {products.max()} of {known}; fetch the bundle again")
        return [int(one) for one in products]

    def _build_head(self, state: State) -> Head:
        return Head(self.bundle, self._runtime, self._shapes, state, self._trunk.requests)

    def _run(self, in_force: InForce, canvas: npt.NDArray[Any], output: str, look: Look) -> npt.NDArray[np.float32]:
        tiles = cut_tiles(canvas, self.bundle.manifest.preprocessing)
        with self._trunk.borrow() as slot:
            if tiles.shape != slot.image.shape or tiles.dtype != slot.image.dtype:
                raise EngineError(
                    f"{self.bundle.path}: the canvas gives tiles {tiles.dtype} {list(tiles.shape)}, the trunk needs "
                    f"{slot.image.dtype} {list(slot.image.shape)}"
                )
            np.copyto(slot.image, tiles)
            correction = look.correction
            if correction is not None:
                correction.canvas(slot.image)
            taps: Taps = slot.session.run({IMAGE: slot.image})
            if correction is not None:
                taps = correction.taps(taps, in_place=True)
            # The sessions' own buffers are used again by the next call.
            inputs = with_product(taps, self.bundle.manifest, in_force, look.expert)
            return np.array(in_force.head.session(output, slot.index).run(inputs)[output], dtype=np.float32)
