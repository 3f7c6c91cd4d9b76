"""Detector: a verified bundle, an engine and a precision; Frame in, Prediction out.

It proves itself on the bundle's golden frames before it judges anything. It must not know thresholds or events.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edge.bundle import Bundle, Engine, Precision, load_arrays
from edge.errors import BundleError, EngineError, MissingExtraError
from edge.frames import Frame, Prediction
from edge.inference.engines import available_engines
from edge.inference.preprocessing import cut_tiles, join_maps, to_canvas
from edge.inference.sessions import ANOMALY_MAP, EMBEDDING, IMAGE, Head, Runtime, shared_trunk
from edge.judgement.score import pool_score
from edge.memory.rows import RowsPrecision, decode_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from edge.bundle import StateTensor
    from edge.inference.sessions import State

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _InForce:
    """A head and the version of the memory in it: read and replaced together, so that no map gets the other's."""

    head: Head
    memory_version: int


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
    """

    engine: Engine
    precision: Precision
    requested_engine: Engine
    requested_precision: Precision
    fallback_reason: str
    golden_max_error: float


class Detector:
    """Frames of one product in, raw anomaly maps out. Safe to call from several threads.

    Made by :meth:`open`. As many calls run side by side as it was opened with ``streams``; others wait. Detectors of
    one trunk, engine, precision and size share its sessions, and wait for each other there.

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
        preprocessing = bundle.manifest.preprocessing
        blank = np.zeros((preprocessing.canvas_height, preprocessing.canvas_width, 3), np.uint8)
        with self._trunk.borrow() as trunk:
            taps = trunk.run({IMAGE: cut_tiles(blank, preprocessing)})
            self._tap_shapes = {name: tuple(taps[name].shape) for name in bundle.manifest.taps}
        self._in_force = _InForce(self._build_head(state), 0)
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
    ) -> Detector:
        """Build the sessions and run the golden frames.

        Where the golden frames miss their scores, float32 of the same engine is taken, then float32 of the other;
        ``status`` says so.

        Args:
            bundle: a verified bundle.
            engine: who runs it; None takes OpenVINO where installed, else ONNX Runtime.
            precision: numerics; None takes int8 where the bundle was calibrated for it, else float32.
            threads: shared by the streams; 0 lets the engine take the machine.
            streams: calls that run side by side. 1 gives the lowest latency, the number of cores the most frames.

        Raises:
            MissingExtraError: no engine, or not the one asked for, is installed.
            BundleError: the bundle was not calibrated for the pair asked for, or its files do not fit each other.
            EngineError: no engine gives the golden scores; the message has the figures.
        """
        requested = _choose(bundle, engine, precision)
        state = stored_state(bundle)
        reasons: list[str] = []
        for pair in _attempts(bundle, requested):
            tolerance = bundle.manifest.golden.tolerance.get(_key(*pair), float("nan"))
            try:
                detector = cls(bundle, Runtime(*pair, threads, streams), state)
                error = detector.golden_error()
            except EngineError as problem:
                reasons.append(str(problem))
                continue
            # A NaN on either side compares False, which is a miss.
            if error <= tolerance:
                detector.status = DetectorStatus(*pair, *requested, "; ".join(reasons), error)
                if reasons:
                    _LOG.warning(
                        "%s: runs on %s %s: %s",
                        bundle.path,
                        pair[0].value,
                        pair[1].value,
                        detector.status.fallback_reason,
                    )
                return detector
            reasons.append(
                f"{pair[0].value} {pair[1].value} misses the golden scores by {error:.6g} (tolerance {tolerance:.6g})"
            )
        raise EngineError(
            f"{bundle.path}: no engine reproduces the bundle: {'; '.join(reasons)}; export it again on a machine of "
            "this kind"
        )

    def predict(self, frame: Frame) -> Prediction:
        """Judge one frame.

        Raises:
            CaptureError: the frame does not fit the bundle's crop or is no colour image.
            EngineError: the engine gives up.
        """
        start = time.monotonic_ns()
        manifest = self.bundle.manifest
        canvas = to_canvas(frame.image, manifest.preprocessing)
        ready = time.monotonic_ns()
        # Read once: a switch in the middle of this call must not mix two heads, nor name the wrong one.
        in_force = self._in_force
        maps = self._run(in_force.head, canvas, ANOMALY_MAP)
        anomaly_map = join_maps(maps, manifest.preprocessing, manifest.map_stride)
        done = time.monotonic_ns()
        return Prediction(
            anomaly_map=anomaly_map,
            frame=frame,
            preprocess_ns=ready - start,
            inference_ns=done - ready,
            memory_version=in_force.memory_version,
        )

    def map_of_canvas(self, canvas: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the raw anomaly map of a canvas; a NaN in it is left to be seen.

        Args:
            canvas: uint8 [canvas_height, canvas_width, 3] RGB.

        Returns:
            float32 [canvas_height / map_stride, canvas_width / map_stride].

        Raises:
            EngineError: the canvas has another size, or the engine gives up.
        """
        manifest = self.bundle.manifest
        maps = self._run(self._in_force.head, canvas, ANOMALY_MAP)
        return join_maps(maps, manifest.preprocessing, manifest.map_stride)

    def embeddings_of_canvas(self, canvas: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the patch rows that feed the memory; the first call compiles a graph for them.

        Args:
            canvas: uint8 [canvas_height, canvas_width, 3] RGB.

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
        return self._run(self._in_force.head, canvas, EMBEDDING)

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
        _check_state(self.bundle, tensors, "the new state")
        copies = {name: np.array(values, order="C") for name, values in tensors.items()}

        def build() -> None:
            head = self._build_head(copies)
            # Whoever has used embeddings goes on to: their graph is compiled here, not in that call.
            if self._in_force.head.has_lanes(EMBEDDING):
                head.lanes(EMBEDDING)
            if before is not None:
                before()
            self._in_force = _InForce(head, memory_version)

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
        key = _key(self._runtime.engine, self._runtime.precision)
        if f"score_{key}" not in arrays:
            raise EngineError(f"{path}: no golden scores for {key}; export the bundle again with that engine")
        if "canvas" not in arrays or len(arrays["canvas"]) != len(arrays[f"score_{key}"]):
            raise BundleError(f"{path}: frames and scores do not match; fetch the bundle again")
        scores = [pool_score(self.map_of_canvas(canvas), manifest.pooling) for canvas in arrays["canvas"]]
        return float(np.max(np.abs(np.array(scores) - arrays[f"score_{key}"].astype(np.float64))))

    def _build_head(self, state: State) -> Head:
        return Head(self.bundle, self._runtime, self._tap_shapes, state)

    def _run(self, head: Head, canvas: npt.NDArray[np.uint8], output: str) -> npt.NDArray[np.float32]:
        lanes = head.lanes(output)
        with self._trunk.borrow() as trunk, lanes.borrow() as session:
            taps = trunk.run({IMAGE: cut_tiles(canvas, self.bundle.manifest.preprocessing)})
            # The sessions' own buffers are used again by the next call.
            return np.array(session.run(taps)[output], dtype=np.float32)


def _choose(bundle: Bundle, engine: Engine | None, precision: Precision | None) -> tuple[Engine, Precision]:
    """Fill in what was left open, and refuse pairs without calibration or engine."""
    installed = available_engines()
    if not installed or (engine is not None and engine not in installed):
        wanted = "no inference engine" if engine is None else engine.value
        extra = "box-cpu" if engine is Engine.ONNXRUNTIME else "box-openvino"
        raise MissingExtraError(
            f"{wanted if engine is None else f'{wanted} not'} installed; run: pip install 'lineward[{extra}]'"
        )
    calibrated = bundle.calibrated()
    for candidate in installed if engine is None else (engine,):
        for numerics in (Precision.INT8, Precision.FLOAT32) if precision is None else (precision,):
            if (candidate, numerics) in calibrated:
                return candidate, numerics
    asked = " ".join(choice.value for choice in (engine, precision) if choice is not None) or "an installed engine"
    pairs = ", ".join(f"{one.value} {other.value}" for one, other in calibrated)
    raise BundleError(
        f"{bundle.path}: not calibrated for {asked}, only for {pairs}; choose one of these or export again"
    )


def _attempts(bundle: Bundle, requested: tuple[Engine, Precision]) -> list[tuple[Engine, Precision]]:
    """The requested pair, then float32 of the same engine, then float32 of the other."""
    others = [engine for engine in available_engines() if engine is not requested[0]]
    fallbacks = [(engine, Precision.FLOAT32) for engine in (requested[0], *others)]
    return [requested, *(pair for pair in fallbacks if pair != requested and pair in bundle.calibrated())]


def stored_state(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    """Return the state tensors that a bundle was packed with, float32 by name; empty where its head has none.

    Raises:
        BundleError: the file is damaged, or does not hold what the manifest says.
    """
    if bundle.manifest.state_file is None:
        state: dict[str, npt.NDArray[Any]] = {}
        path = bundle.path
    else:
        path = bundle.file(bundle.manifest.state_file)
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path}: not a readable safetensors file ({error}); fetch the bundle again") from error
    for tensor in bundle.manifest.state:
        if tensor.stored is RowsPrecision.INT8 and tensor.name in state:
            state[tensor.name] = _decoded(tensor, state[tensor.name], state.pop(tensor.scale_name, None), str(path))
    _check_state(bundle, state, str(path))
    return state


def _decoded(
    tensor: StateTensor, values: npt.NDArray[Any], scale: npt.NDArray[Any] | None, where: str
) -> npt.NDArray[np.float32]:
    """Return the rows that int8 values and their scales stand for."""
    if values.dtype != np.int8 or values.shape != tensor.shape:
        raise BundleError(
            f"{where}: {tensor.name} is {values.dtype} {list(values.shape)}, the manifest says int8 "
            f"{list(tensor.shape)}; export it again"
        )
    wanted = (len(values), 1)
    if scale is None or scale.dtype != np.float32 or scale.shape != wanted:
        found = "missing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise BundleError(
            f"{where}: {tensor.scale_name} is {found}, int8 rows need float32 {list(wanted)}; export it again"
        )
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise BundleError(f"{where}: {tensor.scale_name} has values that are not finite and above 0; export it again")
    return decode_rows(values, scale)


def _check_state(bundle: Bundle, state: State, where: str) -> None:
    wanted = {tensor.name: tensor.shape for tensor in bundle.manifest.state}
    if state.keys() != wanted.keys():
        raise BundleError(
            f"{where}: holds the tensors {', '.join(sorted(state)) or 'none'}, the manifest needs "
            f"{', '.join(sorted(wanted)) or 'none'}; export it again"
        )
    for name, values in state.items():
        if values.dtype != np.float32 or values.shape != wanted[name]:
            raise BundleError(
                f"{where}: {name} is {values.dtype} {list(values.shape)}, the manifest needs float32 "
                f"{list(wanted[name])}; pad or reduce it to that shape"
            )
        if not np.isfinite(values).all():
            raise BundleError(f"{where}: {name} holds values that are not finite; make that state again")


def _key(engine: Engine, precision: Precision) -> str:
    return f"{engine.value}_{precision.value}"
