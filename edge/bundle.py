"""The bundle: everything a box needs to judge one product; reading it and verifying it.

A bundle is a folder that is verified before use and never changed in place. ``manifest.json`` lists the sha256 of
every other file, so the sha256 of the manifest's bytes is the bundle's id. This module must not know how a bundle
is made (deploy/pack.py does) nor how its graphs are run (edge/inference does).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 (pydantic needs it at run time)
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from edge.errors import BundleError
from edge.inputs import (
    STRIDE_MULTIPLE,
    Crop,
    DepthLayout,
    Inputs,
    Modality,
    Preprocessing,
    Resize,
    SignalLayout,
    SignalPreprocessing,
    Tiles,
    check_layouts,
)
from edge.memory.rows import RowsPrecision

__all__ = [
    "MANIFEST", "SCHEMA_VERSION", "STRIDE_MULTIPLE", "Bundle", "Calibration", "CalibrationScores", "Crop",
    "DepthLayout", "Engine", "Golden", "Graph", "Inputs", "Manifest", "MemoryLayout", "Modality", "Pooling",
    "Precision", "Preprocessing", "Provenance", "Resize", "SignalLayout", "SignalPreprocessing", "StateTensor", "Tiles",
    "load_arrays", "manifest_bytes", "sha256_file",
]  # fmt: skip

MANIFEST = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Engine(str, Enum):
    """Who runs the graphs."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


class Precision(str, Enum):
    """Numerics of a graph. ``bfloat16`` runs the float32 files with OpenVINO's bfloat16 hint."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pooling(_Model):
    """How a map becomes an image score: the mean of the ``cells`` highest map cells (1 is the maximum)."""

    cells: int = Field(1, ge=1)


class Graph(_Model):
    """The two files of one graph. Paths are inside the bundle; ``id`` is the sha256 of the float32 file."""

    float32: str
    int8: str | None = None
    id: Sha256


class StateTensor(_Model):
    """A named initialiser of the head, filled from state.safetensors; float32 of ``shape`` in the graph.

    ``stored`` int8: the file holds ``name`` as int8 [R, D] and ``name.scale`` as float32 [R, 1] > 0, whose product the
    state is (see :mod:`edge.memory.rows`). float16: ``name`` is float16. A manifest does not mention float32.
    """

    name: str
    shape: tuple[int, ...]
    stored: RowsPrecision = RowsPrecision.FLOAT32

    @model_validator(mode="after")
    def _int8_is_a_matrix(self) -> StateTensor:
        if self.stored is RowsPrecision.INT8 and len(self.shape) != 2:  # noqa: PLR2004 (rows are a matrix)
            raise ValueError(f"state {self.name} of shape {list(self.shape)} cannot be stored in int8: it has no rows")
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if self.stored is RowsPrecision.FLOAT32:
            del content["stored"]
        return content

    @property
    def scale_name(self) -> str:
        """Name of the scales in the file, where the rows are int8."""
        return f"{self.name}.scale"


class MemoryLayout(_Model):
    """A head whose map is the distance to the nearest row of two banks, which a box may replace.

    The map of a tile is ``sqrt(min_m ||z - m||^2)`` over the rows of both banks, on ``grid``, after ``smoothing``
    zero-counted 3x3 means of the distances, less ``background`` times the tile map's own mean. A bank that is not full
    repeats rows, which changes no distance.
    """

    local: str = Field("bank_local", description="State tensor [R, D] of the box's own memory.")
    fleet: str = Field("bank_fleet", description="State tensor [R', D] of the fleet's memory.")
    grid: tuple[int, int] = Field(description="Rows and columns of patches of a tile; the embedding is row-major.")
    smoothing: int = Field(0, ge=0, le=4)
    background: float = Field(0.0, ge=0, le=1)


class Calibration(_Model):
    """Where the held-out good scores of one engine and precision are.

    The npz holds ``scores`` float32 [n], ``maps`` float16 [n, h, w] (for a box with a region of interest) and
    ``groups`` unicode [n]; of several products also ``products`` unicode [n].
    """

    engine: Engine
    precision: Precision
    file: str
    count: int = Field(ge=1)


class Golden(_Model):
    """Frames with the scores that an engine and precision must give, within ``tolerance`` (raw score units).

    The npz holds ``canvas`` uint8 [n, canvas_height, canvas_width, 3] RGB (float32 [n, ...] of other modalities)
    and ``score_<engine>_<precision>`` float32 [n] each; of several products also ``product`` int64 [n], indices.
    """

    file: str
    count: int = Field(ge=1)
    tolerance: dict[str, float]


class Provenance(_Model):
    """Where the bundle came from.

    ``moments_from`` says which good images the moments were measured on, ``moments_images`` how many they were.
    """

    data_sha256: Sha256
    seed: int
    preset: str
    train_images: int = Field(ge=1)
    calibration_images: int = Field(ge=1)
    moments_from: Literal["training", "holdout"] | None = None
    moments_images: int = Field(0, ge=0)
    versions: dict[str, str]


class Manifest(_Model):
    """manifest.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    method: str = Field(min_length=1)
    product: str = Field(min_length=1)
    modality: Modality = Modality.IMAGE
    signal: SignalLayout | None = None
    depth: DepthLayout | None = None
    preprocessing: Inputs
    trunk: Graph
    head: Graph
    taps: tuple[str, ...] = Field(min_length=1)
    map_stride: int = Field(ge=1)
    state: tuple[StateTensor, ...] = ()
    state_file: str | None = None
    pooling: Pooling = Pooling()
    embedding_id: dict[Precision, Sha256]
    calibration: tuple[Calibration, ...] = Field(min_length=1)
    commissioning_file: str | None = None
    moments_file: str | None = None
    subclasses: tuple[str, ...] = ()
    products: tuple[str, ...] = Field(
        (), description="Of a bundle for several products, in the order of `product`; its sub-classes are the same."
    )
    takes_product: bool = Field(False, description="Whether the head has the input `product`.")
    product_state: tuple[str, ...] = Field(
        (), description="State tensors whose first axis counts products; a box may add products to them."
    )
    memory: MemoryLayout | None = None
    golden: Golden
    parity: dict[str, Any]
    metrics: dict[str, float | None] = {}
    provenance: Provenance
    created: datetime
    files: dict[str, Sha256]

    @model_validator(mode="after")
    def _files_are_listed(self) -> Manifest:
        named = [
            self.trunk.float32,
            self.trunk.int8,
            self.head.float32,
            self.head.int8,
            self.state_file,
            self.commissioning_file,
            self.moments_file,
            self.golden.file,
            *(c.file for c in self.calibration),
        ]
        missing = [name for name in named if name is not None and name not in self.files]
        if missing:
            raise ValueError(f"not listed under files: {', '.join(missing)}")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or name == MANIFEST:
                raise ValueError(f"files: {name!r} is not a path inside the bundle")
        return self

    @model_validator(mode="after")
    def _layouts_are_of_the_modality(self) -> Manifest:
        check_layouts(self.modality, self.preprocessing, self.signal, self.depth)
        return self

    @model_validator(mode="after")
    def _products_are_subclasses(self) -> Manifest:
        if self.products and self.subclasses != self.products:
            raise ValueError("the sub-classes of a bundle for several products are its products")
        if not self.products and (self.takes_product or self.product_state):
            raise ValueError("a head takes products, but the bundle names none")
        if missing := set(self.product_state) - {tensor.name for tensor in self.state}:
            raise ValueError(f"product_state names {', '.join(sorted(missing))}, which is no state tensor")
        return self

    @model_validator(mode="after")
    def _memory_is_state(self) -> Manifest:
        if self.memory is None:
            return self
        widths = {tensor.name: tensor.shape[1] for tensor in self.state if len(tensor.shape) == 2}  # noqa: PLR2004
        for name in (self.memory.local, self.memory.fleet):
            if name not in widths:
                raise ValueError(f"memory names {name!r}, which is no state tensor [R, D]")
        if widths[self.memory.local] != widths[self.memory.fleet]:
            raise ValueError("the rows of the two banks differ in width")
        return self


@dataclass(frozen=True, slots=True)
class CalibrationScores:
    """Held-out good scores of one engine and precision.

    Attributes:
        scores: float32 [n], pooled over the whole map by the manifest's rule.
        maps: float16 [n, h, w], the raw maps, to pool again under a region of interest.
        groups: unicode [n]; images of one group (a part, a crop source) are not independent.
        products: unicode [n], the product that each image shows; None in a bundle of one product.
    """

    scores: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float16]
    groups: npt.NDArray[np.str_]
    products: npt.NDArray[np.str_] | None = None

    def of(self, product: str) -> CalibrationScores:
        """Return those of one product.

        Raises:
            BundleError: there are none.
        """
        kept = np.zeros(0, bool) if self.products is None else self.products == product
        if not kept.any():
            raise BundleError(f"no calibration scores of product {product!r}; export the bundle again")
        return CalibrationScores(self.scores[kept], self.maps[kept], self.groups[kept])


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Serialise a manifest canonically: sorted keys, UTF-8, a final newline. Its sha256 is the bundle's id."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: its folder.
        manifest: what manifest.json says.
        id: sha256 of manifest.json, 64 hex digits.
    """

    path: Path
    manifest: Manifest
    id: str

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read and verify a bundle.

        Args:
            path: the bundle's folder.

        Returns:
            The bundle, every listed file present with its hash and no file beyond those listed.

        Raises:
            BundleError: the folder is missing, the manifest does not parse, a file is missing, extra or changed.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        if not path.is_dir():
            raise BundleError(f"{path}: no such folder; give the folder that `lineward export` wrote")
        try:
            raw = manifest_path.read_bytes()
        except OSError as error:
            raise BundleError(f"{manifest_path}: cannot be read ({error.strerror}); the folder is no bundle") from error
        try:
            content = json.loads(raw)
        except ValueError as error:
            raise BundleError(f"{manifest_path}: not JSON ({error}); fetch the bundle again") from error
        if isinstance(content, dict) and content.get("schema_version") != SCHEMA_VERSION:
            raise BundleError(
                f"{manifest_path}: schema_version {content.get('schema_version')!r}, this release reads "
                f"{SCHEMA_VERSION}; export the bundle again or update the box"
            )
        try:
            manifest = Manifest.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise BundleError(f"{manifest_path}: {field}: {first['msg']}; fetch the bundle again") from error
        _verify_files(path, manifest)
        return cls(path=path, manifest=manifest, id=hashlib.sha256(raw).hexdigest())

    def file(self, name: str) -> Path:
        """Return the path of a listed file."""
        return self.path / name

    def calibration(self, engine: Engine, precision: Precision) -> CalibrationScores:
        """Load the calibration scores of one engine and precision.

        Raises:
            BundleError: the bundle was not calibrated for that pair.
        """
        for entry in self.manifest.calibration:
            if entry.engine is engine and entry.precision is precision:
                arrays = load_arrays(self.file(entry.file))
                return CalibrationScores(
                    scores=arrays["scores"].astype(np.float32),
                    maps=arrays["maps"].astype(np.float16),
                    groups=arrays["groups"].astype(np.str_),
                    products=arrays["products"].astype(np.str_) if "products" in arrays else None,
                )
        raise BundleError(
            f"{self.path}: not calibrated for {engine.value} {precision.value}; export it again on a machine that "
            "has that engine"
        )

    def calibrated(self) -> tuple[tuple[Engine, Precision], ...]:
        """Return the pairs of engine and precision that the bundle was calibrated for."""
        return tuple((entry.engine, entry.precision) for entry in self.manifest.calibration)


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Load an npz without pickle.

    Raises:
        BundleError: the file is damaged or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # A damaged archive fails wherever zipfile, numpy or a tokenizer stumbles over it.
    except Exception as error:
        raise BundleError(f"{path}: not a readable npz ({error}); fetch the bundle again") from error


def _verify_files(path: Path, manifest: Manifest) -> None:
    present = {str(PurePosixPath(*file.relative_to(path).parts)) for file in path.rglob("*") if file.is_file()} - {
        MANIFEST
    }
    for name in sorted(set(manifest.files) - present):
        raise BundleError(f"{path / name}: missing from the bundle; fetch the bundle again")
    for name in sorted(present - set(manifest.files)):
        raise BundleError(f"{path / name}: not listed in the manifest; a bundle is never changed in place, remove it")
    for name, expected in sorted(manifest.files.items()):
        if sha256_file(path / name) != expected:
            raise BundleError(f"{path / name}: content does not match its sha256; fetch the bundle again")
