"""The run folder of a depth detector: what training leaves behind, and all that evaluation and export need.

``run.json`` (the record), ``head.safetensors`` (banks), ``holdout.npz`` (held-out good canvases and their groups).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 (pydantic needs it at run time)
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edge.bundle import DepthLayout, Pooling, Preprocessing, load_arrays
from edge.errors import BundleError, DataError
from edge.inference.preprocessing import cut_tiles, join_maps
from edge.judgement.score import pool_score
from trainer.depth.geometry import GeometryTrunk
from trainer.depth.method import NAME, DepthConfig, build_head
from trainer.run_folder import RECORD as _RECORD
from trainer.run_folder import refuse_foreign, write_run

if TYPE_CHECKING:
    import numpy.typing as npt

    from trainer.depth.method import DepthMemoryHead

    Canvases = npt.NDArray[np.float32]

_WEIGHTS, _HOLDOUT = "head.safetensors", "holdout.npz"
_FILES = {_RECORD, _WEIGHTS, _HOLDOUT}


class DepthRecord(BaseModel):
    """run.json of a depth detector.

    Attributes:
        unit_m: length that the trunk measures in, metres: the noise floor of the good scans.
        jump_m: difference in depth of neighbours beyond which they are of two surfaces, metres.
        validation: I-AUROC on synthetic defects, by pooling rule.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    modality: Literal["depth"] = "depth"
    method: Literal["depth_memory"] = NAME
    preset: str
    config: DepthConfig
    product: str
    preprocessing: Preprocessing
    depth: DepthLayout
    unit_m: float = Field(gt=0)
    jump_m: float = Field(gt=0)
    pooling: Pooling
    seed: int
    data_sha256: str
    train_scans: int
    validation: dict[str, float]
    seconds: float
    versions: dict[str, str]
    created: datetime

    def trunk(self) -> GeometryTrunk:
        """Return the trunk."""
        return GeometryTrunk(unit_m=self.unit_m, jump_m=self.jump_m).eval().requires_grad_(requires_grad=False)


def is_depth_run(path: Path) -> bool:
    """Tell whether a run folder is a depth detector's; a damaged one is none."""
    try:
        content = json.loads((Path(path) / _RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("modality") == "depth"


@dataclass
class DepthRun:
    """A trained depth detector in torch.

    Attributes:
        path: its folder.
        record: what run.json says.
        trunk: in eval mode.
        head: in eval mode.
        holdout: float32 [n, canvas_height, canvas_width, 3], metres, good scans that training did not see.
        groups: unicode [n].
    """

    path: Path
    record: DepthRecord
    trunk: GeometryTrunk
    head: DepthMemoryHead
    holdout: Canvases
    groups: npt.NDArray[np.str_]

    @classmethod
    def load(cls, path: Path) -> DepthRun:
        """Read a run folder.

        Raises:
            DataError: the folder is no run of a depth detector, or a file in it is damaged.
        """
        path = Path(path)
        try:
            record = DepthRecord.model_validate(json.loads((path / _RECORD).read_bytes()))
        except OSError as error:
            raise DataError(f"{path / _RECORD}: cannot be read; give the folder that `lineward train` wrote") from error
        except (ValueError, ValidationError) as error:
            raise DataError(f"{path / _RECORD}: not a depth run of this release ({error}); train again") from error
        try:
            head = build_head(load_file(path / _WEIGHTS))
        except (OSError, SafetensorError, DataError) as error:
            raise DataError(f"{path / _WEIGHTS}: cannot be read ({error}); train again") from error
        try:
            arrays = load_arrays(path / _HOLDOUT)
            holdout, groups = arrays["canvas"], arrays["groups"].astype(np.str_)
        except (BundleError, KeyError) as error:
            raise DataError(f"{path / _HOLDOUT}: cannot be read ({error}); train again") from error
        expected = (len(groups), *record.preprocessing.canvas_shape)
        if holdout.dtype != np.float32 or holdout.shape != expected or not len(holdout):
            raise DataError(f"{path / _HOLDOUT}: canvases are {holdout.dtype} {holdout.shape}; train again")
        return cls(path, record, record.trunk(), head, holdout, groups)

    def save(self) -> None:
        """Write the run folder, in place of an earlier run of a depth detector; run.json comes last.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        write_run(self.path, _FILES, self._write)

    def _write(self, folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, folder / _WEIGHTS)
        np.savez_compressed(folder / _HOLDOUT, canvas=self.holdout, groups=self.groups)
        text = json.dumps(self.record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
        (folder / _RECORD).write_text(text, encoding="utf-8")

    @staticmethod
    def refuse_foreign(path: Path) -> None:
        """Refuse to save in a folder of somebody else, see :func:`trainer.run_folder.refuse_foreign`."""
        refuse_foreign(path, _FILES)

    def judge(self, canvas: Canvases) -> npt.NDArray[np.float32]:
        """Return the raw anomaly map float32 [h, w] of one canvas float32 [canvas_height, canvas_width, 3]."""
        tiles = torch.from_numpy(np.ascontiguousarray(cut_tiles(canvas, self.record.preprocessing), np.float32))
        with torch.inference_mode():
            taps = dict(zip(self.trunk.tap_names, self.trunk(tiles), strict=True))
            maps = self.head(*(taps[name] for name in self.head.tap_names))[0].numpy()
        return join_maps(maps, self.record.preprocessing, self.head.map_stride)

    def score(self, canvas: Canvases) -> float:
        """Return the pooled raw score of one canvas."""
        return pool_score(self.judge(canvas), self.record.pooling)

    def holdout_scores(self) -> npt.NDArray[np.float32]:
        """Return the raw scores float32 [n] of the held-out good canvases."""
        return np.array([self.score(canvas) for canvas in self.holdout], np.float32)
