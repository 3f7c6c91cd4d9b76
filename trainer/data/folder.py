"""Read a folder in MVTec AD's layout: good images to learn from, and labelled images with masks to test on.

It knows files, labels and groups; it must not know networks or how images are resized.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploy.progress import Progress, no_progress
from edge.capture.scan_files import read_bytes
from edge.errors import DataError
from trainer.data.images import IMAGE_EXTENSIONS, load_image, load_mask_file
from trainer.data.splits import Holdout, split_holdout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy.typing as npt

__all__ = [
    "CheckReport",
    "Holdout",
    "ImageSet",
    "Sample",
    "check",
    "content_hash",
    "load_image",
    "load_mask",
    "read_folder",
    "split_holdout",
]

GOOD = "good"
_ANOMALY = {False: {"0", "false", "False"}, True: {"1", "true", "True"}}
_SHOWN = 5  # names listed in one message; more would bury the cure


@dataclass(frozen=True)
class Sample:
    """One image of a folder.

    Attributes:
        path: the image file.
        split: ``train`` or ``test``.
        label: name of its folder, ``good`` for normal parts.
        anomalous: whether the part is defective.
        mask: its mask file, None for good images and where there is none.
        condition: as in meta.csv (a camera, a lighting, a site); empty if not given.
        group: images of one group are not independent; without meta.csv each image is its own group.
        extra: further facts as in meta.csv, such as ``time=20200828110014``; empty if not given.
    """

    path: Path
    split: str
    label: str
    anomalous: bool
    mask: Path | None
    condition: str
    group: str
    extra: str = ""

    @property
    def name(self) -> str:
        """Path below the root, with forward slashes: the same on every machine."""
        return f"{self.split}/{self.label}/{self.path.name}"


@dataclass(frozen=True)
class ImageSet:
    """What a folder holds.

    Attributes:
        root: the folder.
        train: images of good parts, sorted by name; empty only where the reader was told that they may be missing.
        test: labelled images, sorted by label and name; may be empty.
        notes: what is missing or left aside, one sentence each, for people to read.
    """

    root: Path
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    @property
    def masked(self) -> tuple[Sample, ...]:
        """Test images that pixel figures may use: good ones and defective ones with a mask; empty without masks."""
        if not any(sample.mask for sample in self.test):
            return ()
        return tuple(sample for sample in self.test if sample.mask or not sample.anomalous)


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found in a set without errors.

    Attributes:
        sizes: number of images per (height, width).
        notes: facts that are allowed but worth knowing.
    """

    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_folder(root: Path, *, needs_train: bool = True) -> ImageSet:
    """List the samples of ``root`` without decoding them.

    Expected are ``train/good/*``, ``test/<label>/*`` (optional; ``good`` is normal, all else defective),
    ``ground_truth/<label>/<stem>_mask.png`` or ``<stem>.png`` (optional) and ``meta.csv`` (optional; columns path,
    split, label, anomaly, condition, group, extra; path is required, others are ignored). Files that are no images
    are ignored. A defective image without a mask beside others that have one is a note, not an error: it counts for
    image scores and is left out of :attr:`ImageSet.masked`. Images may differ in size. Layout after MVTec AD
    (Bergmann et al., CVPR 2019).

    Args:
        root: the folder.
        needs_train: whether ``train/good`` must hold images; without, ``test`` may do alone.

    Returns:
        The samples and notes on what is missing.

    Raises:
        DataError: the folder is missing or empty, has no ``train/good`` images where it needs them, two images share
            a stem, a mask has no image, or meta.csv is malformed or disagrees with the files.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder that holds train/good")
    train_files = _images(root / "train" / GOOD)
    if not train_files and (needs_train or not (root / "test").is_dir()):
        raise DataError(_no_training_images(root))
    meta = _read_meta(root / "meta.csv")
    notes = []
    ignored = [folder.name for folder in _folders(root / "train") if folder.name != GOOD]
    if ignored:
        notes.append(f"train/{', train/'.join(ignored)} ignored: a detector learns from train/good only")
    train = [_sample(path, "train", GOOD, None, meta) for path in train_files]
    test = []
    for folder in _folders(root / "test"):
        files = _images(folder)
        masks = _match_masks(root / "ground_truth" / folder.name, files)
        test += [_sample(path, "test", folder.name, masks.get(path), meta) for path in files]
    _refuse_masks_without_images(root)
    samples = (*train, *test)
    if meta is not None:
        _compare_meta(root, meta, samples)
    notes += _missing(root, test)
    return ImageSet(root, tuple(train), tuple(test), tuple(notes))


def load_mask(sample: Sample, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Read the mask of a sample.

    Args:
        sample: a good image, or a defective one with a mask.
        shape: (height, width) of its image.

    Returns:
        bool [H, W]; all False for good images.

    Raises:
        DataError: a defective image has no mask, or the mask is damaged or of another size than the image.
    """
    if sample.mask is not None:
        return load_mask_file(sample.mask, shape)
    if sample.anomalous:
        raise DataError(
            f"{sample.path}: no mask; add ground_truth/{sample.label}/{sample.path.stem}_mask.png, or leave this image "
            "out of pixel figures"
        )
    return np.zeros(shape, np.bool_)


def check(images: ImageSet, *, progress: Progress = no_progress, workers: int = 4) -> CheckReport:
    """Decode every image and mask once, in parallel, and report all damage in one go.

    Args:
        images: from :func:`read_folder`.
        progress: called from this thread after each image.
        workers: decoding threads, >= 1.

    Returns:
        Sizes, and notes on mixed sizes and empty masks.

    Raises:
        DataError: at least one image or mask is damaged, or a mask differs in size; names them.
    """
    samples = (*images.train, *images.test)
    sizes: Counter[tuple[int, int]] = Counter()
    errors: list[str] = []
    empty: list[str] = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for done, (sample, result) in enumerate(zip(samples, pool.map(_inspect, samples), strict=True), start=1):
            if isinstance(result, DataError):
                errors.append(str(result))
            else:
                sizes[result[0]] += 1
                if result[1]:
                    empty.append(sample.name)
            progress("checking images", done, len(samples))
    if errors:
        more = f"\n... and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise DataError("\n".join(errors[:_SHOWN]) + more)
    notes = []
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h} ({count})" for (h, w), count in sizes.most_common(_SHOWN))
        notes.append(f"images have {len(sizes)} sizes: {shown}; all are resized to one canvas")
    if empty:
        notes.append(f"masks without a defective pixel: {_listed(empty)}")
    return CheckReport(dict(sizes), tuple(notes))


def content_hash(samples: Iterable[Sample]) -> str:
    """Return the sha256 of names and bytes of images and their masks; order and location do not matter."""
    digest = hashlib.sha256()
    for sample in sorted(samples, key=lambda sample: sample.name):
        for part in (sample.name.encode(), read_bytes(sample.path), read_bytes(sample.mask) if sample.mask else b""):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def _images(folder: Path) -> list[Path]:
    """List image files by name; hidden files (``._x.png`` of macOS) are none."""
    if not folder.is_dir():
        return []
    try:
        files = sorted(
            (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and not p.name.startswith(".")),
            key=lambda p: p.name,
        )
        files = [path for path in files if path.is_file()]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    by_stem: dict[str, Path] = {}
    for path in files:
        if path.stem in by_stem:
            raise DataError(
                f"{path}: shares its stem with {by_stem[path.stem].name}, so masks are ambiguous; rename one"
            )
        by_stem[path.stem] = path
    return files


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def _no_training_images(root: Path) -> str:
    inside = [folder.name for folder in _folders(root) if (folder / "train" / GOOD).is_dir()]
    if inside:
        return f"{root}: holds several data sets, not one; give one of them, such as {root / inside[0]}"
    if _images(root):
        return f"{root}: has images but no train/good; move the images of good parts to {root / 'train' / GOOD}"
    if not any(root.iterdir()):
        return f"{root}: the folder is empty; put images of good parts in {root / 'train' / GOOD}"
    return (
        f"{root / 'train' / GOOD}: no images of good parts; put them there as "
        f"{', '.join(sorted(extension[1:] for extension in IMAGE_EXTENSIONS))}"
    )


def _match_masks(folder: Path, images: Sequence[Path]) -> dict[Path, Path]:
    by_stem = {path.stem: path for path in images}
    masks: dict[Path, Path] = {}
    for mask in _images(folder):
        base = mask.stem.removesuffix("_mask")
        image = by_stem.get(base) or by_stem.get(mask.stem)
        if image is None:
            raise DataError(
                f"{mask}: a mask without an image; test/{folder.name}/{base}.* is missing; add it or remove the mask"
            )
        if image in masks:
            raise DataError(f"{mask}: {image.name} has a second mask, {masks[image].name}; remove one")
        masks[image] = mask
    return masks


def _refuse_masks_without_images(root: Path) -> None:
    for folder in _folders(root / "ground_truth"):
        masks = _images(folder)
        if masks and not (root / "test" / folder.name).is_dir():
            raise DataError(
                f"{masks[0]}: a mask without an image; test/{folder.name} is missing; add it or remove {folder}"
            )


def _sample(path: Path, split: str, label: str, mask: Path | None, meta: dict[str, dict[str, str]] | None) -> Sample:
    name = f"{split}/{label}/{path.name}"
    row = (meta or {}).get(name, {})
    anomalous = split == "test" and label != GOOD
    return Sample(
        path=path,
        split=split,
        label=label,
        anomalous=anomalous,
        mask=mask if anomalous else None,
        condition=row.get("condition", ""),
        group=row.get("group", "") or name,
        extra=row.get("extra", ""),
    )


def _read_meta(path: Path) -> dict[str, dict[str, str]] | None:
    """Return rows by image name, or None without the file."""
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if "path" not in (reader.fieldnames or ()):
                raise DataError(f"{path}: no column 'path'; the first line must name the columns, path among them")
            rows: dict[str, dict[str, str]] = {}
            for row in reader:
                name = (row["path"] or "").strip().replace("\\", "/").removeprefix("./")
                if not name:
                    raise DataError(
                        f"{path} line {reader.line_num}: the path is empty; name an image or remove the line"
                    )
                if name in rows:
                    raise DataError(f"{path} line {reader.line_num}: {name} is listed twice; remove one line")
                rows[name] = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
                rows[name]["line"] = str(reader.line_num)
            return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a UTF-8 comma-separated table ({error}); save it again as CSV") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _compare_meta(root: Path, meta: dict[str, dict[str, str]], samples: Sequence[Sample]) -> None:
    by_name = {sample.name: sample for sample in samples}
    unlisted = [name for name in by_name if name not in meta]
    if unlisted:
        raise DataError(f"{root / 'meta.csv'}: does not list {_listed(unlisted)}; add them or remove meta.csv")
    for name, row in meta.items():
        sample = by_name.get(name)
        if sample is None:
            if (root / name).is_file():
                continue  # a file outside the layout, or of a split that is not used
            raise DataError(f"{root / 'meta.csv'} line {row['line']}: {name} does not exist; add it or remove the line")
        facts = {"split": {sample.split}, "label": {sample.label}, "anomaly": _ANOMALY[sample.anomalous]}
        for column, allowed in facts.items():
            if row.get(column, "") not in {"", *allowed}:
                raise DataError(
                    f"{root / 'meta.csv'} line {row['line']}: {column} is {row[column]!r} but the folder of {name} "
                    f"says {min(allowed)!r}; correct one of them"
                )


def _missing(root: Path, test: Sequence[Sample]) -> list[str]:
    if not test:
        return [f"{root / 'test'}: no test images, so accuracy cannot be measured; training alone is possible"]
    notes = []
    defective = [sample for sample in test if sample.anomalous]
    without = [sample.name for sample in defective if sample.mask is None]
    if len(defective) == len(test):
        notes.append("test/good is missing or empty: false alarms and AUROC cannot be measured")
    if not defective:
        notes.append("test has no defective images: recall and AUROC cannot be measured")
    elif len(without) == len(defective):
        notes.append("no masks in ground_truth: pixel figures cannot be measured")
    elif without:
        notes.append(
            f"{len(without)} defective images without a mask are left out of pixel figures: {_listed(without)}"
        )
    return notes


def _inspect(sample: Sample) -> tuple[tuple[int, int], bool] | DataError:
    """Return (height, width) and whether the mask is empty, or the error, so that one bad file hides no other."""
    try:
        height, width = load_image(sample.path).shape[:2]
        empty = sample.mask is not None and not load_mask(sample, (height, width)).any()
    except DataError as error:
        return error
    return (height, width), empty


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
