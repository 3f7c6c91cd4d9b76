"""A folder of organised scans: which are good, which have what defect, and where it is.

It knows names and files; what is in them is others' business.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge.bundle import load_arrays
from edge.capture.scan_files import ORGANISED_EXTENSIONS
from edge.errors import BundleError, DataError
from trainer.data.folder import GOOD, Sample
from trainer.data.images import load_mask_file

if TYPE_CHECKING:
    import numpy.typing as npt

_SUFFIXES = ORGANISED_EXTENSIONS | {".pcd"}


class ScanFolder(NamedTuple):
    """What a folder holds.

    Attributes:
        train: good scans to learn from.
        test: labelled scans; may be empty.
    """

    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def read_scan_folder(root: Path) -> ScanFolder:
    """List the scans of ``root`` without decoding them.

    Expected are ``train/good/*`` and, to evaluate, ``test/<label>/*`` (``good`` is normal, all else defective): NPZ,
    TIFF or organised PCD. The scans may also lie one folder deeper, in ``xyz``, with masks beside it in ``gt``, as in
    MVTec 3D-AD (Bergmann et al., VISAPP 2022); masks may also lie in ``ground_truth/<label>``, or be an array ``mask``
    of the NPZ. A scan that is there as NPZ and as another kind is read once.

    Raises:
        DataError: the folder is missing, or has no scans in ``train/good``.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder that holds train/good")
    train = [_sample(path, "train", GOOD, None) for path in _scans(root / "train" / GOOD)]
    if not train:
        kinds = ", ".join(sorted(suffix[1:] for suffix in _SUFFIXES))
        raise DataError(f"{root / 'train' / GOOD}: no scans of good parts; put them there as {kinds}")
    test = []
    above = root / "test"
    for folder in sorted(path for path in above.iterdir() if path.is_dir()) if above.is_dir() else []:
        test += [_sample(path, "test", folder.name, _mask_file(root, folder, path)) for path in _scans(folder)]
    return ScanFolder(tuple(train), tuple(test))


def load_scan_mask(sample: Sample, shape: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """Return which points of a scan are defective, bool [H, W]; None where nobody said.

    Raises:
        DataError: the mask is damaged or of another size.
    """
    if not sample.anomalous:
        return np.zeros(shape, np.bool_)
    if sample.mask is not None:
        return load_mask_file(sample.mask, shape)
    if sample.path.suffix.lower() != ".npz":
        return None
    try:
        mask = load_arrays(sample.path).get("mask")
    except BundleError as error:
        raise DataError(f"{sample.path}: not a readable npz; export the scan again") from error
    if mask is None:
        return None
    if mask.shape != shape:
        raise DataError(f"{sample.path}: the mask is {list(mask.shape)}, its scan {list(shape)}; save both at one size")
    return np.asarray(mask > 0)


def _scans(folder: Path) -> list[Path]:
    for place in (folder / "xyz", folder):
        if place.is_dir():
            found = [path for path in sorted(place.iterdir()) if path.suffix.lower() in _SUFFIXES and _shown(path)]
            # What synth3d writes is there as NPZ, with its mask, and as TIFF.
            known = {path.stem for path in found if path.suffix.lower() == ".npz"}
            found = [path for path in found if path.suffix.lower() == ".npz" or path.stem not in known]
            if found:
                return found
    return []


def _shown(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _mask_file(root: Path, folder: Path, path: Path) -> Path | None:
    if folder.name == GOOD:
        return None
    places = (folder / "gt", root / "ground_truth" / folder.name)
    names = (f"{path.stem}.png", f"{path.stem}_mask.png")
    return next((place / name for place in places for name in names if (place / name).is_file()), None)


def _sample(path: Path, split: str, label: str, mask: Path | None) -> Sample:
    return Sample(
        path=Path(path),
        split=split,
        label=label,
        anomalous=split == "test" and label != GOOD,
        mask=mask,
        condition="",
        group=f"{split}/{label}/{path.name}",
    )
