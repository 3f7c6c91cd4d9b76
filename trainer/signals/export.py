"""From a run of a signal to a bundle: hands deploy the modules and the held-out windows that it needs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.export import export_fixed_trunk
from deploy.pack import BundleRequest, pack
from deploy.parity import ParityRules
from deploy.trunks import TrunkFiles
from edge.bundle import Modality, Provenance
from edge.errors import UsageError
from trainer.export import PRECISIONS
from trainer.signals.defects import copies, make_defects
from trainer.signals.runs import SignalRun

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Bundle

_GATE_WINDOWS = 200
_COMMISSIONING = 16
# Apart from every seed that training draws anomalies with.
_GATE_SEED = 7919


def export_signal_run(
    path: Path, out: Path, *, precision: str = "auto", rules: ParityRules | None = None, progress: Progress
) -> Bundle:
    """Export, quantise, prove and pack a run.

    The trunk only scales, so that its int8 file is the float32 one.

    Args:
        path: run folder.
        out: bundle folder to write; must not exist or be empty.
        precision: as for :func:`trainer.export.export_run`.
        rules: limits and sample sizes of the parity gate; None takes those that every bundle for a line must pass.
        progress: progress function.

    Raises:
        UsageError: unknown precision, or ``out`` is not empty.
        DataError: ``path`` is no run of a signal.
        GateError: the parity gate refused a precision that must pass.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: unknown; choose one of {', '.join(PRECISIONS)}")
    wanted, optional = PRECISIONS[precision]
    run = SignalRun.load(path)
    record = run.record
    repeats = -(-_GATE_WINDOWS // len(run.holdout))

    def defects(contrast: float) -> npt.NDArray[np.float32]:
        return make_defects(run.holdout, seed=record.seed + _GATE_SEED, contrast=contrast, repeats=repeats)[0]

    with tempfile.TemporaryDirectory() as folder:
        float32, int8 = Path(folder) / "trunk.onnx", Path(folder) / "trunk.int8.onnx"
        identity = export_fixed_trunk(run.trunk, float32, shape=record.signal.preprocessing.tile_shape)
        shutil.copyfile(float32, int8)
        request = BundleRequest(
            trunk=run.trunk,
            head=run.head,
            method=record.method,
            product=record.product,
            modality=Modality.SIGNAL,
            signal=record.signal,
            preprocessing=record.signal.preprocessing,
            pooling=record.pooling,
            provenance=Provenance(
                data_sha256=record.data_sha256,
                seed=record.seed,
                preset=record.preset,
                train_images=record.train_windows,
                calibration_images=len(run.holdout),
                versions=record.versions,
            ),
            holdout=run.holdout,
            groups=tuple(run.groups.tolist()),
            make_defects=defects,
            jitter=copies,
            commissioning=run.holdout[:_COMMISSIONING],
            commissioning_groups=tuple(run.groups[:_COMMISSIONING].tolist()),
            trunk_files=TrunkFiles(float32, int8, identity),
            precisions=wanted,
            optional=optional,
            rules=rules or ParityRules(),
            metrics={f"synthetic_{name}": value for name, value in record.validation.items()},
            seed=record.seed,
            progress=progress,
        )
        return pack(request, out)
