"""The signals' part of `lineward train` and `lineward evaluate`; the command line itself is in trainer/cli.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console

from edge.bundle import MANIFEST, Modality
from edge.errors import UsageError
from trainer.progress import progress_bars
from trainer.signals.fit import train
from trainer.signals.ptbxl import WINDOW_S, is_ptbxl
from trainer.signals.runs import SignalRun, is_signal_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_WINDOW_S = 2.0


def train_signal(
    *,
    method: str,
    data: Sequence[Path],
    out: Path,
    window_s: float | None,
    hop_s: float | None,
    low_hz: float | None,
    high_hz: float | None,
    preset: str,
    seed: int,
    product: Sequence[str] | None,
    device: str,
    settings: Mapping[str, object],
) -> SignalRun:
    """Train on recordings and print what came of it; the arguments are those of :func:`trainer.signals.fit.train`.

    A window is 2 s where None is given, of PTB-XL a whole record.

    Raises:
        UsageError: recordings of several products, or a setting is out of range.
        DataError: the recordings cannot be used.
    """
    if len(data) > 1 or len(product or ()) > 1:
        raise UsageError("--data: a detector of signals learns one product; give one folder of recordings")
    if window_s is None:
        window_s = WINDOW_S if is_ptbxl(data[0]) else _WINDOW_S
    with progress_bars() as progress:
        run = train(
            method=method,
            data=data[0],
            out=out,
            window_s=window_s,
            hop_s=hop_s,
            low_hz=low_hz,
            high_hz=high_hz,
            preset=preset,
            seed=seed,
            product=product[0] if product else None,
            device=device,
            settings=settings,
            progress=progress,
        )
    record = run.record
    layout = record.signal
    Console(stderr=True).print(
        f"{record.method} for {record.product}: {record.train_windows} good windows of {layout.window_s:g} s, "
        f"{len(layout.channels)} channels at {layout.rate_hz:g} Hz, {record.seconds} s, "
        f"AUROC {max(record.validation.values()):.3f} on synthetic anomalies -> {out}"
    )
    return run


def evaluates_signal(run: Path | None, bundle: Path | None) -> bool:
    """Whether `lineward evaluate` was given a run or a bundle of a signal; what cannot be read is none."""
    if run is not None:
        return is_signal_run(run)
    try:
        content = {} if bundle is None else json.loads((bundle / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("modality") == Modality.SIGNAL.value
