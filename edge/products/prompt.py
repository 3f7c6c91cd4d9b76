"""Tells a bundle of one more product by one good image: its prompt, and what good images score under it.

Runs the bundle's own detector; it must not know how a box switches products or sets thresholds.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.look import Look
from edge.bundle import CalibrationScores
from edge.capture.sources import FolderSource, read_image
from edge.errors import CaptureError, EngineError, ProductError
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.products.product_file import PROMPTS, ProductFile, require_fit

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from edge.inference.detector import Detector

    Canvas = npt.NDArray[np.uint8]

LEAST_GOOD_IMAGES = 6
"""That calibration scores are made from, as the gate of a bundle demands; fewer say nothing of a rare false alarm."""


def make_product(detector: Detector, name: str, image: Path, good: Path | None = None) -> ProductFile:
    """Make a product from one good image, and calibrate it with more of them where there are any.

    Of an image of several tiles the prompt is the tile that is nearest to all others: the head judges tile by tile and
    has one prompt for all. An image of ``good`` with the bytes of ``image`` is left out: it would score too low.

    Args:
        detector: of the bundle; it takes the product in.
        name: of the product, none of the bundle's own.
        image: a file with one good image, as the camera shows it.
        good: folder of good images, at least :data:`LEAST_GOOD_IMAGES`; None leaves calibration scores out.

    Returns:
        The product, ready for :func:`edge.products.product_file.write_product`.

    Raises:
        ProductError: the bundle's head takes no prompt, has that product already, or there are too few images.
        CaptureError: an image cannot be read or does not fit the bundle's crop.
        EngineError: the engine gives up.
    """
    bundle = detector.bundle
    manifest = bundle.manifest
    if manifest.product_state != (PROMPTS,):
        raise ProductError(
            f"{bundle.path}: method {manifest.method} of {len(manifest.products) or 1} product(s) is told none by an "
            "image; train `onenip` on two products or more"
        )
    product = ProductFile(
        product=name,
        bundle=bundle.id,
        head=manifest.head.id,
        engine=detector.status.engine,
        precision=detector.status.precision,
        image=image.name,
        created=datetime.now(timezone.utc),
        state={PROMPTS: _prompt(detector, image)},
    )
    require_fit(product, bundle, str(image))
    if good is None:
        return product
    canvases = _canvases(detector, good, skip=_sha256(image))
    try:
        detector.prepare_products([product]).result().put_in_force()
    except EngineError as error:
        raise EngineError(f"{bundle.path}: cannot take {name!r} in ({error})") from error
    look = Look(detector.products.index(name))
    maps = np.stack([detector.map_of_canvas(canvas, look) for _, canvas in canvases])
    halves = maps.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ProductError(f"{image}: good images have scores that are not finite under it; choose another image")
    calibration = CalibrationScores(
        scores=np.array([pool_score(one, manifest.pooling) for one in maps], np.float32),
        maps=halves,
        groups=np.array([group for group, _ in canvases], np.str_),
    )
    return replace(product, calibration=calibration)


def _prompt(detector: Detector, image: Path) -> npt.NDArray[np.float32]:
    tiles = detector.embeddings_of_canvas(_canvas(detector, image))
    apart = np.sqrt(np.square(tiles[:, None] - tiles[None]).sum(axis=(2, 3)))
    prompt = tiles[int(apart.sum(1).argmin())]
    if not np.isfinite(prompt).all():
        raise ProductError(f"{image}: the engine makes no finite prompt of it; choose another image")
    return np.asarray(prompt, np.float32)


def _canvas(detector: Detector, image: Path) -> Canvas:
    try:
        return to_canvas(read_image(image), detector.bundle.manifest.preprocessing)
    except CaptureError as error:
        raise CaptureError(f"{image}: {error}") from error


def _canvases(detector: Detector, folder: Path, *, skip: str) -> list[tuple[str, Canvas]]:
    source = FolderSource(folder)
    source.open()
    found = []
    while (grab := source.read()) is not None:
        if _sha256(folder / grab.name) != skip:
            found.append((grab.name, to_canvas(grab.image, detector.bundle.manifest.preprocessing)))
    if len(found) < LEAST_GOOD_IMAGES:
        raise ProductError(
            f"{folder}: {len(found)} good images besides the prompt are too few to calibrate with; give at least "
            f"{LEAST_GOOD_IMAGES}, or leave --good out"
        )
    return found


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read ({error.strerror})") from error
