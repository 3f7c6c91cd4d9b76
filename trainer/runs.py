"""A run folder: what training leaves behind, and all that evaluation and export need.

``run.json`` (the record), ``head.safetensors`` (weights and state of the head), ``holdout.npz`` (held-out good
canvases and their groups: calibration never needs the training folder again).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 (pydantic needs it at run time)
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edge.bundle import Pooling, Preprocessing, load_arrays
from edge.errors import BundleError, DataError
from edge.inference.preprocessing import cut_tiles, join_maps
from edge.judgement.score import pool_score
from trainer.backbones.efficientnet_lite import Trunk, lite0_trunk
from trainer.methods.registry import get

if TYPE_CHECKING:
    from trainer.methods.base import Head

_RECORD, _WEIGHTS, _HOLDOUT = "run.json", "head.safetensors", "holdout.npz"


class RunRecord(BaseModel):
    """run.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    method: str
    preset: str
    config: dict[str, Any]
    product: str
    preprocessing: Preprocessing
    pooling: Pooling
    seed: int
    data_sha256: str
    train_images: int
    validation: dict[str, float]
    seconds: float
    versions: dict[str, str]
    created: datetime


@dataclass
class Run:
    """A trained detector in torch.

    Attributes:
        path: its folder.
        record: what run.json says.
        trunk: the shared trunk.
        head: the fitted head, in eval mode on the CPU.
        holdout: uint8 [n, canvas_height, canvas_width, 3] RGB, good images that training did not see.
        holdout_groups: unicode [n].
    """

    path: Path
    record: RunRecord
    trunk: Trunk
    head: Head
    holdout: npt.NDArray[np.uint8]
    holdout_groups: npt.NDArray[np.str_]

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
        method = get(record.method)
        try:
            tensors = load_file(path / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path / _WEIGHTS}: cannot be read ({error}); train again") from error
        try:
            holdout = load_arrays(path / _HOLDOUT)
            canvases, groups = holdout["canvas"], holdout["groups"].astype(np.str_)
        except (BundleError, KeyError) as error:
            raise DataError(f"{path / _HOLDOUT}: cannot be read ({error}); train again") from error
        config = type(method.config("quick")).model_validate(record.config)
        return cls(path, record, lite0_trunk(), method.build(config, tensors), canvases, groups)

    def save(self) -> None:
        """Write the run folder; run.json comes last, so a folder that was cut off is no run.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, self.path / _WEIGHTS)
            np.savez_compressed(self.path / _HOLDOUT, canvas=self.holdout, groups=self.holdout_groups)
            partial = self.path / (_RECORD + ".partial")
            partial.write_text(json.dumps(self.record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")
            partial.replace(self.path / _RECORD)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); free space or choose --out") from error

    def judge(self, canvas: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the raw anomaly map float32 [h, w] of one canvas uint8 [canvas_height, canvas_width, 3] RGB."""
        tiles = torch.from_numpy(np.ascontiguousarray(cut_tiles(canvas, self.record.preprocessing)))
        with torch.inference_mode():
            taps = dict(zip(self.trunk.tap_names, self.trunk(tiles), strict=True))
            maps = self.head(*(taps[name] for name in self.head.tap_names))[0].numpy()
        return join_maps(maps, self.record.preprocessing, self.head.map_stride)

    def score(self, canvas: npt.NDArray[np.uint8]) -> float:
        """Return the pooled raw score of one canvas."""
        return pool_score(self.judge(canvas), self.record.pooling)

    def holdout_scores(self) -> npt.NDArray[np.float32]:
        """Return the raw scores float32 [n] of the held-out good canvases."""
        return np.array([self.score(canvas) for canvas in self.holdout], np.float32)
