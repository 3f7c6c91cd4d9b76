"""A run folder: what training leaves behind, and all that evaluation and export need.

``run.json`` (the record), ``head.safetensors`` (weights and state of the head), ``holdout.npz`` (held-out good
canvases, their groups and sub-classes: calibration never needs the training folder again), ``reference.npz`` (some of
the training canvases: what each expert was trained on); ``trunk.safetensors`` where a student trained its trunk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003 (pydantic needs it at run time)
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deploy.running import ROUTE_AXES
from edge.bundle import Pooling, Preprocessing, load_arrays
from edge.errors import BundleError, DataError, UsageError
from edge.inference.preprocessing import cut_tiles, join_maps
from edge.judgement.score import pool_score
from trainer.backbones.registry import TrunkSpec, build_trunk
from trainer.distill.record import Distillation  # noqa: TC001 (pydantic needs it at run time)
from trainer.methods.registry import builder
from trainer.methods.routed import split_tensors, with_router
from trainer.run_folder import RECORD as _RECORD
from trainer.run_folder import refuse_foreign, write_run

if TYPE_CHECKING:
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.methods.base import Head

_WEIGHTS, _HOLDOUT = "head.safetensors", "holdout.npz"
_TRUNK, _REFERENCE = "trunk.safetensors", "reference.npz"
_FILES = {_RECORD, _WEIGHTS, _HOLDOUT, _TRUNK, _REFERENCE}


class RunRecord(BaseModel):
    """run.json.

    Attributes:
        product: name of the product, or of all together.
        products: their names where there are several: the sub-classes of its images.
        trunk: which trunk the head stands on.
        distillation: of a student: its teachers, its budget and the figures of every candidate.
        reference_images: training canvases kept in ``reference.npz``; 0 where there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    method: str
    trunk: TrunkSpec = TrunkSpec()
    preset: str
    config: dict[str, Any]
    product: str
    products: tuple[str, ...] = ()
    preprocessing: Preprocessing
    pooling: Pooling
    seed: int
    data_sha256: str
    train_images: int
    validation: dict[str, float]
    seconds: float
    versions: dict[str, str]
    created: datetime
    distillation: Distillation | None = None
    reference_images: int = 0


def _none() -> npt.NDArray[np.uint8]:
    return np.empty((0, 0, 0, 3), np.uint8)


def _unnamed() -> npt.NDArray[np.str_]:
    return np.empty(0, np.str_)


@dataclass
class Run:
    """A trained detector in torch.

    Attributes:
        path: its folder.
        record: what run.json says.
        trunk: the trunk, frozen, in eval mode.
        head: the fitted head, in eval mode on the CPU.
        holdout: uint8 [n, canvas_height, canvas_width, 3] RGB, good images that training did not see.
        holdout_groups: unicode [n].
        holdout_subclasses: unicode [n]; empty in a run of an earlier release.
        reference: uint8 [m, canvas_height, canvas_width, 3] RGB, good images that training saw; m may be 0.
        reference_subclasses: unicode [m].
    """

    path: Path
    record: RunRecord
    trunk: Trunk
    head: Head
    holdout: npt.NDArray[np.uint8]
    holdout_groups: npt.NDArray[np.str_]
    holdout_subclasses: npt.NDArray[np.str_] = field(default_factory=_unnamed)
    reference: npt.NDArray[np.uint8] = field(default_factory=_none)
    reference_subclasses: npt.NDArray[np.str_] = field(default_factory=_unnamed)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run folder.

        Raises:
            DataError: the folder is no run, or a file in it is damaged.
        """
        path = Path(path)
        try:
            record = RunRecord.model_validate(json.loads((path / _RECORD).read_bytes()))
        except OSError as error:
            raise DataError(f"{path / _RECORD}: cannot be read; give the folder that `lineward train` wrote") from error
        except (ValueError, ValidationError) as error:
            raise DataError(f"{path / _RECORD}: not a run record of this release ({error}); train again") from error
        try:
            method = builder(record.method)
            config = type(method.config("quick")).model_validate(record.config)
        except (UsageError, ValidationError) as error:
            raise DataError(f"{path / _RECORD}: not a run record of this release ({error}); train again") from error
        try:
            tensors, router = split_tensors(load_file(path / _WEIGHTS))
            head = method.build(config, tensors)
            head = head if router is None else with_router(head, router)
        except (OSError, SafetensorError, DataError) as error:
            raise DataError(f"{path / _WEIGHTS}: cannot be read ({error}); train again") from error
        trunk = _read_trunk(path, record.trunk)
        holdout = _Images.read(path / _HOLDOUT, record.preprocessing, ("groups",), ("subclasses",))
        kept = _Images(_none(), {"subclasses": _unnamed()})
        if record.reference_images:
            kept = _Images.read(path / _REFERENCE, record.preprocessing, ("subclasses",), ())
        return cls(
            path,
            record,
            trunk,
            head,
            holdout.canvases,
            holdout.names["groups"],
            holdout.names.get("subclasses", _unnamed()),
            kept.canvases,
            kept.names["subclasses"],
        )

    def save(self) -> None:
        """Write the run folder, in place of an earlier run.

        Everything is written beside its place first; then run.json goes first and comes last, so that a folder which
        was cut off is no run, and a disk that is full leaves an earlier run as it was.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        write_run(self.path, _FILES, self._write)

    def _write(self, folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, folder / _WEIGHTS)
        if self.record.trunk.own_weights:
            save_file({k: v.contiguous() for k, v in self.trunk.state_dict().items()}, folder / _TRUNK)
        # Without sub-classes the file is what it was before there were any.
        names = {"subclasses": self.holdout_subclasses} if len(self.holdout_subclasses) else {}
        np.savez_compressed(folder / _HOLDOUT, canvas=self.holdout, groups=self.holdout_groups, **names)
        if len(self.reference):
            np.savez_compressed(folder / _REFERENCE, canvas=self.reference, subclasses=self.reference_subclasses)
        record = self.record.model_dump(mode="json")
        (folder / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @staticmethod
    def refuse_foreign(path: Path) -> None:
        """Refuse to save in a folder of somebody else, see :func:`trainer.run_folder.refuse_foreign`."""
        refuse_foreign(path, _FILES)

    @property
    def holdout_products(self) -> npt.NDArray[np.int64]:
        """Which product each held-out canvas shows, int64 [n], an index; 0 where there is one.

        Raises:
            DataError: one shows none of the run's.
        """
        if not self.record.products:
            return np.zeros(len(self.holdout), np.int64)
        return np.array([self.product_index(name) for name in self.holdout_subclasses.tolist()], np.int64)

    def product_index(self, name: str) -> int:
        """Return the index of a product.

        Raises:
            DataError: the run has none of that name.
        """
        if name not in self.record.products:
            known = ", ".join(self.record.products) or "one product alone"
            raise DataError(f"{self.path}: knows no product {name!r}, but {known}; train again with it")
        return self.record.products.index(name)

    def see(
        self, canvas: npt.NDArray[np.uint8], product: int = 0
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Judge one canvas.

        Args:
            canvas: uint8 [canvas_height, canvas_width, 3] RGB.
            product: that it is judged as, an index.

        Returns:
            The raw anomaly map float32 [h, w], and the route float32 [P], None where the head has none.
        """
        tiles = torch.from_numpy(np.ascontiguousarray(cut_tiles(canvas, self.record.preprocessing)))
        with torch.inference_mode():
            taps = dict(zip(self.trunk.tap_names, self.trunk(tiles), strict=True))
            inputs = [taps[name] for name in self.head.tap_names]
            if self.head.takes_product:
                inputs.append(torch.full((len(tiles),), product, dtype=torch.int64))
            found = self.head(*inputs)
        route = found[-1].mean(0).numpy() if found[-1].ndim == ROUTE_AXES else None
        return join_maps(found[0].numpy(), self.record.preprocessing, self.head.map_stride), route

    def judge(self, canvas: npt.NDArray[np.uint8], product: int = 0) -> npt.NDArray[np.float32]:
        """Return the raw anomaly map float32 [h, w] of one canvas, see :meth:`see`."""
        return self.see(canvas, product)[0]

    def score(self, canvas: npt.NDArray[np.uint8], product: int = 0) -> float:
        """Return the pooled raw score of one canvas."""
        return pool_score(self.judge(canvas, product), self.record.pooling)

    def holdout_scores(self) -> npt.NDArray[np.float32]:
        """Return the raw scores float32 [n] of the held-out good canvases, each as its product."""
        shown = self.holdout_products
        scores = [self.score(canvas, int(one)) for canvas, one in zip(self.holdout, shown, strict=True)]
        return np.array(scores, np.float32)


def _read_trunk(path: Path, spec: TrunkSpec) -> Trunk:
    try:
        return build_trunk(spec, load_file(path / _TRUNK) if spec.own_weights else None)
    except UsageError as error:
        raise DataError(f"{path / _RECORD}: not a run record of this release ({error}); train again") from error
    except (OSError, SafetensorError, DataError) as error:
        raise DataError(f"{path / _TRUNK}: cannot be read ({error}); train again") from error


@dataclass(frozen=True)
class _Images:
    """Canvases and what is said of each, by name of the array."""

    canvases: npt.NDArray[np.uint8]
    names: dict[str, npt.NDArray[np.str_]]

    @classmethod
    def read(
        cls, path: Path, preprocessing: Preprocessing, needed: tuple[str, ...], optional: tuple[str, ...]
    ) -> _Images:
        try:
            arrays = load_arrays(path)
            canvases = arrays["canvas"]
            names = {name: arrays[name].astype(np.str_) for name in (*needed, *(set(optional) & set(arrays)))}
        except (BundleError, KeyError) as error:
            raise DataError(f"{path}: cannot be read ({error}); train again") from error
        expected = (len(canvases), preprocessing.canvas_height, preprocessing.canvas_width, 3)
        if canvases.dtype != np.uint8 or canvases.shape != expected or not len(canvases):
            raise DataError(
                f"{path}: canvases are {canvases.dtype} {canvases.shape}, not uint8 {expected}; train again"
            )
        for name, values in names.items():
            if values.shape != (len(canvases),):
                raise DataError(f"{path}: {len(values)} {name} for {len(canvases)} canvases; train again")
        return cls(canvases, names)
