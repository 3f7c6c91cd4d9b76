"""A product file: what a bundle for several products needs to judge one more, made from good images on a box.

Knows the file and what it must fit; neither how a prompt is made nor how a box switches to it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 (pydantic needs it at run time)
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge.bundle import CalibrationScores, Engine, Precision, Sha256
from edge.durable_files import replace_file
from edge.errors import ProductError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import Bundle

    Tensors = dict[str, npt.NDArray[Any]]

PROMPTS = "prompts"
"""State tensor [P, L, D] of a head that is told by one good image of each product: that image's ``embedding``."""
MAX_FILE_BYTES = 256 * 2**20
_HEADER, _STATE = "product_file", "state/"
_SCORES, _MAPS = "calibration/scores", "calibration/maps"


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    product: str = Field(min_length=1, max_length=200)
    bundle: Sha256
    head: Sha256
    engine: Engine
    precision: Precision
    image: str = Field(max_length=500)
    created: datetime
    groups: tuple[Annotated[str, Field(max_length=500)], ...] = ()
    tensors: Sha256


@dataclass(frozen=True, slots=True)
class ProductFile:
    """One product's share of a bundle's state, and the scores that its thresholds are made from.

    The file is a safetensors file: ``state/<name>`` float32 for each name in the manifest's ``product_state``, of the
    state's shape without its first axis; ``calibration/scores`` float32 [n] and ``calibration/maps`` float16 [n, h, w],
    both or neither; and one metadata entry ``product_file``, JSON of everything else with the sha256 of the tensors.

    Attributes:
        product: its name, none of the bundle's own.
        bundle: id of the one bundle that it was made with and fits.
        head: id of that bundle's head.
        engine: that made the state and the scores.
        precision: likewise.
        image: name of the good image that the state was made from.
        created: when, UTC.
        state: one row of each ``product_state`` tensor, float32, by name.
        calibration: scores of good images under this very state, for ``engine`` and ``precision`` alone, ``products``
            None; None where no folder was given: thresholds are then to be borrowed from the bundle's own products.
        digest: sha256 of the metadata entry, which names that of the tensors: of a file made anew it is another one.
            Empty of what was not read from a file.
    """

    product: str
    bundle: str
    head: str
    engine: Engine
    precision: Precision
    image: str
    created: datetime
    state: Mapping[str, npt.NDArray[np.float32]]
    calibration: CalibrationScores | None = None
    digest: str = ""


class MoreProducts(NamedTuple):
    """Products that a detector could judge from now on.

    Attributes:
        added: all that will be added then, in the order of their indices.
        put_in_force: has the detector judge them, in one step that cannot fail.
    """

    added: tuple[ProductFile, ...]
    put_in_force: Callable[[], None]


def write_product(path: Path, product: ProductFile) -> None:
    """Write a product file, whole or not at all; an earlier one is replaced.

    Raises:
        ProductError: a name is empty or too long, or the file cannot be written.
    """
    tensors: Tensors = {_STATE + name: np.ascontiguousarray(row, np.float32) for name, row in product.state.items()}
    groups: tuple[str, ...] = ()
    if product.calibration is not None:
        tensors[_SCORES] = np.ascontiguousarray(product.calibration.scores, np.float32)
        tensors[_MAPS] = np.ascontiguousarray(product.calibration.maps, np.float16)
        groups = tuple(product.calibration.groups.tolist())
    try:
        header = _Header(
            product=product.product,
            bundle=product.bundle,
            head=product.head,
            engine=product.engine,
            precision=product.precision,
            image=product.image,
            created=product.created,
            groups=groups,
            tensors=_digest(tensors),
        )
        replace_file(path, save(tensors, metadata={_HEADER: header.model_dump_json()}))
    except ValidationError as error:
        raise ProductError(f"{path}: {_first(error)}; the file was not written") from error
    except OSError as error:
        raise ProductError(f"{path}: cannot be written ({error.strerror}); check the folder and its space") from error


def read_product(path: Path) -> ProductFile:
    """Read a product file.

    Raises:
        ProductError: there is none, it is too large, damaged, of another schema, or holds values that are not finite.
    """
    again = "make it again with `lineward prompt`"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProductError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so no product file; {again}")
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_HEADER)
            tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise ProductError(f"{path}: cannot be read ({error.strerror or error}); {again}") from error
    # Of a damaged header safetensors raises its own error, of a type that numpy lacks what numpy does.
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProductError(f"{path}: not a readable safetensors file ({error}); {again}") from error
    if text is None:
        raise ProductError(f"{path}: a safetensors file, but no product file; {again}")
    try:
        header = _Header.model_validate_json(text)
    except ValidationError as error:
        raise ProductError(f"{path}: {_first(error)}; {again}") from error
    if _digest(tensors) != header.tensors:
        raise ProductError(f"{path}: content does not match its sha256; {again}")
    calibration = _calibration(path, tensors, header.groups)
    state = {name.removeprefix(_STATE): row for name, row in tensors.items() if name.startswith(_STATE)}
    for name, row in state.items():
        if row.dtype != np.float32 or not np.isfinite(row).all():
            raise ProductError(f"{path}: {name} is {row.dtype}, or holds values that are not finite; {again}")
    return ProductFile(
        product=header.product,
        bundle=header.bundle,
        head=header.head,
        engine=header.engine,
        precision=header.precision,
        image=header.image,
        created=header.created,
        state=state,
        calibration=calibration,
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def require_fit(product: ProductFile, bundle: Bundle, where: str) -> None:
    """Check that a bundle can judge a product from a file.

    Args:
        product: as read.
        bundle: a verified bundle.
        where: the file, for errors.

    Raises:
        ProductError: the bundle takes no products, is another one, has that product already, or the state has other
            names or shapes.
    """
    manifest, again = bundle.manifest, f"make it again with `lineward prompt --bundle {bundle.path}`"
    if not manifest.product_state:
        raise ProductError(f"{bundle.path}: method {manifest.method} takes no products from files; leave {where} out")
    if product.bundle != bundle.id:
        head = "the same" if product.head == manifest.head.id else "another"
        raise ProductError(
            f"{where}: made for bundle {product.bundle[:12]} with {head} head, this one is {bundle.id[:12]}; {again}"
        )
    if product.product in manifest.products:
        raise ProductError(f"{where}: {product.product!r} is a product of the bundle itself; give it another name")
    wanted = {tensor.name: tensor.shape[1:] for tensor in manifest.state if tensor.name in manifest.product_state}
    found = {name: row.shape for name, row in product.state.items()}
    if found != wanted:
        raise ProductError(f"{where}: holds {_shapes(found)}, the bundle needs {_shapes(wanted)}; {again}")
    if product.calibration is not None:
        preprocessing, maps = manifest.preprocessing, product.calibration.maps
        size = (
            preprocessing.canvas_height // manifest.map_stride,
            preprocessing.canvas_width // manifest.map_stride,
        )
        if maps.shape[1:] != size:
            raise ProductError(f"{where}: its maps are {list(maps.shape[1:])}, the bundle's {list(size)}; {again}")


def with_products(
    state: Mapping[str, npt.NDArray[Any]], products: Sequence[ProductFile]
) -> dict[str, npt.NDArray[Any]]:
    """Return a bundle's state with the rows of more products behind its own, in order.

    Args:
        state: every state tensor of the bundle, see :func:`edge.inference.state.stored_state`.
        products: that fit the bundle, see :func:`require_fit`.
    """
    rows = {name: [product.state[name] for product in products] for name in (products[0].state if products else ())}
    return {
        name: np.concatenate([values, np.stack(rows[name])]) if name in rows else values
        for name, values in state.items()
    }


def _calibration(path: Path, tensors: Tensors, groups: tuple[str, ...]) -> CalibrationScores | None:
    scores, maps = tensors.get(_SCORES), tensors.get(_MAPS)
    if scores is None and maps is None and not groups:
        return None
    again = "make it again with `lineward prompt`"
    if scores is None or maps is None or scores.dtype != np.float32 or maps.dtype != np.float16:
        raise ProductError(f"{path}: has no calibration scores float32 and maps float16 for its groups; {again}")
    # As many of each, at least one; [images] and [images, rows, columns].
    if not (len(groups) >= 1 and scores.shape == (len(groups),) == maps.shape[:1] and maps.ndim == 3):  # noqa: PLR2004
        raise ProductError(
            f"{path}: {len(groups)} groups, scores {list(scores.shape)} and maps {list(maps.shape)} do not belong "
            f"together; {again}"
        )
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise ProductError(f"{path}: calibration scores or maps are not finite; {again}")
    return CalibrationScores(scores, maps, np.array(groups, np.str_))


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "no state"


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'header'}: {first['msg']}"
