"""The body of `lineward synth3d`: one defective sample from a scan, and sheets that show what parameters do.

The command line itself is in trainer/synthesis/surface3d_cli.py, the mathematics in surface3d.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from deploy.evaluation import write_whole
from edge.capture.scan_files import ScanFile, read_scan
from edge.errors import UsageError
from trainer.data.images import write_png
from trainer.data.scan_files import write_npz, write_tiff
from trainer.synthesis.surface3d import Part, SurfaceDefect, perturb
from trainer.synthesis.surface3d_normals import estimate_surface
from trainer.synthesis.surface3d_pictures import Raster, contact_sheet
from trainer.synthesis.surface3d_presets import PRESETS, SurfaceNoise, preset

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8]

SWEPT = ("scale", "strength", "octaves", "threshold", "persistence", "aspect")
"""Parameters that a contact sheet may vary."""

_SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class Sample:
    """What one call wrote.

    Attributes:
        defect: the defective scan.
        files: what was written, the record first.
        diagonal: of the part, metres.
    """

    defect: SurfaceDefect
    files: tuple[Path, ...]
    diagonal: float


def settings_for(name: str, changes: Mapping[str, object]) -> SurfaceNoise:
    """Return a preset with some parameters changed; text is read as the parameter's type.

    A strength may be written with its unit: ``0.002m``, ``1.5%`` of the diagonal, ``8x`` the noise floor.

    Raises:
        UsageError: an unknown preset or parameter, or a value out of range.
    """
    changed = dict(changes)
    strength = changed.get("strength")
    if isinstance(strength, str):
        changed |= _parse_strength(strength)
    try:
        return SurfaceNoise.model_validate({**preset(name).model_dump(), **changed})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise UsageError(
            f"--set {where}: {first['msg']}; parameters are {', '.join(SurfaceNoise.model_fields)}"
        ) from error


def _parse_strength(text: str) -> dict[str, object]:
    for suffix, unit, factor in (("%", "diagonal", 0.01), ("x", "noise", 1.0), ("m", "metres", 1.0)):
        if text.endswith(suffix):
            try:
                return {"strength": float(text.removesuffix(suffix)) * factor, "strength_unit": unit}
            except ValueError:
                break
    try:
        return {"strength": float(text)}
    except ValueError as error:
        raise UsageError(f"strength {text}: give 0.002m, 1.5% of the diagonal or 8x the noise floor") from error


def synthesise(source: Path, out: Path, *, settings: SurfaceNoise, name: str, seed: int) -> Sample:
    """Put a defect on a scan and write it, its mask, what made it, and a picture of before and after.

    Args:
        source: a scan file.
        out: folder for ``<scan>_<name>_<seed>.npz`` (``xyz``, ``mask``, ``label``, ``displacement``), its ``.json``
            and ``.png``; of an organised scan also ``.tiff`` and ``_mask.png``.
        settings: parameters.
        name: of the preset, for the files' names.
        seed: of every choice.

    Raises:
        UsageError: the seed is out of range.
        DataError: the scan cannot be read, or a file not be written.
        MissingExtraError: what reads the scan is not installed.
    """
    _refuse_seed(seed)
    scan = read_scan(source)
    part = part_of(scan)
    defect = perturb(part, settings, seed=seed)
    stem = f"{source.stem}_{name}_{seed}"
    files = [out / f"{stem}.json", out / f"{stem}.npz", out / f"{stem}.png"]
    record = {
        **defect.record(),
        "preset": name,
        "source": source.name,
        "organised": scan.organised,
        "lineward": version("lineward"),
    }
    write_npz(
        files[1],
        xyz=defect.xyz,
        mask=defect.mask.astype(np.uint8),
        label=defect.label.astype(np.uint8),
        displacement=defect.displacement.astype(np.float32),
    )
    write_png(files[2], before_and_after(part, defect, title=f"{source.name}, {name}, seed {seed}"))
    if scan.organised:
        files += [out / f"{stem}.tiff", out / f"{stem}_mask.png"]
        write_tiff(files[3], np.asarray(defect.xyz, np.float32))
        write_png(files[4], defect.mask.astype(np.uint8) * np.uint8(255))
    write_whole(files[0], json.dumps(record, indent=1, sort_keys=True) + "\n")
    return Sample(defect, tuple(files), part.diagonal)


def part_of(scan: ScanFile) -> Part:
    """Look at a scan file's points."""
    return Part.of(scan.xyz, viewpoint=scan.viewpoint, closed=scan.closed)


def before_and_after(part: Part, defect: SurfaceDefect, *, title: str = "") -> Picture:
    """Draw a part before, after, and how far its points moved; uint8 [h, w, 3] BGR."""
    raster = Raster.of(part.valid, part.points, part.surface.normals)
    limit = defect.strength
    row = [
        raster.shaded(part.surface.normals),
        raster.shaded(_normals(part, defect)),
        raster.diverging(defect.displacement[part.valid], limit),
        raster.marked(defect.label[part.valid]),
    ]
    captions = ("before", "after", f"moved, +-{1000 * limit:.2f} mm", "label")
    return contact_sheet([row], columns=captions, title=title)


def sweep(
    source: Path, *, settings: SurfaceNoise, parameter: str, values: Sequence[str], seed: int, title: str = ""
) -> Picture:
    """Draw what a parameter does: the field, the mask, the displacement and the shaded surface, a column per value.

    Raises:
        UsageError: the parameter is none that is varied, a value is out of range, or there are none.
        DataError: the scan cannot be read.
        MissingExtraError: what reads the scan is not installed.
    """
    _refuse_seed(seed)
    if parameter not in SWEPT or not values:
        raise UsageError(f"sweep of {parameter} over {len(values)} values: give values of one of {', '.join(SWEPT)}")
    changed = [_changed(settings, parameter, value) for value in values]
    part = part_of(read_scan(source))
    raster = Raster.of(part.valid, part.points, part.surface.normals)
    defects = [perturb(part, one, seed=seed) for one in changed]
    limit = max(defect.strength for defect in defects)
    rows = [
        [raster.heat(defect.field[part.valid]) for defect in defects],
        [raster.marked(defect.mask[part.valid]) for defect in defects],
        [raster.diverging(defect.displacement[part.valid], limit) for defect in defects],
        [raster.shaded(_normals(part, defect)) for defect in defects],
    ]
    columns = [
        f"{parameter} {value}{', below noise' if one.below_noise else ''}"
        for value, one in zip(values, defects, strict=True)
    ]
    names = ("field", "mask", f"+-{1000 * limit:.2f} mm", "after")
    return contact_sheet(rows, columns=columns, names=names, title=title or f"{source.name}, seed {seed}")


def grid(sources: Sequence[Path], *, presets: Sequence[str], seed: int) -> Picture:
    """Draw presets on several parts, a row per part: what it was, then each preset, shaded over displaced.

    Raises:
        UsageError: an unknown preset, or no part.
        DataError: a scan cannot be read.
        MissingExtraError: what reads a scan is not installed.
    """
    _refuse_seed(seed)
    if not sources:
        raise UsageError("grid: give at least one scan with --in")
    wanted = [preset(name) for name in presets]
    rows, names = [], []
    for source in sources:
        part = part_of(read_scan(source))
        raster = Raster.of(part.valid, part.points, part.surface.normals, side=180)
        plain = raster.shaded(part.surface.normals)
        defects = [perturb(part, settings, seed=seed) for settings in wanted]
        rows.append([plain, *(raster.shaded(_normals(part, defect)) for defect in defects)])
        names.append(source.stem[:20])
        limits = [defect.strength for defect in defects]
        moved = [
            raster.diverging(defect.displacement[part.valid], limit)
            for defect, limit in zip(defects, limits, strict=True)
        ]
        rows.append([np.full_like(plain, 255), *moved])
        names.append("")
    return contact_sheet(
        rows, columns=["as scanned", *presets], names=names, title=f"seed {seed}; colour is full at a preset's strength"
    )


def all_presets() -> tuple[str, ...]:
    """Return the names of the presets."""
    return tuple(PRESETS)


def _normals(part: Part, defect: SurfaceDefect) -> npt.NDArray[np.float64]:
    points = np.asarray(defect.xyz[part.valid], np.float64)
    normals = estimate_surface(points, viewpoint=np.zeros(3)).normals
    # On the side that the part's own are on, however those were oriented.
    side = np.where((normals * part.surface.normals).sum(axis=1) < 0, -1.0, 1.0)
    return np.asarray(normals * side[:, None])


def _changed(settings: SurfaceNoise, parameter: str, value: str) -> SurfaceNoise:
    changes: dict[str, object] = {parameter: value}
    if parameter == "strength":
        changes |= _parse_strength(value)
    try:
        return SurfaceNoise.model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        raise UsageError(f"{parameter} {value}: {error.errors()[0]['msg']}") from error


def _refuse_seed(seed: int) -> None:
    if not 0 <= seed < _SEED_LIMIT:
        raise UsageError(f"--seed {seed}: out of range; give a whole number from 0 to 2**63 - 1")
