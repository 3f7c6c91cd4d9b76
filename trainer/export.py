"""From a run folder to a bundle: hands deploy the modules and the held-out data that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploy.pack import BundleRequest, pack
from edge.bundle import Precision, Provenance
from edge.errors import UsageError
from trainer.data.generic import generic_canvases
from trainer.fit import make_defects
from trainer.runs import Run

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import Bundle
    from trainer.methods.base import Progress

_COMMISSIONING_IMAGES = 32
_DEFECTS = 120
# Apart from every seed that training draws defects with.
_GATE_SEED = 7919


def export_run(path: Path, out: Path, *, precision: str = "int8", progress: Progress) -> Bundle:
    """Export, quantise, prove and pack a run.

    Args:
        path: run folder.
        out: bundle folder to write; must not exist or be empty.
        precision: ``int8`` (float32 is always beside it) or ``float32`` alone.
        progress: progress function.

    Raises:
        UsageError: unknown precision, or ``out`` is not empty.
        DataError: ``path`` is no run.
        GateError: the parity gate refused the quantised graphs; its figures are in the message.
    """
    wanted = {
        Precision.INT8.value: (Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8),
        Precision.FLOAT32.value: (Precision.FLOAT32, Precision.BFLOAT16),
    }
    if precision not in wanted:
        raise UsageError(f"--precision {precision}: unknown; choose int8 or float32")
    run = Run.load(path)
    record = run.record
    repeats = max(1, -(-_DEFECTS // len(run.holdout)))

    def defects(contrast: float) -> npt.NDArray[np.uint8]:
        return make_defects(run.holdout, seed=record.seed + _GATE_SEED, contrast=contrast, repeats=repeats)[0]

    request = BundleRequest(
        trunk=run.trunk,
        head=run.head,
        method=record.method,
        product=record.product,
        preprocessing=record.preprocessing,
        pooling=record.pooling,
        provenance=Provenance(
            data_sha256=record.data_sha256,
            seed=record.seed,
            preset=record.preset,
            train_images=record.train_images,
            calibration_images=len(run.holdout),
            versions=record.versions,
        ),
        holdout=run.holdout,
        groups=tuple(run.holdout_groups.tolist()),
        make_defects=defects,
        commissioning=run.holdout[:_COMMISSIONING_IMAGES],
        generic=generic_canvases(),
        precisions=wanted[precision],
        metrics={f"synthetic_{name}": value for name, value in record.validation.items()},
        seed=record.seed,
        progress=progress,
    )
    return pack(request, out)
