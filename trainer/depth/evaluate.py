"""A depth run or bundle on labelled scans: figures, and shaded scans with heat maps for the report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deploy.evaluation import Evaluation, Picture, Subject
from edge.capture.scan_files import read_organised
from edge.errors import DataError
from edge.inference.depth import within_range
from edge.judgement.threshold import fit_threshold
from trainer.data.folder import content_hash
from trainer.data.scan_folder import load_scan_mask, read_scan_folder
from trainer.depth.geometry import PlaneFit
from trainer.evaluation.protocol import LabelledImage
from trainer.evaluation.protocol import evaluate as measure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import DepthLayout
    from edge.inference.detector import Detector
    from trainer.data.folder import Sample
    from trainer.depth.run import DepthRun

    Map = npt.NDArray[np.float32]

_LIGHT = np.array((0.45, 0.55, 0.70), np.float32)
_LIGHT /= np.linalg.norm(_LIGHT)
_GROUND, _AMBIENT = 32, 0.18


def shaded_scan(xyz: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Draw an organised scan lit from above, uint8 [H, W, 3] BGR; dark grey where nothing was measured.

    Args:
        xyz: float32 [H, W, 3], metres, NaN where invalid.
    """
    valid = np.isfinite(xyz).all(axis=2)
    middle = xyz[valid].mean(axis=0) if valid.any() else np.zeros(3, np.float32)
    points = torch.from_numpy(np.where(valid[..., None], xyz - middle, 0.0).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        normals = PlaneFit(2)(points, torch.from_numpy(valid.astype(np.float32))[None, None]).normal
    lit = np.clip(-(normals[0].permute(1, 2, 0).numpy() @ _LIGHT), 0.0, 1.0)
    grey = np.where(valid, np.rint(255 * (_AMBIENT + (1 - _AMBIENT) * lit)), _GROUND)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def evaluate_depth_run(
    run: DepthRun, data: Path, alpha: float, progress: Progress
) -> tuple[Evaluation, dict[str, dict[str, Any]]]:
    """Measure a depth run on the labelled scans of a folder; see :func:`trainer.evaluation.command.evaluate`.

    Raises:
        DataError: the folder has no test scans, or one cannot be read.
    """
    record = run.record
    found = _measure(
        run.judge,
        data,
        record.depth,
        progress,
        preprocessing=record.preprocessing,
        pooling=record.pooling,
        threshold=fit_threshold(run.holdout_scores(), run.groups, alpha),
        subject=Subject(record.product, record.method, "torch", "float32"),
    )
    fields = {"preset", "seed", "train_scans", "data_sha256", "validation", "versions", "created", "unit_m", "depth"}
    return found, {"Provenance": record.model_dump(mode="json", include=fields), **_test_data(data)}


def evaluate_depth_bundle(
    detector: Detector, data: Path, alpha: float, progress: Progress
) -> tuple[Evaluation, dict[str, dict[str, Any]]]:
    """Measure a depth bundle on the labelled scans of a folder, as the engine of a box.

    Raises:
        DataError: the folder has no test scans, or one cannot be read.
        BundleError: the bundle is not calibrated for the engine and precision.
    """
    bundle, manifest, status = detector.bundle, detector.bundle.manifest, detector.status
    assert manifest.depth is not None
    calibration = bundle.calibration(status.engine, status.precision)
    found = _measure(
        detector.map_of_canvas,
        data,
        manifest.depth,
        progress,
        preprocessing=manifest.preprocessing,
        pooling=manifest.pooling,
        threshold=fit_threshold(calibration.scores, calibration.groups, alpha),
        subject=Subject(manifest.product, manifest.method, status.engine.value, status.precision.value),
    )
    identity = {"bundle": bundle.id, "created": manifest.created.isoformat(), "depth": manifest.depth.model_dump()}
    details = {"Provenance": identity | manifest.provenance.model_dump(mode="json"), "Parity": manifest.parity}
    return found, {**details, **_test_data(data)}


def labelled_scan(sample: Sample) -> LabelledImage:
    """Take a scan of a folder; ``load`` gives float32 [H, W, 3] in metres."""
    shape = read_organised(sample.path).shape[:2]
    known = load_scan_mask(sample, shape) is not None

    def mask(wanted: tuple[int, int]) -> npt.NDArray[np.bool_]:
        found = load_scan_mask(sample, wanted)
        assert found is not None
        return found

    return LabelledImage(
        name=sample.name,
        label=sample.label,
        anomalous=sample.anomalous,
        group=sample.group,
        condition="",
        load=lambda: read_organised(sample.path),  # type: ignore[arg-type,return-value]
        load_mask=mask if known else None,
    )


def _measure(
    judge: Callable[[Map], Map],
    data: Path,
    layout: DepthLayout,
    progress: Progress,
    **detector: Any,  # noqa: ANN401 (handed on)
) -> Evaluation:
    samples = read_scan_folder(data).test
    if not samples:
        raise DataError(f"{data / 'test'}: no test scans; add test/good and test/<kind of defect>")

    def ranged(canvas: npt.NDArray[Any]) -> Map:
        inside = np.array(canvas, np.float32)
        within_range(inside, layout)
        return judge(inside)

    found = measure(ranged, [labelled_scan(sample) for sample in samples], progress=progress, **detector)
    return replace(
        found,
        found=tuple(map(_shaded, found.found)),
        missed=tuple(map(_shaded, found.missed)),
        alarming=tuple(map(_shaded, found.alarming)),
    )


def _shaded(picture: Picture) -> Picture:
    return replace(picture, image=shaded_scan(np.asarray(picture.image, np.float32)))


def _test_data(data: Path) -> dict[str, dict[str, Any]]:
    test = read_scan_folder(data).test
    return {"Test data": {"folder": str(data), "sha256": content_hash(test), "scans": len(test)}}
