"""Training on signals: recordings in, a run folder out. The same few steps for every method.

Windows in which everybody says nothing is wrong are cut; the last of each recording are held out, anomalies of no
product in particular are put into them, the pooling rule is chosen there. Test recordings are not read.
"""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import ValidationError

from deploy.metrics import image_auroc
from deploy.parity import LEAST_GOOD_IMAGES
from deploy.running import pool_all
from edge.bundle import Pooling, SignalLayout
from edge.errors import DataError, UsageError
from trainer.fit import choose_device, configured, seed_everything, versions
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.mmae_ecg.model import SIGNAL
from trainer.signals.defects import make_defects
from trainer.signals.reading import training_part
from trainer.signals.recording import Windows, cut_windows, one_kind
from trainer.signals.registry import get
from trainer.signals.runs import SignalRecord, SignalRun, maps_of
from trainer.signals.trunk import SignalTrunk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from trainer.signals.recording import Recording

HOLDOUT_SHARE = 0.2
# Training windows begin so many times in a window: a shift is no other signal, but the network does not know.
_BEGINS = 20
_VALIDATION_DEFECTS = 200
# Held-out windows overlap by a half at most: more would say the same again.
_HOLDOUT_BEGINS = 2
_HOLDOUT_MOST = 400
POOLING_SHARES = (0.0, 0.01, 0.05, 0.2, 1.0)
"""Shares of the map's cells whose mean may become the score; the choice is made on the hold-out."""


def layout_for(
    recordings: Sequence[Recording],
    *,
    window_s: float,
    hop_s: float | None,
    low_hz: float | None = None,
    high_hz: float | None = None,
) -> SignalLayout:
    """Return what a source must give for a detector of these recordings.

    Args:
        recordings: of one kind.
        window_s: seconds that are judged at once.
        hop_s: seconds from one window to the next; None for half a window.
        low_hz: what is slower is taken off; None for nothing.
        high_hz: what is faster is taken off; None for nothing.

    Raises:
        DataError: the recordings differ.
        UsageError: a length is out of range.
    """
    channels, unit, rate = one_kind(recordings)
    hop_s = window_s / 2 if hop_s is None else hop_s
    try:
        return SignalLayout(
            channels=channels, unit=unit, rate_hz=rate, window=round(window_s * rate),
            hop=max(1, round(hop_s * rate)), low_hz=low_hz, high_hz=high_hz,
        )  # fmt: skip
    except (OverflowError, ValueError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = " ".join((*map(str, first["loc"]), first["msg"]))
        raise UsageError(f"--window {window_s:g}, --hop {hop_s:g} at {rate:g} Hz: {why}") from error


def split_windows(recordings: Sequence[Recording], window: int) -> tuple[Windows, Windows]:
    """Return good windows to learn from and good windows to validate with: the last fifth of each recording's time.

    No sample is in both. Recordings of a single window each are held out whole.

    Raises:
        DataError: too few good windows.
    """
    if all(one.samples.shape[1] < (LEAST_GOOD_IMAGES + 1) * window for one in recordings):
        count = max(1, round(HOLDOUT_SHARE * len(recordings)))
        parts = (recordings[:-count], recordings[-count:])
    else:
        share = 1 - HOLDOUT_SHARE
        parts = ([one.part(0, share) for one in recordings], [one.part(share, 1) for one in recordings])
    cut = [
        cut_windows(part, window, max(1, window // begins))
        for part, begins in zip(parts, (_BEGINS, _HOLDOUT_BEGINS), strict=True)
    ]
    train, holdout = (one.chosen(~one.anomalous) for one in cut)
    if len(holdout) > _HOLDOUT_MOST:
        holdout = holdout.chosen(np.linspace(0, len(holdout) - 1, _HOLDOUT_MOST).round().astype(np.intp))
    if min(len(train), len(holdout)) < LEAST_GOOD_IMAGES:
        raise DataError(
            f"{len(train)} good windows to learn from and {len(holdout)} to calibrate with are too few: each needs at "
            f"least {LEAST_GOOD_IMAGES}; give longer recordings, or a shorter --window"
        )
    return train, holdout


def train(
    *,
    method: str,
    data: Path,
    out: Path,
    window_s: float,
    hop_s: float | None = None,
    low_hz: float | None = None,
    high_hz: float | None = None,
    preset: str = "quick",
    seed: int = 0,
    product: str | None = None,
    device: str = "auto",
    settings: Mapping[str, object] | None = None,
    progress: Progress,
) -> SignalRun:
    """Train one method on the recordings of one product.

    Args:
        method: name in the registry of signals.
        data: recording or folder of recordings; see :func:`trainer.signals.reading.training_part`.
        out: run folder to write; must not hold anything but an earlier run.
        window_s: seconds that are judged at once.
        hop_s: seconds from one window to the next on a box; None for half a window.
        low_hz: what is slower is taken off before anything is judged; None for nothing.
        high_hz: what is faster, likewise.
        preset: ``quick`` or ``full``.
        seed: of every random choice.
        product: name of the product; the data's name if None.
        device: ``auto``, ``cpu`` or ``cuda``.
        settings: of the method, in place of the preset's.
        progress: progress function.

    Raises:
        UsageError: unknown method, preset, setting or device, or ``out`` holds other files.
        DataError: the recordings cannot be used, are too few, or the run cannot be written.
    """
    started = time.monotonic()
    chosen, torch_device = get(method), choose_device(device)
    config = configured(chosen.config(preset), method, settings or {})
    name = data.resolve().stem if product is None else product
    if not name:
        raise UsageError("--product: empty; give the product a name")
    seed_everything(seed)
    SignalRun.refuse_foreign(out)
    recordings = training_part(data)
    layout = layout_for(recordings, window_s=window_s, hop_s=hop_s, low_hz=low_hz, high_hz=high_hz)
    windows, holdout = split_windows(recordings, layout.window)
    trunk = SignalTrunk.of(windows.values, layout)
    defective, masks = make_defects(
        holdout.values, seed=seed, repeats=max(1, round(_VALIDATION_DEFECTS / len(holdout)))
    )
    context = FitContext(
        features=features_of(trunk, windows),
        images=windows.values,
        extract=lambda values: Features({SIGNAL: trunk(torch.from_numpy(values))[0]}, 1, _unnamed(len(values))),
        validation=Validation(
            good=features_of(trunk, holdout),
            defective=Features({SIGNAL: trunk(torch.from_numpy(defective))[0]}, 1, _unnamed(len(defective))),
            masks=masks,
        ),
        seed=seed,
        device=torch_device,
        progress=progress,
    )
    head = chosen.fit(context, config)
    pooling, validation = choose_pooling(maps_of(trunk, head, holdout.values), maps_of(trunk, head, defective))
    record = SignalRecord(
        method=method,
        preset=preset,
        config=config.model_dump(mode="json"),
        product=name,
        signal=layout,
        pooling=pooling,
        seed=seed,
        data_sha256=content_hash(recordings),
        train_windows=len(windows),
        validation=validation,
        loss=float(head.loss) if isinstance(getattr(head, "loss", None), torch.Tensor) else None,
        seconds=round(time.monotonic() - started, 1),
        versions=versions(),
        created=datetime.now(timezone.utc),
    )
    run = SignalRun(out, record, trunk, head, holdout.values, holdout.groups)
    run.save()
    return run


def features_of(trunk: SignalTrunk, windows: Windows) -> Features:
    """Return the tap of windows, as methods get it."""
    return Features({SIGNAL: trunk(torch.from_numpy(windows.values))[0]}, 1, windows.groups)


def choose_pooling(
    good: npt.NDArray[np.float32], defective: npt.NDArray[np.float32]
) -> tuple[Pooling, dict[str, float]]:
    """Choose how many of the highest cells are averaged, by AUROC on held-out windows with and without anomalies.

    Returns:
        The rule (the fewest cells among those within 0.002 of the best) and the AUROC of every candidate.
    """
    labels = np.r_[np.zeros(len(good), bool), np.ones(len(defective), bool)]
    found = {}
    for cells in sorted({max(1, round(share * good[0].size)) for share in POOLING_SHARES}):
        rule = Pooling(cells=cells)
        found[cells] = float(image_auroc(labels, np.r_[pool_all(good, rule), pool_all(defective, rule)]) or 0.0)
    best = max(found.values())
    cells = min(count for count, value in found.items() if value >= best - 0.002)
    return Pooling(cells=cells), {f"auroc_{count}_cells": value for count, value in found.items()}


def content_hash(recordings: Sequence[Recording]) -> str:
    """Return the sha256 of recordings: samples and labels."""
    digest = hashlib.sha256()
    for one in recordings:
        digest.update(f"{one.name} {one.samples.shape} {one.rate_hz}".encode())
        digest.update(np.ascontiguousarray(one.samples).tobytes())
        if one.anomalous is not None:
            digest.update(one.anomalous.tobytes())
    return digest.hexdigest()


def _unnamed(count: int) -> npt.NDArray[np.str_]:
    return np.array([str(index) for index in range(count)], np.str_)
