"""A run folder of a detector for signals: what training leaves behind, and all that evaluation and export need.

``run.json`` (the record), ``head.safetensors``, ``trunk.safetensors`` (filter, and each channel's usual value and
deviation), ``holdout.npz`` (held-out good windows and their groups).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 (pydantic needs it at run time)
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deploy.running import pool_all
from edge.bundle import Pooling, SignalLayout, load_arrays
from edge.errors import BundleError, DataError, UsageError
from trainer.run_folder import RECORD as _RECORD
from trainer.run_folder import refuse_foreign, write_run
from trainer.signals.registry import get
from trainer.signals.trunk import SignalTrunk

if TYPE_CHECKING:
    import numpy.typing as npt

    from trainer.methods.base import Head

_WEIGHTS, _TRUNK, _HOLDOUT = "head.safetensors", "trunk.safetensors", "holdout.npz"
_FILES = {_RECORD, _WEIGHTS, _TRUNK, _HOLDOUT}
_BATCH = 32


class SignalRecord(BaseModel):
    """run.json.

    Attributes:
        signal: what a source must give.
        train_windows: windows that were learned from.
        loss: reached by methods that have one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    modality: Literal["signal"] = "signal"
    method: str
    preset: str
    config: dict[str, Any]
    product: str
    signal: SignalLayout
    pooling: Pooling
    seed: int
    data_sha256: str
    train_windows: int
    validation: dict[str, float]
    loss: float | None = None
    seconds: float
    versions: dict[str, str]
    created: datetime


@dataclass
class SignalRun:
    """A trained detector of signals in torch.

    Attributes:
        path: its folder.
        record: what run.json says.
        trunk: filters and scales a window.
        head: the fitted head, in eval mode on the CPU.
        holdout: float32 [n, K, Q], good windows that training did not see.
        groups: unicode [n]; windows of one group overlap.
    """

    path: Path
    record: SignalRecord
    trunk: SignalTrunk
    head: Head
    holdout: npt.NDArray[np.float32]
    groups: npt.NDArray[np.str_]

    @classmethod
    def load(cls, path: Path) -> SignalRun:
        """Read a run folder.

        Raises:
            DataError: the folder is no run of a signal, or a file in it is damaged.
        """
        path = Path(path)
        try:
            record = SignalRecord.model_validate(json.loads((path / _RECORD).read_bytes()))
            method = get(record.method)
            config = type(method.config("quick")).model_validate(record.config)
        except OSError as error:
            raise DataError(f"{path / _RECORD}: cannot be read; give the folder that `lineward train` wrote") from error
        except (ValueError, ValidationError, UsageError) as error:
            raise DataError(f"{path / _RECORD}: not a run record of this release ({error}); train again") from error
        try:
            head = method.build(config, load_file(path / _WEIGHTS))
            scale = load_file(path / _TRUNK)
            trunk = SignalTrunk(scale["mean"][:, 0], scale["std"][:, 0], scale["kernel"]).eval()
            arrays = load_arrays(path / _HOLDOUT)
            holdout, groups = arrays["window"], arrays["groups"].astype(np.str_)
        except (OSError, SafetensorError, KeyError, BundleError) as error:
            raise DataError(f"{path}: cannot be read ({error}); train again") from error
        expected = record.signal.preprocessing.canvas_shape
        if holdout.shape[1:] != expected or holdout.dtype != np.float32 or len(groups) != len(holdout):
            raise DataError(f"{path / _HOLDOUT}: windows are {holdout.dtype} {holdout.shape}; train again")
        return cls(path, record, trunk, head, holdout, groups)

    def save(self) -> None:
        """Write the run folder, in place of an earlier run; run.json comes last.

        Raises:
            DataError: the folder cannot be written.
        """
        write_run(self.path, _FILES, self._write)

    def _write(self, folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, folder / _WEIGHTS)
        save_file({k: v.contiguous() for k, v in self.trunk.state_dict().items()}, folder / _TRUNK)
        np.savez_compressed(folder / _HOLDOUT, allow_pickle=False, window=self.holdout, groups=self.groups)
        record = json.dumps(self.record.model_dump(mode="json"), indent=1, sort_keys=True)
        (folder / _RECORD).write_text(record + "\n", encoding="utf-8")

    @staticmethod
    def refuse_foreign(path: Path) -> None:
        """Refuse to save in a folder of somebody else, see :func:`trainer.run_folder.refuse_foreign`."""
        refuse_foreign(path, _FILES)

    def maps(self, windows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the raw anomaly maps float32 [n, K, cells] of windows float32 [n, K, Q] in the record's unit."""
        return maps_of(self.trunk, self.head, windows)

    def scores(self, windows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the pooled raw scores float32 [n] of windows."""
        return pool_all(self.maps(windows), self.record.pooling)


def maps_of(trunk: SignalTrunk, head: Head, windows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the raw anomaly maps float32 [n, K, cells] of windows float32 [n, K, Q]."""
    with torch.inference_mode():
        found = [head(*trunk(part))[0] for part in torch.from_numpy(np.ascontiguousarray(windows)).split(_BATCH)]
    return torch.cat(found).numpy()


def is_signal_run(path: Path) -> bool:
    """Whether a folder holds a run of a detector for signals; one that cannot be read does not."""
    try:
        content = json.loads((Path(path) / _RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("modality") == "signal"
