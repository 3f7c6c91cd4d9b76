"""A head's state as a bundle holds it: once, in its own file, its rows in int8 or float16 where the head asks for that.

It must not know what the tensors mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from edge.bundle import StateTensor
from edge.errors import DataError
from edge.memory.rows import RowsPrecision, decode_rows, encode_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt
    from torch import nn


def state_entries(head: nn.Module) -> tuple[StateTensor, ...]:
    """Return what the manifest says of each state: the head's ``state_names``, and in which numbers each is stored.

    Raises:
        DataError: ``int8_state`` or ``float16_state`` names what is no state.
    """
    buffers, stored = dict(head.named_buffers()), _stored(head)
    return tuple(
        StateTensor(name=name, shape=tuple(buffers[name].shape), stored=stored.get(name, RowsPrecision.FLOAT32))
        for name in head.state_names
    )


def stored_state(head: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return what the bundle's state file holds.

    Args:
        head: with ``state_names`` and, optionally, ``int8_state``: names of states float32 [R, D] whose rows were
            rounded by :func:`edge.memory.rows.round_rows`; and ``float16_state``: names of states that are float16
            numbers.

    Returns:
        Each state float32 or float16, or int8 [R, D] beside ``<name>.scale`` float32 [R, 1].

    Raises:
        DataError: a state to be stored in int8 is no matrix, or one was not rounded, so that a box would read another.
    """
    buffers, stored = dict(head.named_buffers()), _stored(head)
    found: dict[str, npt.NDArray[Any]] = {}
    for name in head.state_names:
        rows = np.ascontiguousarray(buffers[name].detach().cpu().numpy())
        if name not in stored:
            found[name] = rows
            continue
        if stored[name] is RowsPrecision.FLOAT16:
            found[name] = rows.astype(np.float16)
            if not np.array_equal(found[name].astype(np.float32), rows):
                raise DataError(f"head: state {name!r} holds what float16 does not; round it when it is fitted")
            continue
        try:
            values, scale = encode_rows(rows)
        except DataError as error:
            raise DataError(f"head: state {name!r}: {error}") from error
        if not np.array_equal(decode_rows(values, scale), rows):
            raise DataError(f"head: state {name!r} is not in steps of int8; round it with round_rows when it is fitted")
        found |= {name: values, f"{name}.scale": scale}
    return found


def empty_state(path: Path, states: Sequence[str]) -> None:
    """Take the values of some initialisers out of an ONNX file and leave their names, shapes and types.

    Args:
        path: the file, written anew.
        states: float32 initialisers, which whoever opens the graph brings.
    """
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in states:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    path.write_bytes(model.SerializeToString(deterministic=True))


def _stored(head: nn.Module) -> dict[str, RowsPrecision]:
    """Return the states that are not stored in float32."""
    found: dict[str, RowsPrecision] = {}
    for attribute, precision in (("int8_state", RowsPrecision.INT8), ("float16_state", RowsPrecision.FLOAT16)):
        names = frozenset(getattr(head, attribute, ()))
        foreign = sorted(names - set(head.state_names))
        if foreign:
            raise DataError(f"head: {attribute} names {', '.join(foreign)}, not in state_names; add it there")
        found |= dict.fromkeys(names, precision)
    return found
