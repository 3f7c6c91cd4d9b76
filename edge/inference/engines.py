"""One small interface over ONNX Runtime and OpenVINO: open a graph, run it.

Engines are imported when first used, so a box needs only one of them. This module must not know what a bundle is.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.bundle import Engine, Precision
from edge.errors import EngineError, MissingExtraError
from edge.inference.onnx_file import with_initialisers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[Any]]
    Shape = tuple[int | None, ...]

_EXTRA = {Engine.ONNXRUNTIME: "box-cpu", Engine.OPENVINO: "box-openvino"}
_ORT_ERRORS_ONLY = 3
_ORT_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class GraphSession(ABC):
    """A graph that is ready to run.

    A session is used by one thread at a time. For throughput, open a graph with ``streams`` = N and give each of N
    workers its own :meth:`clone`: clones share the compiled graph and its weights and own only their buffers.

    Attributes:
        input_names: in the order of the graph.
        output_names: those asked for, in that order.
        graph_outputs: all that the file has.
        input_shapes: per input, None for a dimension that may vary.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    graph_outputs: tuple[str, ...]
    input_shapes: dict[str, Shape]
    _label: str
    _dtypes: dict[str, np.dtype[Any]]

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the graph once.

        Args:
            inputs: an array per input name, of the graph's type and shape. They are read in place where they are
                contiguous and writeable, and may be changed again only after the call returned.

        Returns:
            An array per output name. They may be views of the session's own buffers: valid until its next run.

        Raises:
            EngineError: an input is missing or unknown, or of another type or shape, or the engine gives up.
        """
        if inputs.keys() != self.input_shapes.keys():
            raise EngineError(
                f"{self._label}: needs the inputs {', '.join(self.input_names)}, got {', '.join(inputs) or 'none'}"
            )
        for name, array in inputs.items():
            shape = self.input_shapes[name]
            if array.dtype != self._dtypes[name] or not _fits(array.shape, shape):
                wanted = ", ".join("?" if size is None else str(size) for size in shape)
                raise EngineError(
                    f"{self._label}: input {name!r} is {array.dtype} {list(array.shape)}, the graph needs "
                    f"{self._dtypes[name]} [{wanted}]"
                )
        return self._run(inputs)

    @abstractmethod
    def clone(self) -> GraphSession:
        """Return a session for another thread that shares the compiled graph; costs buffers only."""

    @abstractmethod
    def _run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]: ...


def available_engines() -> tuple[Engine, ...]:
    """Return the engines that are installed, the preferred one first, without importing them."""
    return tuple(engine for engine in (Engine.OPENVINO, Engine.ONNXRUNTIME) if importlib.util.find_spec(engine.value))


def supports(engine: Engine, precision: Precision) -> bool:
    """Whether an installed engine runs a precision natively on this machine."""
    if engine not in available_engines():
        return False
    if precision is Precision.BFLOAT16:
        return engine is Engine.OPENVINO and "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return True


def open_graph(
    path: Path,
    *,
    engine: Engine,
    precision: Precision,
    threads: int,
    outputs: Sequence[str] | None = None,
    state: Arrays | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    streams: int = 1,
) -> GraphSession:
    """Open an ONNX file.

    Args:
        path: the file; the float32 one for ``float32`` and ``bfloat16``, the quantised one for ``int8``.
        engine: who runs it.
        precision: numerics; the non-quantised rest of an int8 graph runs in float32.
        threads: of the whole session, shared by its streams; 0 lets the engine take the machine.
        outputs: names wanted; what only the others need is not computed. None means all.
        state: float32 values by name of initialiser, of the graph's shapes.
        input_shapes: shapes that the session is compiled for, by input name; other shapes are refused afterwards.
        streams: how many clones may run at the same time without waiting for each other, >= 1.

    Raises:
        MissingExtraError: the engine is not installed.
        EngineError: the file is no graph, lacks an output or state tensor, has other shapes, or the machine lacks
            the precision.
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
        model = with_initialisers(model, state or {})
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from error
    opener = _OpenVinoSession.open if engine is Engine.OPENVINO else _OnnxRuntimeSession.open
    return opener(
        label=str(path),
        model=model,
        precision=precision,
        threads=threads,
        streams=streams,
        outputs=outputs,
        input_shapes=dict(input_shapes or {}),
    )


def _fits(actual: Sequence[int], wanted: Shape) -> bool:
    return len(actual) == len(wanted) and all(
        size is None or size == given for given, size in zip(actual, wanted, strict=True)
    )


def _narrow(label: str, graph: dict[str, Shape], asked: dict[str, tuple[int, ...]]) -> dict[str, Shape]:
    """Merge the shapes asked for into those of the graph."""
    for name, shape in asked.items():
        if name not in graph:
            raise EngineError(f"{label}: has no input {name!r}; it has {', '.join(graph)}")
        if not _fits(shape, graph[name]):
            raise EngineError(
                f"{label}: input {name!r} is {list(graph[name])} in the graph and cannot be {list(shape)}"
            )
    return {**graph, **asked}


def _choose_outputs(label: str, existing: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    if asked is None:
        return tuple(existing)
    missing = [name for name in asked if name not in existing]
    if missing:
        raise EngineError(
            f"{label}: has no output {', '.join(map(repr, missing))}; it has {', '.join(existing)}; export it again"
        )
    return tuple(asked)


class _OnnxRuntimeSession(GraphSession):
    """ONNX Runtime on the CPU. Its ``run`` is thread-safe, so a clone shares everything."""

    _session: Any

    @classmethod
    def open(
        cls,
        *,
        label: str,
        model: bytes,
        precision: Precision,  # noqa: ARG003 the file itself carries it
        threads: int,
        streams: int,
        outputs: Sequence[str] | None,
        input_shapes: dict[str, tuple[int, ...]],
    ) -> GraphSession:
        import onnxruntime  # noqa: PLC0415 a box may have the other engine only

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, threads // streams) if threads else 0
        options.inter_op_num_threads = 1
        options.log_severity_level = _ORT_ERRORS_ONLY
        # The arena keeps the largest sum of buffers ever used; without it resident memory is lower.
        options.enable_cpu_mem_arena = False
        # Trunk and head take turns: threads of the one that spin would steal the cores of the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except _ort_errors() as error:
            raise EngineError(f"{label}: ONNX Runtime cannot load it ({_first_line(error)})") from error
        self = cls()
        self._session = session
        self._label = label
        self._dtypes = {node.name: np.dtype(_ORT_TYPES.get(node.type, np.void)) for node in session.get_inputs()}
        shapes = {
            node.name: tuple(size if isinstance(size, int) else None for size in node.shape)
            for node in session.get_inputs()
        }
        self.input_names = tuple(shapes)
        # A graph of varying shapes needs no second compilation here: the shapes asked for are only checked.
        self.input_shapes = _narrow(label, shapes, input_shapes)
        self.graph_outputs = tuple(node.name for node in session.get_outputs())
        self.output_names = _choose_outputs(label, self.graph_outputs, outputs)
        return self

    def clone(self) -> GraphSession:
        other = type(self)()
        other.__dict__.update(self.__dict__)
        return other

    def _run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        try:
            values = self._session.run(self.output_names, dict(inputs))
        except _ort_errors() as error:
            raise EngineError(f"{self._label}: ONNX Runtime failed ({_first_line(error)})") from error
        return dict(zip(self.output_names, values, strict=True))


class _OpenVinoSession(GraphSession):
    """OpenVINO on the CPU: inputs are read in place, outputs are views of the request's own buffers."""

    _compiled: Any
    _request: Any
    _tensor: Any
    _bound: dict[str, npt.NDArray[Any]]
    _views: dict[str, npt.NDArray[Any]] | None
    _static: bool

    @classmethod
    def open(
        cls,
        *,
        label: str,
        model: bytes,
        precision: Precision,
        threads: int,
        streams: int,
        outputs: Sequence[str] | None,
        input_shapes: dict[str, tuple[int, ...]],
    ) -> GraphSession:
        # OpenVINO picks bfloat16 on its own where the processor has it: 6 % relative error. Always say which.
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision is Precision.BFLOAT16 else "f32",
            "NUM_STREAMS": streams,
        }
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            graph = _core().read_model(model)
            names = [port.get_any_name() for port in graph.outputs]
            chosen = _choose_outputs(label, names, outputs)
            for name, result in list(zip(names, graph.get_results(), strict=True)):
                if name not in chosen:
                    graph.remove_result(result)
            shapes = {
                port.get_any_name(): tuple(
                    None if size.is_dynamic else size.get_length() for size in port.partial_shape
                )
                for port in graph.inputs
            }
            narrowed = _narrow(label, shapes, input_shapes)
            graph.reshape({name: [-1 if size is None else size for size in narrowed[name]] for name in input_shapes})
            dtypes = {port.get_any_name(): np.dtype(port.get_element_type().to_dtype()) for port in graph.inputs}
            compiled = _core().compile_model(graph, "CPU", config)
        except RuntimeError as error:
            raise EngineError(f"{label}: OpenVINO cannot load it ({_first_line(error)})") from error
        self = cls()
        self._label = label
        self._compiled = compiled
        self._dtypes = dtypes
        self.input_names = tuple(shapes)
        self.input_shapes = narrowed
        self.output_names = chosen
        self.graph_outputs = tuple(names)
        self._static = not graph.is_dynamic()
        self.attach_request()
        return self

    def attach_request(self) -> None:
        """Make buffers of one's own for the shared compiled graph."""
        import openvino  # noqa: PLC0415 a box may have the other engine only

        self._tensor = openvino.Tensor
        self._request = self._compiled.create_infer_request()
        self._bound = {}
        self._views = None

    def clone(self) -> GraphSession:
        other = type(self)()
        other.__dict__.update(self.__dict__)
        other.attach_request()
        return other

    def _run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        for name, array in inputs.items():
            # The views that a trunk of static shape gives are the same objects every time: they stay bound.
            if self._bound.get(name) is not array:
                shared = np.require(array, requirements=("C", "W"))
                self._request.set_tensor(name, self._tensor(shared, shared_memory=True))
                self._bound[name] = shared
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"{self._label}: OpenVINO failed ({_first_line(error)})") from error
        if self._views is None or not self._static:
            self._views = {name: self._request.get_tensor(name).data for name in self.output_names}
        return dict(self._views)


@functools.cache
def _core() -> Any:  # noqa: ANN401 openvino has no type information
    import openvino  # noqa: PLC0415 a box may have the other engine only

    return openvino.Core()


@functools.cache
def _ort_errors() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which share no base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: PLC0415

    names = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoaded",
             "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException")  # fmt: skip
    return (RuntimeError, *(getattr(state, name) for name in names if hasattr(state, name)))


def _first_line(error: Exception) -> str:
    """The sentence of an engine's message that says something: OpenVINO's first lines name its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return (telling or lines or [type(error).__name__])[0][:300]
