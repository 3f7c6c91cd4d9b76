"""OpenVINO on the CPU: inputs are read in place, outputs are views of the request's own buffers."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.bundle import Precision
from edge.errors import EngineError
from edge.inference.search_blocks import block_searches
from edge.inference.session import GraphSession, choose_outputs, first_line, narrow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from edge.inference.session import Arrays


class OpenVinoSession(GraphSession):
    """One request of a compiled graph."""

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
        optional: Sequence[str],
        input_shapes: Mapping[str, tuple[int, ...]],
    ) -> GraphSession:
        """Compile a graph; see :func:`edge.inference.engines.open_graph`."""
        # OpenVINO picks bfloat16 on its own where the processor has it: 6 % relative error. Always say which.
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision is Precision.BFLOAT16 else "f32",
            "NUM_STREAMS": streams,
        }
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            graph = core().read_model(model)
            names = [port.get_any_name() for port in graph.outputs]
            chosen = choose_outputs(label, names, outputs, optional)
            for name, result in list(zip(names, graph.get_results(), strict=True)):
                if name not in chosen:
                    graph.remove_result(result)
            shapes = {
                port.get_any_name(): tuple(
                    None if size.is_dynamic else size.get_length() for size in port.partial_shape
                )
                for port in graph.inputs
            }
            narrowed = narrow(label, shapes, input_shapes)
            graph.reshape({name: [-1 if size is None else size for size in narrowed[name]] for name in input_shapes})
            block_searches(graph)
            dtypes = {port.get_any_name(): np.dtype(port.get_element_type().to_dtype()) for port in graph.inputs}
            compiled = core().compile_model(graph, "CPU", config)
        except RuntimeError as error:
            raise EngineError(f"{label}: OpenVINO cannot load it ({first_line(error)})") from error
        self = cls()
        self._label = label
        self._warm = []
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
        """Return a session that shares the graph; see :meth:`GraphSession.clone`."""
        other = type(self)()
        other.__dict__.update(self.__dict__)
        other.attach_request()
        return other

    def _run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        self._bind(inputs)
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"{self._label}: OpenVINO failed ({first_line(error)})") from error
        return self._outputs()

    def _start(self, inputs: Arrays) -> None:
        self._bind(inputs)
        try:
            self._request.start_async()
        except RuntimeError as error:
            raise EngineError(f"{self._label}: OpenVINO failed ({first_line(error)})") from error

    def _finish(self) -> dict[str, npt.NDArray[Any]]:
        try:
            self._request.wait()
        except RuntimeError as error:
            raise EngineError(f"{self._label}: OpenVINO failed ({first_line(error)})") from error
        return self._outputs()

    def _done(self) -> bool:
        try:
            return bool(self._request.wait_for(0))
        except RuntimeError:
            # It has ended, with an error that whoever fetches the result will see.
            return True

    def _bind(self, inputs: Arrays) -> None:
        for name, array in inputs.items():
            # The views that a trunk of static shape gives are the same objects every time: they stay bound.
            if self._bound.get(name) is not array:
                shared = np.require(array, requirements=("C", "W"))
                self._request.set_tensor(name, self._tensor(shared, shared_memory=True))
                self._bound[name] = shared

    def _outputs(self) -> dict[str, npt.NDArray[Any]]:
        if self._views is None or not self._static:
            self._views = {name: self._request.get_tensor(name).data for name in self.output_names}
        return dict(self._views)


@functools.cache
def core() -> Any:  # noqa: ANN401 openvino has no type information
    """Return the process's one OpenVINO core, which must stay the only one.

    Its CPU plug-in gives the calling thread a stack for signals (sigaltstack(2)). Of two cores the one that goes last
    puts back the stack of the other, which is gone by then: the next signal, such as SIGTERM, would be a SIGSEGV.

    Importing OpenVINO reports the import to its maker over the internet where its telemetry package is installed, which
    pip does on its own; without that package it has a stub of its own. A box reports to nobody.
    """
    # None makes the import fail (importlib's documented use of sys.modules).
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # typeshed knows modules only
    import openvino  # noqa: PLC0415 a box may have the other engine only

    return openvino.Core()
