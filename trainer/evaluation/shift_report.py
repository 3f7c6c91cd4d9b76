"""What the sub-class shift protocol found: the published JSON, its summary, a table and a drawing.

It must not know where images come from nor how they were judged.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from edge.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

SEEN, UNSEEN = "seen", "unseen"
FIGURES = ("image_auroc", "pixel_auroc", "aupro", "false_positive_rate", "miss_rate")
RANKING = FIGURES[:3]
"""Figures for which a drop from seen to unseen is taken as a share."""

HARD_AUROC, HARD_FALSE_POSITIVES = 0.05, 0.20
"""A shift is real where a detector loses so much I-AUROC, or so many more good images are called defective."""

_TITLES = {
    "image_auroc": "I-AUROC",
    "pixel_auroc": "P-AUROC",
    "aupro": "AUPRO (0.3)",
    "false_positive_rate": "false positives",
    "miss_rate": "misses",
}
# Apart for colour-blind eyes (Okabe and Ito), and each method has a mark of its own.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = "osD^vPX"


class _Published(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SubclassFigures(_Published):
    """One sub-class in one setting of one rotation; None where a figure is undefined (no masks, one class only)."""

    subclass: str
    setting: str = Field(description="seen, unseen, or unseen+n: adapted to n good images of the sub-class.")
    n_good: int
    n_defective: int
    image_auroc: float | None
    pixel_auroc: float | None = Field(description="Pooled over all pixels of the sub-class, maps as they are.")
    aupro: float | None = Field(description="To a false-positive rate of 0.3.")
    false_positive_rate: float | None = Field(description="Share of good images at or above the frozen threshold.")
    miss_rate: float | None = Field(description="Share of defective images below the frozen threshold.")


class RotationResult(_Published):
    """One training and all that was judged by it."""

    rotation: int
    trained: tuple[str, ...]
    unseen: tuple[str, ...]
    n_fit: int
    n_calibration: int
    n_calibration_groups: int
    threshold: float
    threshold_method: str
    budget_supported: bool
    pooling_cells: int
    embedding_id: str = Field(description="sha256 of trunk, projection, preprocessing and numerics (torch, float32).")
    subclasses: tuple[SubclassFigures, ...]
    notes: tuple[str, ...] = ()


class Spread(_Published):
    """A figure over the rotations: each rotation's plain mean over sub-classes."""

    mean: float
    min: float
    max: float
    std: float | None = Field(description="Sample deviation; None for a single rotation.")
    rotations: int


class MethodResult(_Published):
    """One method on one material.

    Attributes:
        settings: figure by setting and name; absent where undefined.
        drop: (seen - setting) / seen by setting and name of a ranking figure, over rotations.
        shift_is_real: whether seen to unseen cost ``HARD_AUROC`` or ``HARD_FALSE_POSITIVES``; None where undefined.
        unavailable: settings that the method has no figures for, and why.
    """

    method: str
    config: dict[str, Any]
    rotations: tuple[RotationResult, ...]
    settings: dict[str, dict[str, Spread]]
    drop: dict[str, dict[str, Spread]]
    shift_is_real: bool | None
    unavailable: dict[str, str]


class MaterialResult(_Published):
    """One material.

    Attributes:
        data_sha256: of names, labels, groups, pixels and masks of every image.
        subclasses: images per sub-class: train, good and defective.
        ordered: whether sub-classes follow each other in time.
    """

    material: str
    data_sha256: str
    subclasses: dict[str, dict[str, int]]
    ordered: bool
    methods: tuple[MethodResult, ...]
    notes: tuple[str, ...] = ()


class ShiftReport(_Published):
    """The whole: the same input and seed give the same bytes on one machine."""

    schema_version: int = 1
    protocol: str = "texture-ad"
    data: str = Field(description="The folder, or `generated`.")
    generated: bool
    seed: int
    rotations: int
    shots: tuple[int, ...]
    alpha: float
    preset: str
    trunk: str
    trunk_sha256: str
    preprocessing: dict[str, Any]
    versions: dict[str, str]
    materials: tuple[MaterialResult, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the JSON, UTF-8, ending in a newline."""
        return self.model_dump_json(indent=1) + "\n"


def summarise(
    method: str, config: dict[str, Any], rotations: Sequence[RotationResult], unavailable: dict[str, str]
) -> MethodResult:
    """Take means over sub-classes, then mean, least, most and deviation over rotations."""
    names = list(dict.fromkeys(one.setting for rotation in rotations for one in rotation.subclasses))
    settings = {
        setting: _spreads(FIGURES, lambda figure, s=setting: [_mean(rotation, s, figure) for rotation in rotations])
        for setting in names
    }
    drop = {
        setting: _spreads(RANKING, lambda figure, s=setting: [_drop(rotation, s, figure) for rotation in rotations])
        for setting in names
        if setting != SEEN
    }
    return MethodResult(
        method=method,
        config=config,
        rotations=tuple(rotations),
        settings=settings,
        drop=drop,
        shift_is_real=_is_real(settings.get(SEEN, {}), settings.get(UNSEEN, {})),
        unavailable=unavailable,
    )


def tables(report: ShiftReport) -> list[Table]:
    """Return one table per material: a row per method and setting, mean and deviation over the rotations."""
    found = []
    source = "generated stand-in, not Texture-AD" if report.generated else report.data
    for material in report.materials:
        table = Table(
            title=f"{material.material}: {len(material.subclasses)} sub-classes ({source})",
            title_justify="left",
        )
        for name, width in (("method", 8), ("setting", 9)):
            table.add_column(name, no_wrap=True, min_width=width)  # unseen+5 and unseen+20 differ at their ends
        for figure in FIGURES:
            table.add_column(_TITLES[figure], justify="right")
        table.add_column("drop of I-AUROC", justify="right")
        for one in material.methods:
            for setting, figures in one.settings.items():
                lost = one.drop.get(setting, {}).get("image_auroc")
                cells = [_shown(figures.get(figure)) for figure in FIGURES]
                name = one.method if setting == next(iter(one.settings)) else ""
                table.add_row(name, setting, *cells, "" if lost is None else f"{lost.mean:+.1%}")
            table.add_section()
        found.append(table)
    return found


def refuse_picture(path: Path) -> str:
    """Return the kind of a picture by its ending.

    Raises:
        UsageError: it is neither PNG nor SVG.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in {"png", "svg"}:
        raise UsageError(f"--picture {path}: end the name with .png or .svg")
    return kind


def draw(report: ShiftReport, path: Path) -> None:
    """Draw I-AUROC, P-AUROC and false positives by setting, a line per method, whiskers from least to most.

    Args:
        report: what was found.
        path: PNG or SVG, by its ending.

    Raises:
        UsageError: another ending.
        DataError: the file cannot be written.
    """
    kind = refuse_picture(path)
    shown = ("image_auroc", "pixel_auroc", "false_positive_rate")
    figure = Figure(figsize=(12, 0.6 + 3.1 * len(report.materials)), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots(len(report.materials), len(shown), squeeze=False)
    for row, material in zip(axes, report.materials, strict=True):
        for column, name in zip(row, shown, strict=True):
            _draw_panel(column, material, name)
        row[0].set_ylabel(material.material)
    for column, name in zip(axes[0], shown, strict=True):
        column.set_title(f"{_TITLES[name]} at the frozen threshold" if name == shown[2] else _TITLES[name])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))))
    source = "generated sub-classes" if report.generated else report.data
    figure.suptitle(f"Sub-class shift, {source}, {report.rotations} rotations")
    data = io.BytesIO()
    # No date: the same figures give the same file.
    figure.savefig(data, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or choose another file") from error


def _draw_panel(axes: Axes, material: MaterialResult, name: str) -> None:
    settings = list(dict.fromkeys(setting for one in material.methods for setting in one.settings))
    width = 0.5 / max(1, len(material.methods))
    for index, one in enumerate(material.methods):
        points = [(settings.index(setting), found[name]) for setting, found in one.settings.items() if name in found]
        if not points:
            continue
        at = np.array([x for x, _ in points]) + (index - (len(material.methods) - 1) / 2) * width
        middle = np.array([spread.mean for _, spread in points])
        below = np.array([spread.mean - spread.min for _, spread in points])
        above = np.array([spread.max - spread.mean for _, spread in points])
        axes.errorbar(
            at,
            middle,
            yerr=np.clip([below, above], 0, None),
            fmt=_MARKS[index % len(_MARKS)],
            color=_COLOURS[index % len(_COLOURS)],
            capsize=2,
            linestyle="-",
            linewidth=1,
            label=one.method,
        )
    axes.set_xticks(range(len(settings)), settings)
    axes.set_xlim(-0.5, len(settings) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def _mean(rotation: RotationResult, setting: str, figure: str) -> float | None:
    values = [getattr(one, figure) for one in rotation.subclasses if one.setting == setting]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _drop(rotation: RotationResult, setting: str, figure: str) -> float | None:
    seen, other = _mean(rotation, SEEN, figure), _mean(rotation, setting, figure)
    return None if not seen or other is None else (seen - other) / seen


def _spreads(names: Sequence[str], of: Callable[[str], list[float | None]]) -> dict[str, Spread]:
    found = {}
    for name in names:
        values = [value for value in of(name) if value is not None]
        if values:
            found[name] = Spread(
                mean=float(np.mean(values)),
                min=min(values),
                max=max(values),
                std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                rotations=len(values),
            )
    return found


def _is_real(seen: dict[str, Spread], unseen: dict[str, Spread]) -> bool | None:
    checks = []
    if "image_auroc" in seen and "image_auroc" in unseen:
        checks.append(seen["image_auroc"].mean - unseen["image_auroc"].mean >= HARD_AUROC)
    if "false_positive_rate" in seen and "false_positive_rate" in unseen:
        rise = unseen["false_positive_rate"].mean - seen["false_positive_rate"].mean
        checks.append(rise >= HARD_FALSE_POSITIVES)
    return any(checks) if checks else None


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.3f}" if spread.std is None else f"{spread.mean:.3f} ±{spread.std:.3f}"
