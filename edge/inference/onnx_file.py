"""Named initialisers of an ONNX file: list them, and write new values over them in a copy of the file's bytes.

One mechanism for every engine, and no onnx package on the box: a handful of protobuf fields is all it reads.
It must not know what the tensors mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import numpy.typing as npt

# Field numbers of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), stable since IR version 3.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA, _DATA_LOCATION = 1, 2, 4, 8, 9, 14
_FLOAT = 1
_EXTERNAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Initialiser:
    """Where a tensor lies in an ONNX file.

    Attributes:
        name: as in the graph.
        shape: its dimensions.
        is_float32: whether its elements are float32.
        offset: first byte of its values in the file, -1 where they are not stored as one block inside it.
        length: bytes of its values.
        is_hollow: whether it has no values at all: whoever opens the graph brings them.
    """

    name: str
    shape: tuple[int, ...]
    is_float32: bool
    offset: int
    length: int
    is_hollow: bool


def read_initialisers(data: bytes) -> dict[str, Initialiser]:
    """List the initialisers of an ONNX model.

    Raises:
        EngineError: the bytes are no ONNX model.
    """
    view = memoryview(data)
    found: dict[str, Initialiser] = {}
    try:
        for field, _, start, end in _fields(view, 0, len(view)):
            if field == _MODEL_GRAPH:
                for inner, _, first, last in _fields(view, start, end):
                    if inner == _GRAPH_INITIALIZER:
                        tensor = _read_tensor(view, first, last)
                        found[tensor.name] = tensor
    except (IndexError, ValueError) as error:
        raise EngineError(f"not an ONNX model ({error}); fetch the bundle again") from error
    return found


def with_initialisers(
    data: bytes, tensors: Mapping[str, npt.NDArray[Any]], *, more_rows: Collection[str] = ()
) -> bytes:
    """Return the model's bytes with new values for some float32 initialisers, hollow ones filled.

    Args:
        data: an ONNX model.
        tensors: float32 arrays by initialiser name; each of the shape that the graph has.
        more_rows: names among them whose first axis may be longer than in the graph, which then gathers from it.

    Raises:
        EngineError: the graph has no such initialiser, or one of another shape or type, or keeps it in another file;
            or a hollow one is left.
    """
    known = read_initialisers(data)
    left = sorted(name for name, target in known.items() if target.is_hollow and name not in tensors)
    if left:
        raise EngineError(f"initialiser {', '.join(left)} has no values; open it with a state that has them")
    if not tensors:
        return data
    patched, filling = bytearray(data), {}
    for name, values in tensors.items():
        target = known.get(name)
        if target is None:
            raise EngineError(
                f"state {name!r}: the graph has no such initialiser (it has {', '.join(sorted(known)) or 'none'}); "
                "export the bundle again"
            )
        if values.dtype != np.float32 or not target.is_float32:
            raise EngineError(f"state {name!r}: must be float32 in the graph and in the state, not {values.dtype}")
        longer = name in more_rows and values.shape[1:] == target.shape[1:] and len(values) > target.shape[0]
        if values.shape != target.shape and not longer:
            raise EngineError(
                f"state {name!r}: shape {list(values.shape)}, the graph needs {list(target.shape)}; "
                "pad or reduce the state to that shape"
            )
        content = values.astype("<f4").tobytes()
        if longer:
            filling[name] = _tensor(name, values.shape, content)
        elif target.is_hollow:
            filling[name] = _tensor(name, target.shape, content)
        elif target.offset < 0 or target.length != values.nbytes:
            raise EngineError(f"state {name!r}: its values are not inside the graph's file; export the bundle again")
        else:
            patched[target.offset : target.offset + target.length] = content
    return _filled(bytes(patched), filling) if filling else bytes(patched)


def _filled(data: bytes, filling: Mapping[str, bytes]) -> bytes:
    """Put tensors in the place of initialisers; every message around them is written anew with its new length."""
    view, model, before = memoryview(data), bytearray(), 0
    for field, _, start, end in _fields(view, 0, len(view)):
        if field == _MODEL_GRAPH:
            graph, inside = bytearray(), start
            for inner, _, first, last in _fields(view, start, end):
                name = _read_tensor(view, first, last).name if inner == _GRAPH_INITIALIZER else ""
                content = filling.get(name)
                if inner != _GRAPH_INITIALIZER or content is None:
                    graph += view[inside:last]
                else:
                    graph += _message(_GRAPH_INITIALIZER, content)
                inside = last
            model += _message(_MODEL_GRAPH, bytes(graph))
        else:
            model += view[before:end]
        before = end
    return bytes(model)


def _tensor(name: str, shape: tuple[int, ...], content: bytes) -> bytes:
    """A TensorProto of float32."""
    dims = b"".join(_as_varint(_DIMS << 3 | _VARINT) + _as_varint(size) for size in shape)
    kind = _as_varint(_DATA_TYPE << 3 | _VARINT) + _as_varint(_FLOAT)
    return dims + kind + _message(_NAME, name.encode()) + _message(_RAW_DATA, content)


def _message(field: int, content: bytes) -> bytes:
    return _as_varint(field << 3 | _BYTES) + _as_varint(len(content)) + content


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 seven bits to a byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_tensor(view: memoryview, start: int, end: int) -> Initialiser:
    name, is_float32, external, scattered = "", False, False, False
    shape: list[int] = []
    offset, length = -1, 0
    for field, wire, first, last in _fields(view, start, end):
        if field == _DIMS:
            position = first
            while position < last:
                value, position = _varint(view, position)
                shape.append(value)
        elif field == _DATA_TYPE:
            is_float32 = _varint(view, first)[0] == _FLOAT
        elif field == _NAME:
            name = bytes(view[first:last]).decode()
        elif field == _RAW_DATA or (field == _FLOAT_DATA and wire == _BYTES):
            # Packed float_data and raw_data hold the same little-endian bytes. An unset raw_data may come as empty.
            if last > first:
                offset, length = first, last - first
        elif field == _FLOAT_DATA:
            scattered = True
        elif field == _DATA_LOCATION:
            external = _varint(view, first)[0] == _EXTERNAL
    hollow = is_float32 and 0 not in shape and offset < 0 and not external and not scattered
    return Initialiser(name, tuple(shape), is_float32, -1 if external else offset, length, hollow)


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, wire type, first byte, byte behind the last) of each field of one message."""
    position = start
    while position < end:
        tag, position = _varint(view, position)
        field, wire = tag >> 3, tag & 7
        first = position
        if wire == _VARINT:
            _, position = _varint(view, position)
        elif wire == _BYTES:
            size, first = _varint(view, position)
            position = first + size
        elif wire in (_FIXED32, _FIXED64):
            position += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {first}")
        if position > end:
            raise ValueError(f"a field of {position - first} bytes runs past its message at byte {first}")
        yield field, wire, first, position


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 the continuation bit
            return value, position
        shift += 7
        if shift > 63:  # noqa: PLR2004 a varint has at most 64 bits
            raise ValueError(f"a number without end at byte {position}")
