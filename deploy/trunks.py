"""The shared trunk's two files: exported and quantised once, kept in a cache that is addressed by what made them.

It must not know products: the generic set is the only data a trunk is ever quantised on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.export import EXPORTER_VERSION, export_trunk
from deploy.quantize import QUANTIZER_VERSION, TrunkQuantization, quantize_trunk
from edge.bundle import sha256_file
from edge.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

CACHE_VARIABLE = "LINEWARD_CACHE"
_FLOAT32, _INT8, _HASHES = "trunk.onnx", "trunk.int8.onnx", "sha256.json"


@dataclass(frozen=True, slots=True)
class TrunkFiles:
    """The files of one trunk.

    Attributes:
        float32: trunk.onnx.
        int8: trunk.int8.onnx.
        id: sha256 of trunk.onnx, 64 hex digits.
    """

    float32: Path
    int8: Path
    id: str


def default_cache() -> Path:
    """Return the folder named by ``LINEWARD_CACHE``, else ~/.cache/lineward; read at each call."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "lineward"


def build_trunk_files(
    trunk: nn.Module,
    generic_canvases: npt.NDArray[np.uint8],
    cache_dir: Path | None = None,
    *,
    options: TrunkQuantization | None = None,
) -> TrunkFiles:
    """Return the trunk's files, making them where the cache does not hold them intact.

    Several processes may do so at once: each works in a folder of its own, the first to finish puts it in place.

    Args:
        trunk: see :func:`deploy.export.export_trunk`.
        generic_canvases: uint8 [n, H, W, 3] RGB, H and W multiples of 32; the set that int8 ranges are measured on.
        cache_dir: None takes :func:`default_cache`.
        options: how to quantise.

    Raises:
        DataError: the generic set is unusable, the module does not export, or the cache cannot be written.
    """
    options = options or TrunkQuantization()
    if generic_canvases.ndim != 4 or generic_canvases.dtype != np.uint8 or not len(generic_canvases):  # noqa: PLR2004
        raise DataError(f"generic set is {generic_canvases.dtype} {generic_canvases.shape}, not uint8 [n, H, W, 3]")
    cache = (cache_dir or default_cache()) / "trunks"
    folder = cache / _key(trunk, generic_canvases, options)
    if (found := _intact(folder)) is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    except OSError as error:
        raise DataError(
            f"{cache}: cannot be written ({error.strerror}); set {CACHE_VARIABLE} to a folder that can"
        ) from error
    try:
        size = (int(generic_canvases.shape[1]), int(generic_canvases.shape[2]))
        export_trunk(trunk, work / _FLOAT32, size=size)
        quantize_trunk(work / _FLOAT32, work / _INT8, generic_canvases, options=options)
        hashes = {name: sha256_file(work / name) for name in (_FLOAT32, _INT8)}
        (work / _HASHES).write_text(json.dumps(hashes))
        return _put_in_place(work, folder)
    except OSError as error:
        raise DataError(
            f"{cache}: cannot be written ({error.strerror}); free space or set {CACHE_VARIABLE} to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put_in_place(work: Path, folder: Path) -> TrunkFiles:
    while True:
        try:
            work.rename(folder)
        except OSError:
            # Another process was first; or what is there is damaged and makes way.
            if (found := _intact(folder)) is not None:
                return found
            if not folder.exists():
                raise
            damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
            folder.rename(damaged / folder.name)
            shutil.rmtree(damaged, ignore_errors=True)
            continue
        made = _intact(folder)
        if made is None:
            raise DataError(f"{folder}: damaged right after it was written; check the disk")
        return made


def _intact(folder: Path) -> TrunkFiles | None:
    try:
        hashes = json.loads((folder / _HASHES).read_text())
        if any(sha256_file(folder / name) != hashes[name] for name in (_FLOAT32, _INT8)):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TrunkFiles(folder / _FLOAT32, folder / _INT8, hashes[_FLOAT32])


def _key(trunk: nn.Module, canvases: npt.NDArray[np.uint8], options: TrunkQuantization) -> str:
    digest = hashlib.sha256()
    kind = f"{type(trunk).__module__}.{type(trunk).__qualname__}"
    recipe = [kind, list(trunk.tap_names), EXPORTER_VERSION, QUANTIZER_VERSION, asdict(options), canvases.shape]
    digest.update(json.dumps(recipe).encode())
    # The text of a module names its layers in order, with strides and paddings that no weight carries.
    digest.update(str(trunk).encode())
    for name, tensor in trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    digest.update(np.ascontiguousarray(canvases).tobytes())
    return digest.hexdigest()
