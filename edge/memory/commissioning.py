"""The commissioning set: embeddings of images declared good, and what they score against a memory.

Thresholds of a new memory are made from it alone; it must not know live frames, whose choice by score would bias it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.bundle import CalibrationScores, load_arrays
from edge.capture.sources import read_image
from edge.errors import BundleError, CaptureError, DataError
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.memory.search import anomaly_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import Bundle, Manifest, Precision
    from edge.inference.detector import Detector

    Rows = npt.NDArray[np.float32]
    Embed = Callable[[npt.NDArray[np.uint8]], Rows]

_LOG = logging.getLogger(__name__)
MIN_IMAGES = 10
"""Fewer say nothing of a tail, nor of a quantile to learn below."""
MAX_BYTES = 256 * 2**20
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, slots=True)
class Commissioning:
    """Images declared good, as embeddings of one precision.

    Attributes:
        embeddings: float16 [m, tiles, L, D].
        groups: unicode [m]; images of one group (a part) are not independent.
        left_out: images of a folder that could not be used, or were too many.
    """

    embeddings: npt.NDArray[np.float16]
    groups: npt.NDArray[np.str_]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.embeddings)

    def scores(
        self, banks: Sequence[Rows], manifest: Manifest, *, stop: Callable[[], bool] = lambda: False
    ) -> CalibrationScores:
        """Return what the images score against some banks together.

        Args:
            banks: float32 [R, D] each.
            manifest: of the bundle; has a memory.
            stop: asked before each image.

        Raises:
            DataError: the banks do not fit the embeddings, a score is not finite, or ``stop`` said so.
        """
        layout = manifest.memory
        assert layout is not None
        maps = []
        for embedding in self.embeddings:
            if stop():
                raise DataError("calibration was stopped")
            found = anomaly_map(
                embedding.astype(np.float32), banks, layout, manifest.preprocessing, manifest.map_stride
            )
            maps.append(found)
        scores = np.asarray([pool_score(one, manifest.pooling) for one in maps], np.float32)
        if not np.isfinite(scores).all():
            raise DataError("images of the commissioning set have no finite score; make the set again")
        return CalibrationScores(scores=scores, maps=np.stack(maps).astype(np.float16), groups=self.groups)


def commissioning_of(
    detector: Detector, folder: Path | None, *, stop: Callable[[], bool] = lambda: False
) -> Commissioning | None:
    """Return what a box commissions its memory with: the images of a folder, or what its bundle carries.

    Args:
        detector: embeds the images.
        folder: of images of good parts; None for those of the bundle.
        stop: the box is stopping.

    Returns:
        None where the bundle carries none.

    Raises:
        DataError: too few images of the folder can be used.
        BundleError: the bundle's file is damaged.
        EngineError: the engine gives up.
    """
    bundle = detector.bundle
    if folder is None:
        return packed_commissioning(bundle, detector.status.precision)
    preprocessing = bundle.manifest.preprocessing
    found = commissioning_of_folder(
        folder, lambda image: detector.embeddings_of_canvas(to_canvas(image, preprocessing)), read_image, stop=stop
    )
    if found is None:
        raise DataError(f"{folder}: fewer than {MIN_IMAGES} images of good parts that can be used; add some")
    _LOG.info("memory: %d commissioning images, %d left out", len(found), found.left_out)
    return found


def packed_commissioning(bundle: Bundle, precision: Precision) -> Commissioning | None:
    """Read the bundle's set; None where it has none for this precision, or fewer than 10 images.

    Raises:
        BundleError: the file is damaged.
    """
    if bundle.manifest.commissioning_file is None:
        return None
    path = bundle.file(bundle.manifest.commissioning_file)
    arrays = load_arrays(path)
    embeddings = arrays.get(f"embedding_{precision.value}")
    if embeddings is None or len(embeddings) < MIN_IMAGES:
        return None
    if embeddings.ndim != 4 or not np.isfinite(embeddings).all():  # noqa: PLR2004 (images, tiles, patches, channels)
        raise BundleError(f"{path}: embeddings are not finite [m, tiles, L, D]; export the bundle again")
    groups = arrays.get("groups", np.arange(len(embeddings))).astype(np.str_)
    if groups.shape != (len(embeddings),):
        raise BundleError(f"{path}: {groups.size} groups for {len(embeddings)} images; export the bundle again")
    return Commissioning(embeddings.astype(np.float16), groups)


def commissioning_of_folder(
    folder: Path, embed: Embed, read: Callable[[Path], npt.NDArray[np.uint8]], *, stop: Callable[[], bool]
) -> Commissioning | None:
    """Embed the images of a folder and its sub-folders, in order of their names.

    Args:
        folder: of images declared good at this box.
        embed: from a camera frame uint8 [H, W, 3] BGR to float32 [tiles, L, D].
        read: decodes one file; what it raises a CaptureError for is left out and counted.
        stop: asked before each image.

    Returns:
        None where fewer than 10 images can be used.

    Raises:
        DataError: there is no such folder, or ``stop`` said so.
    """
    if not folder.is_dir():
        raise DataError(f"memory.commissioning: {folder} is no folder; put images of good parts into it")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    embeddings: list[npt.NDArray[np.float16]] = []
    groups: list[str] = []
    chosen = files
    while chosen:
        path, *chosen = chosen
        if stop():
            raise DataError("reading the commissioning set was stopped")
        try:
            embeddings.append(embed(read(path)).astype(np.float16))
        except CaptureError:
            continue
        inside = path.relative_to(folder)
        groups.append(inside.parts[0] if len(inside.parts) > 1 else inside.stem)
        room = MAX_BYTES // embeddings[0].nbytes
        if len(embeddings) == 1 and len(chosen) >= room:
            # Spread over the folder: its first images may all be of one day.
            chosen = [chosen[int(at)] for at in np.linspace(0, len(chosen) - 1, max(1, room - 1))]
    if len(embeddings) < MIN_IMAGES:
        return None
    return Commissioning(np.stack(embeddings), np.asarray(groups), left_out=len(files) - len(embeddings))
