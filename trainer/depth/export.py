"""From a depth run to a bundle: hands deploy the modules, the held-out scans and defects to prove them on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.export import export_fixed_trunk
from deploy.pack import BundleRequest, pack
from deploy.trunks import TrunkFiles
from edge.bundle import Modality, Precision, Provenance
from edge.errors import UsageError
from trainer.depth.defects import PLAIN_STRENGTH, Defects, jittered
from trainer.depth.run import DepthRun

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploy.parity import ParityRules
    from deploy.progress import Progress
    from edge.bundle import Bundle

_GATE_SEED = 7919  # apart from every seed that training draws defects with
_GATE_SCANS = 120
_COMMISSIONING = 16


def export_depth(
    path: Path, out: Path, *, precision: str = "auto", rules: ParityRules | None = None, progress: Progress
) -> Bundle:
    """Export, prove and pack a depth run, in float32: lengths of a metre and of a noise floor do not share 8 bits.

    Args:
        path: run folder.
        out: bundle folder to write; must not exist or be empty.
        precision: ``auto`` or ``float32``.
        rules: limits of the parity gate; None takes those that every bundle for a line must pass.
        progress: progress function.

    Raises:
        UsageError: int8 is asked for, or ``out`` is not empty.
        DataError: ``path`` is no depth run, or its modules do not export.
        GateError: the parity gate refused; its figures are in the message.
    """
    if precision not in {"auto", "float32"}:
        raise UsageError(f"--precision {precision}: a depth bundle is float32; give auto or float32")
    run = DepthRun.load(path)
    record = run.record
    source = Defects(run.holdout)
    repeats = -(-_GATE_SCANS // len(run.holdout))

    def defects(contrast: float) -> npt.NDArray[np.float32]:
        seed = record.seed + _GATE_SEED
        return source.make(seed=seed, repeats=repeats, strength=contrast * PLAIN_STRENGTH)[0]

    with tempfile.TemporaryDirectory(prefix="lineward-") as scratch:
        file = Path(scratch) / "trunk.onnx"
        progress("depth trunk", 0, 1)
        found = export_fixed_trunk(run.trunk, file, shape=record.preprocessing.tile_shape)
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
                train_images=record.train_scans,
                calibration_images=len(run.holdout),
                versions=record.versions,
            ),
            holdout=run.holdout,
            groups=tuple(run.groups.tolist()),
            make_defects=defects,
            modality=Modality.DEPTH,
            depth=record.depth,
            jitter=jittered,
            commissioning=run.holdout[:_COMMISSIONING],
            commissioning_groups=tuple(run.groups[:_COMMISSIONING].tolist()),
            trunk_files=TrunkFiles(float32=file, int8=file, id=found),
            precisions=(Precision.FLOAT32,),
            optional=(),
            metrics={f"synthetic_{name}": value for name, value in record.validation.items()},
            seed=record.seed,
            progress=progress,
            **({} if rules is None else {"rules": rules}),
        )
        return pack(request, out)
