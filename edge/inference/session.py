"""GraphSession: a graph that is ready to run, at once or in the background. Knows no engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from edge.errors import EngineError
from edge.inference.calls import IN_PROGRESS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[Any]]
    Shape = tuple[int | None, ...]


class GraphSession(ABC):
    """A graph that is ready to run.

    A session is used by one thread at a time and does one thing at a time: :meth:`run`, or :meth:`start` and then
    :meth:`finish`. For throughput, open a graph with ``streams`` = N and give each of N workers its own
    :meth:`clone`: clones share the compiled graph and its weights and own only their buffers.

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
    # Shared with the clones: non-empty once the graph has given a result.
    _warm: list[bool]
    _call: int | None = None

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the graph once, in this thread.

        Args:
            inputs: an array per input name, of the graph's type and shape. They are read in place where they are
                contiguous and writeable, and may be changed again only after the call returned.

        Returns:
            An array per output name. They may be views of the session's own buffers: valid until its next run.

        Raises:
            EngineError: an input is missing or unknown, or of another type or shape, or the engine gives up.
        """
        self._check(inputs)
        with IN_PROGRESS.during(self._label, first=not self._warm):
            found = self._run(inputs)
        if not self._warm:
            self._warm.append(True)
        return found

    def start(self, inputs: Arrays) -> None:
        """Begin to run the graph in the background; :meth:`finish` has the result.

        Args:
            inputs: as for :meth:`run`; not to be changed before :meth:`finish` returned.

        Raises:
            EngineError: an input is missing or unknown, or of another type or shape, or the engine gives up.
        """
        self._check(inputs)
        self._call = IN_PROGRESS.begin(self._label, first=not self._warm, done=self._done)
        try:
            self._start(inputs)
        except BaseException:
            self._come_back()
            raise

    def finish(self) -> dict[str, npt.NDArray[Any]]:
        """Wait for the run that was started.

        Returns:
            As :meth:`run`.

        Raises:
            EngineError: the engine gives up.
        """
        try:
            found = self._finish()
        finally:
            self._come_back()
        if not self._warm:
            self._warm.append(True)
        return found

    @abstractmethod
    def clone(self) -> GraphSession:
        """Return a session for another thread that shares the compiled graph; costs buffers only."""

    @abstractmethod
    def _run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]: ...

    @abstractmethod
    def _start(self, inputs: Arrays) -> None: ...

    @abstractmethod
    def _finish(self) -> dict[str, npt.NDArray[Any]]: ...

    @abstractmethod
    def _done(self) -> bool: ...

    def _come_back(self) -> None:
        if self._call is not None:
            IN_PROGRESS.end(self._call)
            self._call = None

    def _check(self, inputs: Arrays) -> None:
        if inputs.keys() != self.input_shapes.keys():
            raise EngineError(
                f"{self._label}: needs the inputs {', '.join(self.input_names)}, got {', '.join(inputs) or 'none'}"
            )
        for name, array in inputs.items():
            shape = self.input_shapes[name]
            if array.dtype != self._dtypes[name] or not fits(array.shape, shape):
                wanted = ", ".join("?" if size is None else str(size) for size in shape)
                raise EngineError(
                    f"{self._label}: input {name!r} is {array.dtype} {list(array.shape)}, the graph needs "
                    f"{self._dtypes[name]} [{wanted}]"
                )


def fits(actual: Sequence[int], wanted: Shape) -> bool:
    """Whether a shape is one that a graph takes."""
    return len(actual) == len(wanted) and all(
        size is None or size == given for given, size in zip(actual, wanted, strict=True)
    )


def narrow(label: str, graph: dict[str, Shape], asked: Mapping[str, tuple[int, ...]]) -> dict[str, Shape]:
    """Merge the shapes asked for into those of the graph.

    Raises:
        EngineError: the graph has no such input, or cannot take that shape.
    """
    for name, shape in asked.items():
        if name not in graph:
            raise EngineError(f"{label}: has no input {name!r}; it has {', '.join(graph)}")
        if not fits(shape, graph[name]):
            raise EngineError(
                f"{label}: input {name!r} is {list(graph[name])} in the graph and cannot be {list(shape)}"
            )
    return {**graph, **asked}


def choose_outputs(
    label: str, existing: Sequence[str], asked: Sequence[str] | None, optional: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the outputs asked for, and the optional ones that are there; all where None are asked for.

    Raises:
        EngineError: the graph lacks one.
    """
    if asked is None:
        return tuple(existing)
    missing = [name for name in asked if name not in existing]
    if missing:
        raise EngineError(
            f"{label}: has no output {', '.join(map(repr, missing))}; it has {', '.join(existing)}; export it again"
        )
    return (*asked, *(name for name in optional if name in existing and name not in asked))


def first_line(error: Exception) -> str:
    """The sentence of an engine's message that says something: OpenVINO's first lines name its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return (telling or lines or [type(error).__name__])[0][:300]
