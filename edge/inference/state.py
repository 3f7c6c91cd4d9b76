"""The state of a head: tensors by name, as a bundle was packed with them. Knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edge.errors import BundleError
from edge.memory.rows import RowsPrecision, decode_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edge.bundle import Bundle, StateTensor

    State = Mapping[str, npt.NDArray[Any]]


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
        elif tensor.stored is RowsPrecision.FLOAT16 and tensor.name in state:
            state[tensor.name] = _widened(tensor, state[tensor.name], str(path))
    check_state(bundle, state, str(path))
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


def _widened(tensor: StateTensor, values: npt.NDArray[Any], where: str) -> npt.NDArray[np.float32]:
    """Return the float32 numbers that float16 ones are."""
    if values.dtype != np.float16:
        raise BundleError(f"{where}: {tensor.name} is {values.dtype}, the manifest says float16; export it again")
    return values.astype(np.float32)


def check_state(bundle: Bundle, state: State, where: str) -> None:
    """Compare state tensors with the manifest.

    Args:
        bundle: whose manifest.
        state: tensors by name.
        where: they come from, for the error.

    Tensors that hold a row for each product may have more rows than the bundle has products, all as many.

    Raises:
        BundleError: names, shapes or types differ, or a value is not finite.
    """
    wanted = {tensor.name: tensor.shape for tensor in bundle.manifest.state}
    if state.keys() != wanted.keys():
        raise BundleError(
            f"{where}: holds the tensors {', '.join(sorted(state)) or 'none'}, the manifest needs "
            f"{', '.join(sorted(wanted)) or 'none'}; export it again"
        )
    by_product = bundle.manifest.product_state
    if by_product:
        products = max(
            len(bundle.manifest.products), *(len(state[name]) if state[name].ndim else 0 for name in by_product)
        )
        wanted |= {name: (products, *wanted[name][1:]) for name in by_product}
    for name, values in state.items():
        if values.dtype != np.float32 or values.shape != wanted[name]:
            raise BundleError(
                f"{where}: {name} is {values.dtype} {list(values.shape)}, the manifest needs float32 "
                f"{list(wanted[name])}; pad or reduce it to that shape"
            )
        if not np.isfinite(values).all():
            raise BundleError(f"{where}: {name} holds values that are not finite; make that state again")
