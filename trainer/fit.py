"""Training: a folder of good images in, a run folder out. The same few steps for every method.

Split off a hold-out by group, synthesise defects on it for validation, extract taps, fit the head, choose the
pooling rule on the validation set, save. Test images are never read.
"""

from __future__ import annotations

import platform
import time
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import ValidationError

from deploy.metrics import image_auroc
from edge.bundle import Crop, Pooling, Preprocessing, Tiles
from edge.errors import UsageError
from edge.inference.preprocessing import join_maps
from edge.judgement.score import pool_score
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.folder import content_hash, read_folder, split_holdout
from trainer.features import extract, load_canvases
from trainer.methods.base import Features, FitContext, Head, Progress, Validation
from trainer.methods.registry import get
from trainer.runs import Run, RunRecord
from trainer.synthesis.image2d import synthesise

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

DEFAULT_SIZE = (224, 224)
HOLDOUT_FRACTION = 0.2
HOLDOUT_MINIMUM = 8
HOLDOUT_MAXIMUM = 400
# Shares of the map's cells whose mean may become the image score; the choice is made on the validation set.
POOLING_SHARES = (0.0, 0.002, 0.005, 0.01, 0.02)
_CONTRASTS = (0.5, 0.75, 1.0)


def choose_device(name: str) -> torch.device:
    """Return ``cpu``, ``cuda`` or, for ``auto``, the GPU where there is one.

    Raises:
        UsageError: unknown name, or no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU; install a CUDA build (docs/install.md) or use cpu")
    if name not in {"cpu", "cuda"}:
        raise UsageError(f"--device {name}: unknown; choose auto, cpu or cuda")
    return torch.device(name)


def preprocessing_for(
    *, size: tuple[int, int] | None, tiles: tuple[int, int], overlap: int, crop: tuple[int, int, int, int] | None
) -> Preprocessing:
    """Build the preprocessing that the command line asks for.

    Args:
        size: height and width of the network input in pixels; None is 224 x 224.
        tiles: rows and columns.
        overlap: pixels that neighbouring tiles share.
        crop: x, y, width, height in pixels of the camera frame.

    Raises:
        UsageError: a value is out of range; the message names it.
    """
    height, width = size or DEFAULT_SIZE
    try:
        return Preprocessing(
            height=height,
            width=width,
            tiles=Tiles(rows=tiles[0], cols=tiles[1], overlap=overlap),
            crop=None if crop is None else Crop(x=crop[0], y=crop[1], w=crop[2], h=crop[3]),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "size, tiles, overlap"
        raise UsageError(f"--{where}: {first['msg']}") from error


def make_defects(
    canvases: npt.NDArray[np.uint8], *, seed: int, contrast: float | None = None, repeats: int = 1
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Synthesise one defect on every canvas, ``repeats`` times.

    Args:
        canvases: uint8 [n, H, W, 3].
        seed: the same seed gives the same defects in the same places at every contrast.
        contrast: in (0, 1]; None draws from a fixed set.
        repeats: defects per canvas, each on a copy of its own.

    Returns:
        uint8 [repeats * n, H, W, 3] and their masks bool [repeats * n, H, W].
    """
    images = np.empty((repeats * len(canvases), *canvases.shape[1:]), np.uint8)
    masks = np.empty(images.shape[:3], np.bool_)
    for index in range(len(images)):
        rng = np.random.default_rng((seed, index))
        drawn = float(rng.choice(_CONTRASTS))
        defect = synthesise(canvases[index % len(canvases)], rng=rng, contrast=contrast or drawn)
        images[index], masks[index] = defect.image, defect.mask
    return images, masks


def head_maps(
    head: Head, features: Features, preprocessing: Preprocessing, device: torch.device
) -> npt.NDArray[np.float32]:
    """Return the joined raw maps float32 [n images, h, w] of a head over features."""
    head = head.to(device)
    with torch.inference_mode():
        batches = features.batches(head.tap_names, 32, device=device)
        maps = np.concatenate([head(*taps)[0].cpu().numpy() for taps in batches])
    head.to("cpu")
    tiles, stride = features.tiles_per_image, head.map_stride
    return np.stack([join_maps(maps[i : i + tiles], preprocessing, stride) for i in range(0, len(maps), tiles)])


def choose_pooling(
    good: npt.NDArray[np.float32], defective: npt.NDArray[np.float32]
) -> tuple[Pooling, dict[str, float]]:
    """Choose how many of the highest cells are averaged, by I-AUROC on the validation set.

    Args:
        good: maps float32 [n, h, w] of held-out good images.
        defective: maps float32 [m, h, w] of images with synthetic defects.

    Returns:
        The rule (the fewest cells among those within 0.002 of the best) and the I-AUROC of every candidate.
    """
    cells = sorted({max(1, round(share * good[0].size)) for share in POOLING_SHARES})
    labels = np.r_[np.zeros(len(good), bool), np.ones(len(defective), bool)]
    found: dict[int, float] = {}
    for count in cells:
        rule = Pooling(cells=count)
        scores = np.array([pool_score(m, rule) for m in (*good, *defective)])
        found[count] = float(image_auroc(labels, scores) or 0.0)
    best = max(found.values())
    chosen = min(count for count, value in found.items() if value >= best - 0.002)
    return Pooling(cells=chosen), {f"image_auroc_{count}_cells": value for count, value in found.items()}


def train(
    *,
    method: str,
    data: Path,
    out: Path,
    preset: str = "quick",
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    product: str | None = None,
    device: str = "auto",
    progress: Progress,
) -> Run:
    """Train one method on one product.

    Args:
        method: name in the registry.
        data: folder in MVTec layout; only train/good is read.
        out: run folder to write; must not hold anything but an earlier run.
        preset: ``quick`` or ``full``.
        seed: of every random choice.
        preprocessing: crop, tiles and size; the default is one tile of 224 x 224.
        product: name of the product; the folder's name if None.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: progress function.

    Returns:
        The saved run.

    Raises:
        UsageError: unknown method, preset or device, or ``out`` holds other files.
        DataError: the folder cannot be used.
    """
    started = time.monotonic()
    chosen, torch_device = get(method), choose_device(device)
    config = chosen.config(preset)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not (out / "run.json").exists():
        raise UsageError(f"--out {out}: exists and is no run folder; choose another, nothing was written")
    preprocessing = preprocessing or preprocessing_for(size=None, tiles=(1, 1), overlap=0, crop=None)
    _seed_everything(seed)
    samples = read_folder(data).train
    split = split_holdout(samples, HOLDOUT_FRACTION, seed, HOLDOUT_MINIMUM)
    fit_samples, held = list(split.fit), list(split.holdout)
    if len(held) > HOLDOUT_MAXIMUM:
        fit_samples, held = fit_samples + held[HOLDOUT_MAXIMUM:], held[:HOLDOUT_MAXIMUM]
    trunk = lite0_trunk()

    def features(canvases: npt.NDArray[np.uint8], groups: npt.NDArray[np.str_], what: str) -> Features:
        return extract(
            trunk,
            canvases,
            preprocessing,
            tap_names=chosen.tap_names,
            groups=groups,
            device=torch_device,
            progress=progress,
            what=what,
        )

    canvases = load_canvases(fit_samples, preprocessing, progress=progress, what="read good images")
    holdout = load_canvases(held, preprocessing, progress=progress, what="read hold-out")
    held_groups = _groups(held)
    repeats = max(1, round(120 / len(holdout)))
    defective, masks = make_defects(holdout, seed=seed, repeats=repeats)
    context = FitContext(
        features=features(canvases, _groups(fit_samples), "features"),
        validation=Validation(
            good=features(holdout, held_groups, "features of hold-out"),
            defective=features(defective, np.tile(held_groups, repeats), "features of synthetic defects"),
            masks=masks,
        ),
        seed=seed,
        device=torch_device,
        progress=progress,
    )
    head = chosen.fit(context, config)
    pooling, validation = choose_pooling(
        head_maps(head, context.validation.good, preprocessing, torch_device),
        head_maps(head, context.validation.defective, preprocessing, torch_device),
    )
    run = Run(
        path=out,
        record=RunRecord(
            method=method,
            preset=preset,
            config=config.model_dump(mode="json"),
            product=product or data.resolve().name,
            preprocessing=preprocessing,
            pooling=pooling,
            seed=seed,
            data_sha256=content_hash(samples),
            train_images=len(fit_samples),
            validation=validation,
            seconds=round(time.monotonic() - started, 1),
            versions=_versions(),
            created=datetime.now(timezone.utc),
        ),
        trunk=trunk.to("cpu"),
        head=head,
        holdout=holdout,
        holdout_groups=held_groups,
    )
    run.save()
    return run


def _groups(samples: Sequence[object]) -> npt.NDArray[np.str_]:
    return np.array([sample.group for sample in samples], np.str_)  # type: ignore[attr-defined]


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("lineward", "torch", "numpy")}}
