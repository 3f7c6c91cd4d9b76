"""ONNX Runtime on the CPU, or on an NVIDIA GPU by CUDA or TensorRT: the provider that was asked for, or an error."""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.bundle import Precision
from edge.errors import EngineError
from edge.inference.session import GraphSession, choose_outputs, first_line, narrow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from edge.inference.session import Arrays

_ERRORS_ONLY = 3
_TYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class Provider(str, Enum):
    """Who computes inside ONNX Runtime. ``tensorrt`` runs float32 files in float16."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"

    @property
    def full_name(self) -> str:
        """ONNX Runtime's own name of it."""
        return _FULL_NAMES[self]


_FULL_NAMES = {
    Provider.CPU: "CPUExecutionProvider",
    Provider.CUDA: "CUDAExecutionProvider",
    Provider.TENSORRT: "TensorrtExecutionProvider",
}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What a graph runs on inside ONNX Runtime.

    Attributes:
        provider: that computes; nodes that it cannot run go to the next one down, a session without it is an error.
        float16: whether TensorRT may compute float32 graphs in float16.
        cache: folder where TensorRT keeps the engines that it built; None builds them at every start.
    """

    provider: Provider = Provider.CPU
    float16: bool = False
    cache: Path | None = None

    @property
    def label(self) -> str:
        """For the status and for errors."""
        return f"{self.provider.value} float16" if self.float16 else self.provider.value


def providers_of(accelerator: Accelerator, precision: Precision, installed: Sequence[str]) -> list[Any]:
    """Return ONNX Runtime's list of providers with their options, the wanted one first.

    The options are those of the CUDA and TensorRT execution providers' documentation,
    https://onnxruntime.ai/docs/execution-providers/.

    Args:
        accelerator: what is wanted.
        precision: of the graph.
        installed: what this ONNX Runtime was built with.

    Raises:
        EngineError: it was built without the provider, or the provider does not run that precision.
    """
    provider = accelerator.provider
    if provider.full_name not in installed:
        raise EngineError(
            f"this ONNX Runtime has no {provider.full_name} (it has {', '.join(installed)}); install NVIDIA's build "
            "for this JetPack, or set provider: cpu"
        )
    if provider is not Provider.CPU and precision is not Precision.FLOAT32:
        raise EngineError(
            f"{provider.value} runs the float32 files only, not {precision.value}; set precision: float32"
        )
    # TensorFloat-32 has 10 bits of mantissa and is CUDA's default: a float32 graph is to run in float32.
    cuda = (Provider.CUDA.full_name, {"use_tf32": "0"})
    if provider is Provider.CPU:
        return [provider.full_name]
    if provider is Provider.CUDA:
        return [cuda, Provider.CPU.full_name]
    options = {"trt_fp16_enable": "1" if accelerator.float16 else "0"}
    if accelerator.cache is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(accelerator.cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(accelerator.cache),
        }
    lower = [cuda] if Provider.CUDA.full_name in installed else []
    return [(provider.full_name, options), *lower, Provider.CPU.full_name]


class OnnxRuntimeSession(GraphSession):
    """A graph in ONNX Runtime. Its ``run`` is thread-safe, so a clone shares everything but the run in progress."""

    _session: Any
    _pool: ThreadPoolExecutor
    _future: Future[list[npt.NDArray[Any]]] | None = None

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
        optional: Sequence[str],
        input_shapes: Mapping[str, tuple[int, ...]],
        accelerator: Accelerator,
    ) -> GraphSession:
        """Load a graph; see :func:`edge.inference.engines.open_graph`."""
        import onnxruntime  # noqa: PLC0415 a box may have the other engine only

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, threads // streams) if threads else 0
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        # The arena keeps the largest sum of buffers ever used; without it resident memory is lower.
        options.enable_cpu_mem_arena = False
        # Trunk and head take turns: threads of the one that spin would steal the cores of the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            providers = providers_of(accelerator, precision, onnxruntime.get_available_providers())
            _make_folder(accelerator.cache)
            session = onnxruntime.InferenceSession(model, options, providers=providers)
        except EngineError as error:
            raise EngineError(f"{label}: {error}") from error
        except _errors() as error:
            raise EngineError(f"{label}: ONNX Runtime cannot load it ({first_line(error)})") from error
        used = session.get_providers()
        if not used or used[0] != accelerator.provider.full_name:
            # ONNX Runtime only logs that a provider's libraries are missing, and goes on without it.
            raise EngineError(
                f"{label}: {accelerator.provider.full_name} could not start, ONNX Runtime took {', '.join(used)}; "
                "check that CUDA and TensorRT are those that this build wants"
            )
        self = cls()
        self._session = session
        self._pool = ThreadPoolExecutor(max_workers=streams, thread_name_prefix="onnxruntime")
        self._label = label
        self._warm = []
        self._dtypes = {node.name: np.dtype(_TYPES.get(node.type, np.void)) for node in session.get_inputs()}
        shapes = {
            node.name: tuple(size if isinstance(size, int) else None for size in node.shape)
            for node in session.get_inputs()
        }
        self.input_names = tuple(shapes)
        # A graph of varying shapes needs no second compilation here: the shapes asked for are only checked.
        self.input_shapes = narrow(label, shapes, input_shapes)
        self.graph_outputs = tuple(node.name for node in session.get_outputs())
        self.output_names = choose_outputs(label, self.graph_outputs, outputs, optional)
        return self

    def clone(self) -> GraphSession:
        """Return a session that shares the graph; see :meth:`GraphSession.clone`."""
        other = type(self)()
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("_future", None)
        return other

    def _run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        try:
            values = self._session.run(self.output_names, dict(inputs))
        except _errors() as error:
            raise EngineError(f"{self._label}: ONNX Runtime failed ({first_line(error)})") from error
        return dict(zip(self.output_names, values, strict=True))

    def _start(self, inputs: Arrays) -> None:
        # Its own run_async needs two threads for each session; a thread that waits in `run` needs none.
        self._future = self._pool.submit(self._session.run, self.output_names, dict(inputs))

    def _finish(self) -> dict[str, npt.NDArray[Any]]:
        assert self._future is not None
        future, self._future = self._future, None
        try:
            values = future.result()
        except _errors() as error:
            raise EngineError(f"{self._label}: ONNX Runtime failed ({first_line(error)})") from error
        return dict(zip(self.output_names, values, strict=True))

    def _done(self) -> bool:
        future = self._future
        return future is not None and future.done()


def _make_folder(path: Path | None) -> None:
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{path}: cannot be made ({error.strerror}); TensorRT keeps its engines there") from error


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which share no base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: PLC0415

    names = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoaded",
             "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException")  # fmt: skip
    return (RuntimeError, *(getattr(state, name) for name in names if hasattr(state, name)))
