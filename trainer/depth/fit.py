"""Training a depth detector: a folder of good scans in, a run folder out. Test scans are never read.

Split off a hold-out, find the scans' own units, fill banks with local geometry, choose the pooling rule on synthetic
defects of eight times the noise floor, save.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from edge.bundle import DepthLayout, Preprocessing, Resize
from edge.capture.scan_files import read_organised
from edge.errors import CaptureError, DataError, UsageError
from edge.inference.depth import depth_canvas, valid_share, within_range
from edge.inference.preprocessing import cut_tiles, join_maps
from trainer.data.folder import content_hash
from trainer.data.scan_folder import read_scan_folder
from trainer.depth.defects import Defects
from trainer.depth.geometry import GeometryTrunk
from trainer.depth.method import DepthConfig, fit_depth
from trainer.depth.run import DepthRecord, DepthRun
from trainer.fit import choose_pooling, hold_out, seed_everything, versions
from trainer.methods.base import Features

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Pooling
    from trainer.data.folder import Sample
    from trainer.depth.method import DepthMemoryHead

    Canvases = npt.NDArray[np.float32]

DEFAULT_SIZE = (224, 224)
JUMP_PITCHES = 12.0
"""A surface that falls by more than so many pitches per point is seen at under five degrees: two surfaces."""

_BATCH = 4
_VALIDATION_DEFECTS = 96
_UNIT_SCANS = 5
_PRESETS = {"quick": DepthConfig(), "full": DepthConfig(rows=2000, candidates=60_000)}


class Fitted(NamedTuple):
    """What learning from canvases gives.

    Attributes:
        trunk: in the scans' own units.
        head: with its banks.
        pooling: chosen on the hold-out.
        validation: I-AUROC of every rule.
        pitch_m: middle distance of neighbouring points, metres.
    """

    trunk: GeometryTrunk
    head: DepthMemoryHead
    pooling: Pooling
    validation: dict[str, float]
    pitch_m: float


def train_depth(
    *,
    data: Path,
    out: Path,
    preset: str = "quick",
    seed: int = 0,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    near_m: float = 0.0,
    far_m: float | None = None,
    product: str | None = None,
    settings: Mapping[str, object] | None = None,
    progress: Progress,
) -> DepthRun:
    """Train a depth detector on one product.

    Args:
        data: folder of organised scans, see :func:`trainer.data.scan_folder.read_scan_folder`; at least 12 good ones.
        out: run folder to write.
        preset: ``quick`` or ``full``.
        seed: of every random choice.
        size: canvas height and width in points, multiples of 32; None is 224 x 224.
        crop: x, y, width, height of the part in the sensor's grid.
        near_m: points nearer than this, along z, are not of the part.
        far_m: points further than this are not of the part; give it where the part stands before something.
        product: name of the product; the folder's name if None.
        settings: of the detector, by name, in place of the preset's.
        progress: progress function.

    Raises:
        UsageError: a value is out of range or unknown, or ``out`` holds other files.
        DataError: the folder or a scan cannot be used, or the run cannot be written.
        MissingExtraError: what reads the scans is not installed.
    """
    started = time.monotonic()
    if preset not in _PRESETS:
        raise UsageError(f"--preset {preset}: unknown; choose one of {', '.join(_PRESETS)}")
    config = _configured(_PRESETS[preset], settings or {})
    preprocessing = depth_preprocessing(size, crop)
    limits = _layout(near_m, far_m)
    name = data.resolve().name if product is None else product
    if not name:
        raise UsageError("--product: empty; give the product a name")
    seed_everything(seed)
    DepthRun.refuse_foreign(out)
    samples = read_scan_folder(data).train
    split = hold_out(data, samples, seed)
    canvases = load_scans(split.fit, preprocessing, limits, progress=progress, what="read good scans")
    holdout = load_scans(split.holdout, preprocessing, limits, progress=progress, what="read hold-out")
    fitted = fit_canvases(canvases, holdout, preprocessing, config, seed=seed, progress=progress)
    share = min(valid_share(canvas) for canvas in (*canvases, *holdout))
    record = DepthRecord(
        preset=preset,
        config=config,
        product=name,
        preprocessing=preprocessing,
        # Half of what the emptiest good scan shows: less is no view of the part.
        depth=limits.model_copy(update={"pitch_m": fitted.pitch_m, "min_valid": share / 2}),
        unit_m=float(fitted.trunk.unit),
        jump_m=float(fitted.trunk.jump),
        pooling=fitted.pooling,
        seed=seed,
        data_sha256=content_hash(samples),
        train_scans=len(split.fit),
        validation=fitted.validation,
        seconds=round(time.monotonic() - started, 1),
        versions=versions(),
        created=datetime.now(timezone.utc),
    )
    groups = np.array([sample.group for sample in split.holdout], np.str_)
    run = DepthRun(out, record, fitted.trunk, fitted.head, holdout, groups)
    run.save()
    return run


def fit_canvases(
    canvases: Canvases,
    holdout: Canvases,
    preprocessing: Preprocessing,
    config: DepthConfig,
    *,
    seed: int,
    progress: Progress,
) -> Fitted:
    """Learn from good canvases and choose the pooling rule on others with synthetic defects.

    Args:
        canvases: float32 [n, canvas_height, canvas_width, 3], metres, NaN where invalid, n >= 2.
        holdout: the same, not learned from.
        preprocessing: how canvases are cut into tiles.
        config: settings.
        seed: of every random choice.
        progress: progress function.

    Raises:
        DataError: too little of the scans was measured.
    """
    defects = Defects(holdout)
    pitch = grid_pitch(canvases)
    unit = Defects(canvases[:: max(1, len(canvases) // _UNIT_SCANS)]).noise_m
    trunk = GeometryTrunk(unit_m=unit, jump_m=JUMP_PITCHES * pitch).eval().requires_grad_(requires_grad=False)
    features = depth_features(trunk, canvases, preprocessing, progress=progress, what="geometry")
    head = fit_depth(features, config, torch.Generator().manual_seed(seed))
    repeats = max(1, round(_VALIDATION_DEFECTS / len(holdout)))
    defective, _ = defects.make(seed=seed, repeats=repeats)
    pooling, validation = choose_pooling(
        depth_maps(trunk, head, holdout, preprocessing, progress=progress, what="hold-out"),
        depth_maps(trunk, head, defective, preprocessing, progress=progress, what="synthetic defects"),
    )
    return Fitted(trunk, head, pooling, validation, pitch)


def load_scans(
    samples: Sequence[Sample], preprocessing: Preprocessing, layout: DepthLayout, *, progress: Progress, what: str
) -> Canvases:
    """Read scans as the box would see them: float32 [n, canvas_height, canvas_width, 3], metres, NaN where invalid.

    Raises:
        DataError: a scan cannot be read, has no rows and columns, or is smaller than the crop.
        MissingExtraError: what reads it is not installed.
    """
    canvases = np.empty((len(samples), *preprocessing.canvas_shape), np.float32)
    for index, sample in enumerate(samples):
        try:
            canvases[index] = depth_canvas(read_organised(sample.path), preprocessing)
        except CaptureError as error:
            raise DataError(f"{sample.path}: {error}") from error
        within_range(canvases[index], layout)
        progress(what, index + 1, len(samples))
    return canvases


def depth_features(
    trunk: GeometryTrunk, canvases: Canvases, preprocessing: Preprocessing, *, progress: Progress, what: str
) -> Features:
    """Return the taps of canvases, float16."""
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in trunk.tap_names}
    for start in range(0, len(canvases), _BATCH):
        batch = np.concatenate([cut_tiles(canvas, preprocessing) for canvas in canvases[start : start + _BATCH]])
        with torch.inference_mode():
            for name, tap in zip(trunk.tap_names, trunk(torch.from_numpy(batch)), strict=True):
                kept[name].append(tap.half())
        progress(what, min(start + _BATCH, len(canvases)), len(canvases))
    tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
    return Features({name: torch.cat(taps) for name, taps in kept.items()}, tiles, np.arange(len(canvases)).astype(str))


def depth_maps(
    trunk: GeometryTrunk,
    head: DepthMemoryHead,
    canvases: Canvases,
    preprocessing: Preprocessing,
    *,
    progress: Progress,
    what: str,
) -> npt.NDArray[np.float32]:
    """Return the joined raw maps float32 [n, h, w] of canvases."""
    features = depth_features(trunk, canvases, preprocessing, progress=progress, what=what)
    tiles = features.tiles_per_image
    with torch.inference_mode():
        batches = features.batches(head.tap_names, _BATCH, device=torch.device("cpu"))
        maps = np.concatenate([head(*taps)[0].numpy() for taps in batches])
    return np.stack(
        [join_maps(maps[i : i + tiles], preprocessing, head.map_stride) for i in range(0, len(maps), tiles)]
    )


def grid_pitch(canvases: Canvases) -> float:
    """Return the middle distance of horizontal neighbours that were both measured, metres.

    Raises:
        DataError: there are none.
    """
    steps = np.linalg.norm(np.diff(canvases, axis=2), axis=-1)
    known = steps[np.isfinite(steps)]
    if not len(known):
        raise DataError("no two neighbouring points of the good scans were measured; check their format and units")
    return float(np.median(known))


def depth_preprocessing(size: tuple[int, int] | None, crop: tuple[int, int, int, int] | None) -> Preprocessing:
    """Return the preprocessing of a depth detector.

    Raises:
        UsageError: a value is out of range; the message names it.
    """
    height, width = size or DEFAULT_SIZE
    box = None if crop is None else dict(zip(("x", "y", "w", "h"), crop, strict=True))
    try:
        return Preprocessing.model_validate({"height": height, "width": width, "crop": box, "resize": Resize.VALID})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error


def _layout(near_m: float, far_m: float | None) -> DepthLayout:
    try:
        return DepthLayout(pitch_m=1.0, near_m=near_m, far_m=far_m)
    except ValidationError as error:
        raise UsageError(f"--near {near_m:g} --far {far_m}: {error.errors()[0]['msg']}") from error


def _configured(config: DepthConfig, settings: Mapping[str, object]) -> DepthConfig:
    try:
        return DepthConfig.model_validate({**config.model_dump(), **settings})
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(DepthConfig.model_fields)
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"--set {where}: {first['msg']}; the settings of depth_memory are {known}") from error
