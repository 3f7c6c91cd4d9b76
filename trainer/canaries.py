"""Canaries for an aggregator: patch rows of synthesised defects and of good parts, through a bundle's own engine.

It must not know updates nor how canaries are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploy.aggregator.canaries import Canaries
from deploy.aggregator.canaries import write_canaries as write_file
from deploy.progress import no_progress
from edge.errors import DataError, UsageError
from edge.inference.detector import Detector
from edge.inference.preprocessing import cut_tiles
from edge.inference.state import stored_state
from edge.memory.banks import packed_banks
from edge.memory.search import nearest
from trainer.data.folder import content_hash, read_folder
from trainer.features import load_canvases
from trainer.fit import hold_out
from trainer.methods.feddymem.sources import covered
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Bundle, Engine, Precision
    from trainer.data.folder import Sample

    Rows = npt.NDArray[np.float32]

ALARM = 0.99
"""Quantile of the distances of held-out good patches above which a patch alarms."""

_IMAGES = 100  # held-out images at most, and about as many with a defect
_MOST_ROWS = 20_000  # of each kind
# Apart from the seeds of training's validation and of the parity gate.
_DEFECT_SEED = 104_729


def write_canaries(
    bundle: Bundle,
    data: Path,
    out: Path,
    *,
    engine: Engine | None = None,
    precision: Precision | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Canaries:
    """Synthesise defects on good images that the bundle has not learned from, and write their patch rows.

    Of the folder that the bundle was trained on these are the images that training held out; of any other folder all.
    A defect row is a patch at least half covered by a defect that lies farther from the bundle's memory than
    :data:`ALARM` of the good patches; that distance is the canaries' threshold.

    Args:
        bundle: of a method whose memory a box may replace.
        data: folder in MVTec layout; only train/good is read.
        out: npz file to write; its folder is made.
        engine: that embeds; None takes what a box would take.
        precision: whose embedding space the rows are in; None takes what a box would take.
        seed: of the defects.
        progress: progress function.

    Returns:
        What was written.

    Raises:
        UsageError: the bundle's method has no memory to replace.
        DataError: the folder cannot be used, no defect alarms, or ``out`` cannot be written.
        EngineError: the engine does not reproduce the bundle.
    """
    manifest = bundle.manifest
    if manifest.memory is None:
        raise UsageError(
            f"{bundle.path}: method {manifest.method} has no memory that boxes share; canaries are for feddymem"
        )
    detector = Detector.open(bundle, engine=engine, precision=precision)
    # A fallback would put rows of another space into the file.
    if detector.status.fallback_reason:
        raise DataError(f"{bundle.path}: {detector.status.fallback_reason}; choose --engine or --precision")
    canvases = load_canvases(_unseen(bundle, data), manifest.preprocessing, progress=progress, what="read good images")
    repeats = max(1, _IMAGES // len(canvases))
    defective, masks = make_defects(canvases, seed=seed + _DEFECT_SEED, repeats=repeats)
    bank = np.concatenate(packed_banks(stored_state(bundle), manifest.memory).rows)
    good = _rows(detector, canvases, progress, "embed good images")
    distances = np.sqrt(nearest(good, bank)[0])
    threshold = float(np.quantile(distances, ALARM))
    tiles = np.concatenate([cut_tiles(mask.astype(np.uint8), manifest.preprocessing) for mask in masks])
    inside = covered(tiles.astype(np.bool_))
    defect = _rows(detector, defective, progress, "embed defects")[inside]
    alarming = defect[np.sqrt(nearest(defect, bank)[0]) > threshold] if len(defect) else defect
    if not len(alarming):
        raise DataError(f"{data}: no synthetic defect alarms under {bundle.path}; give images of that product")
    random = np.random.default_rng(seed)
    canaries = Canaries(
        embedding_id=manifest.embedding_id[detector.status.precision],
        product=manifest.product,
        defect=_drawn(alarming, random),
        good=_drawn(good, random),
        threshold=threshold,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out.parent}: cannot be made ({error.strerror}); choose another --out") from error
    write_file(out, canaries)
    return canaries


def _unseen(bundle: Bundle, data: Path) -> Sequence[Sample]:
    """Return good images that the bundle's memory does not hold, evenly drawn."""
    samples, provenance = read_folder(data).train, bundle.manifest.provenance
    if content_hash(samples) == provenance.data_sha256:
        samples = hold_out(data, samples, provenance.seed).holdout
    if not samples:
        raise DataError(f"{data}: no images of good parts in train/good; add some")
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(_IMAGES, len(samples))).round().astype(int))
    return [samples[index] for index in chosen]


def _rows(detector: Detector, canvases: npt.NDArray[np.uint8], progress: Progress, what: str) -> Rows:
    """Return the patch rows float32 [n * tiles * L, D] of canvases."""
    found = []
    for index, canvas in enumerate(canvases):
        embedding = detector.embeddings_of_canvas(canvas)
        found.append(embedding.reshape(-1, embedding.shape[-1]))
        progress(what, index + 1, len(canvases))
    return np.concatenate(found)


def _drawn(rows: Rows, random: np.random.Generator) -> Rows:
    return rows[np.sort(random.permutation(len(rows))[:_MOST_ROWS])].astype(np.float32)
