"""What false-alarm budgets mean for a bundle: thresholds by budget, and what the calibration supports.

Needs numpy alone unless there is a mask or a smallest area; it must not know engines or brokers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import BundleError, DataError
from edge.judgement.score import pool_score
from edge.judgement.threshold import Budget, enter_level, fit_threshold, leave_level

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.bundle import Bundle, CalibrationScores, Engine, Precision
    from edge.judgement.scope import Scope
    from edge.settings import CameraSettings

EVENTS_PER_HOUR = (100.0, 10.0, 1.0, 0.1, 0.01)
NOK_PER_1000 = (100.0, 10.0, 1.0, 0.1)


@dataclass(frozen=True, slots=True)
class Row:
    """One budget.

    Attributes:
        budget: false events per camera-hour in stream mode, false NOK per 1,000 parts in triggered mode.
        alpha: false-alarm probability per frame.
        threshold: raw; None where the calibration cannot give one.
        enter_level: raw, at least the threshold.
        leave_level: raw, at most the threshold.
        method: ``empirical`` or ``tail_fit``; empty where there is no threshold.
        supported: the calibration can promise the budget.
        chosen: it is the camera's own.
    """

    budget: float
    alpha: float
    threshold: float | None
    enter_level: float | None
    leave_level: float | None
    method: str
    supported: bool
    chosen: bool


@dataclass(frozen=True, slots=True)
class ThresholdTable:
    """Budgets and thresholds of one camera, or of a bundle.

    Attributes:
        camera: its name; empty for a bundle alone.
        product: of a bundle for several; empty of one for one.
        bundle_id: 64 hex digits.
        engine: whose calibration it is.
        precision: of it.
        unit: what a budget counts.
        n: calibration scores, one of each image, scan or window.
        groups: among them; they support budgets, not single scores.
        smallest_budget: that the groups support, in the unit.
        highest_score: of them.
        rows: loosest budget first.
        notes: what an operator should know.
    """

    camera: str
    product: str
    bundle_id: str
    engine: Engine
    precision: Precision
    unit: str
    n: int
    groups: int
    smallest_budget: float
    highest_score: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def threshold_table(
    bundle: Bundle,
    engine: Engine,
    precision: Precision,
    camera: CameraSettings,
    scope: Scope,
    *,
    frame_shape: tuple[int, int] | None = None,
    name: str = "",
    product: str = "",
) -> ThresholdTable:
    """Fit the thresholds of several budgets as a box would.

    Args:
        bundle: that judges.
        engine: whose calibration counts.
        precision: of it.
        camera: mode, budget, frame rate and events.
        scope: its region of interest, mask and smallest area.
        frame_shape: (H, W) of the camera's frames, needed where the scope is not everything.
        name: of the camera.
        product: of a bundle for several.

    Raises:
        BundleError: the bundle is not calibrated for the pair or product, or its maps cannot be pooled again.
        SettingsError: mask, region or smallest area do not fit the frames.
        DataError: the calibration's scores are not finite, or there are none.
    """
    from edge.settings import Mode  # noqa: PLC0415 (settings import judgement)

    calibration = bundle.calibration(engine, precision)
    if product:
        calibration = calibration.of(product)
    scores, notes = _scores(bundle, calibration, scope, frame_shape)
    triggered = camera.mode is Mode.TRIGGERED
    own = camera.budget.false_nok_per_1000 if triggered else camera.budget.false_events_per_hour
    budgets = sorted({*(NOK_PER_1000 if triggered else EVENTS_PER_HOUR), own}, reverse=True)
    name_of = "false_nok_per_1000" if triggered else "false_events_per_hour"
    rows = tuple(
        _row(
            budget,
            camera.model_copy(update={"budget": Budget.model_validate({name_of: budget})}),
            scores,
            calibration.groups,
            chosen=budget == own,
        )
        for budget in budgets
    )
    groups = int(np.unique(calibration.groups).size)
    unit_budget = camera.model_copy(update={"budget": Budget.model_validate({name_of: 1e-3})})
    per_alpha = 1e-3 / unit_budget.alpha
    return ThresholdTable(
        camera=name,
        product=product,
        bundle_id=bundle.id,
        engine=engine,
        precision=precision,
        unit="false NOK per 1,000 parts" if triggered else "false events per camera-hour",
        n=int(scores.size),
        groups=groups,
        smallest_budget=per_alpha / (groups + 1),
        highest_score=float(scores.max()),
        rows=rows,
        notes=notes,
    )


def _scores(
    bundle: Bundle, calibration: CalibrationScores, scope: Scope, frame_shape: tuple[int, int] | None
) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
    if scope.region.everywhere and scope.drawn is None and scope.min_area is None:
        return calibration.scores, ()
    manifest, maps = bundle.manifest, calibration.maps
    if maps.ndim != 3:  # noqa: PLR2004 (images, rows, columns)
        raise BundleError(f"{bundle.path}: its calibration holds no maps to pool again; export it again")
    if frame_shape is None:
        raise DataError("the size of the camera's frames is needed for a region, mask or smallest area: --frame-size")
    map_shape = (maps.shape[1], maps.shape[2])
    cells = scope.look(manifest.preprocessing.crop, manifest.pooling, frame_shape, map_shape)
    pooled: Sequence[float] = [
        pool_score(one.astype(np.float32), manifest.pooling, cells.mask, cells.min_cells) for one in maps
    ]
    return np.asarray(pooled, np.float32), cells.notes


def _row(
    budget: float,
    camera: CameraSettings,
    scores: npt.NDArray[np.float32],
    groups: npt.NDArray[np.str_],
    *,
    chosen: bool,
) -> Row:
    alpha = camera.alpha
    try:
        found = fit_threshold(scores, groups, alpha)
        enter = enter_level(scores, groups, camera.events.enter_quantile, found.value)
    except DataError:
        return Row(budget, alpha, None, None, None, "", supported=False, chosen=chosen)
    leave = leave_level(scores, groups, camera.events.leave_quantile, found.value)
    return Row(budget, alpha, found.value, enter, leave, found.method, supported=found.budget_supported, chosen=chosen)
