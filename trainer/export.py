"""From a run folder to a bundle: hands deploy the modules and the held-out data that it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deploy.pack import BundleRequest, pack
from deploy.parity import ParityRules
from edge.bundle import Precision, Provenance
from edge.errors import UsageError
from trainer.data.generic import generic_canvases
from trainer.runs import Run
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Bundle

_BOTH = (Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8)
PRECISIONS = {
    "auto": (_BOTH, (Precision.BFLOAT16, Precision.INT8)),
    "int8": (_BOTH, (Precision.BFLOAT16,)),
    "float32": ((Precision.FLOAT32, Precision.BFLOAT16), (Precision.BFLOAT16,)),
}
"""What ``--precision`` packs, and which of it may be left out."""

# A box whose memory changes sets its threshold again from these alone, so it needs as many as the bytes allow.
_COMMISSIONING_IMAGES, _MEMORY_COMMISSIONING_IMAGES = 16, 64
# Of each of several products, whatever the method: its box sets the thresholds of each from these alone.
_COMMISSIONING_EACH = 8
# The gate lowers the contrast until float32 finds 80 to 95 % of the pairs: at full contrast they must be plain on any
# product, so they are large and several.
_GATE_SIZE, _GATE_DEFECTS, _GATE_IMAGES = (0.15, 0.4), 3, 200
# Of each of several products: what is measured of one must mean something.
_GATE_EACH = 40
# Apart from every seed that training draws defects with.
_GATE_SEED = 7919


def export_run(
    path: Path, out: Path, *, precision: str = "auto", rules: ParityRules | None = None, progress: Progress
) -> Bundle:
    """Export, quantise, prove and pack a run.

    Args:
        path: run folder.
        out: bundle folder to write; must not exist or be empty.
        precision: ``auto`` packs int8 beside float32 and leaves int8 out, with its figures in the manifest, where the
            parity gate refuses it; ``int8`` refuses the bundle then; ``float32`` does not try.
        rules: limits and sample sizes of the parity gate; None takes those that every bundle for a line must pass.
        progress: progress function.

    Raises:
        UsageError: unknown precision, or ``out`` is not empty.
        DataError: ``path`` is no run.
        GateError: the parity gate refused a precision that must pass; its figures are in the message.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: unknown; choose one of {', '.join(PRECISIONS)}")
    wanted, optional = PRECISIONS[precision]
    run = Run.load(path)
    record = run.record
    commissioned, several = _commissioned(run), len(record.products)
    repeats = -(-max(_GATE_IMAGES, _GATE_EACH * several) // len(run.holdout))

    def defects(contrast: float) -> npt.NDArray[np.uint8]:
        return make_defects(
            run.holdout,
            seed=record.seed + _GATE_SEED,
            contrast=contrast,
            repeats=repeats,
            size=_GATE_SIZE,
            defects=_GATE_DEFECTS,
        )[0]

    request = BundleRequest(
        trunk=run.trunk,
        head=run.head,
        method=record.method,
        product=record.product,
        products=record.products,
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
        holdout_subclasses=tuple(run.holdout_subclasses.tolist()),
        reference=run.reference,
        reference_subclasses=tuple(run.reference_subclasses.tolist()),
        make_defects=defects,
        commissioning=run.holdout[commissioned],
        commissioning_groups=tuple(run.holdout_groups[commissioned].tolist()),
        commissioning_products=tuple(run.holdout_subclasses[commissioned].tolist()) if several else (),
        generic=generic_canvases(),
        precisions=wanted,
        optional=optional,
        rules=rules or _rules(several),
        metrics={f"synthetic_{name}": value for name, value in record.validation.items()},
        seed=record.seed,
        progress=progress,
    )
    return pack(request, out)


def _commissioned(run: Run) -> npt.NDArray[np.intp]:
    """Return the held-out images that a box recalibrates with, evenly drawn where there are more than it may carry."""
    memory = getattr(run.head, "memory_layout", None) is not None
    if run.record.products:
        shown = run.holdout_products
        each = max(_COMMISSIONING_EACH, (_MEMORY_COMMISSIONING_IMAGES if memory else 0) // len(run.record.products))
        own = [np.flatnonzero(shown == product) for product in range(len(run.record.products))]
        return np.sort(np.concatenate([rows[_evenly(len(rows), each)] for rows in own]))
    most = min(_MEMORY_COMMISSIONING_IMAGES if memory else _COMMISSIONING_IMAGES, len(run.holdout))
    return _evenly(len(run.holdout), most) if memory else np.arange(most)


def _evenly(count: int, most: int) -> npt.NDArray[np.intp]:
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.intp))


def _rules(products: int) -> ParityRules:
    """Return the gate's rules; of several products it looks at more images, so that each has its share."""
    usual = ParityRules()
    least = _GATE_EACH * products
    return replace(
        usual,
        good_samples=max(usual.good_samples, least),
        defect_samples=max(usual.defect_samples, least),
    )


def refused(bundle: Bundle) -> list[str]:
    """Return what the parity gate left out of a bundle, each with its figure."""
    return [text for path in bundle.manifest.parity["paths"] for text in path["refusals"]]
