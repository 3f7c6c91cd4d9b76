"""From a false-alarm budget and the scores of held-out good images to a raw threshold.

Pure numpy; knows nothing of maps, frames or bundles on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edge.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

# Fewer scores than this say nothing of a tail: with 5 exceedances a tail's scale is known to a factor of two.
MIN_TAIL_SCORES = 6
# The tail is fitted over the highest fifth, or over 10 scores where a fifth is fewer.
TAIL_FRACTION = 0.2
TAIL_SCORES = 10
# Pseudo-observations that pull the tail's shape towards 0 (exponential), as Pareto smoothing does with its shape.
SHAPE_PRIOR = 10.0
SHAPE_RANGE = (-0.25, 0.5)

SECONDS_PER_HOUR = 3600.0
PARTS = 1000.0


class Budget(BaseModel):
    """How many false alarms are tolerable; what applies depends on the camera's mode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    false_events_per_hour: float = Field(
        1.0, gt=0, title="False events per hour", description="Stream mode: false anomaly events per camera and hour."
    )
    false_nok_per_1000: float = Field(
        1.0, gt=0, lt=1000, title="False NOK per 1,000", description="Triggered mode: false NOK per 1,000 good parts."
    )

    def stream_alpha(self, *, frame_rate: float, enter_hits: int) -> float:
        """Return the false-alarm probability that each frame may have in stream mode.

        Every event uses up at least ``enter_hits`` false frames of its own, so events per hour are at most false
        frames per hour / ``enter_hits``: a bound that holds however dependent neighbouring frames are.

        Args:
            frame_rate: frames per second that are judged, > 0.
            enter_hits: frames at or above the threshold that begin an event, >= 1.

        Returns:
            A probability in (0, 0.5].
        """
        if not (math.isfinite(frame_rate) and frame_rate > 0 and enter_hits >= 1):
            raise ValueError(f"frame_rate {frame_rate} and enter_hits {enter_hits} must be positive")
        return min(0.5, self.false_events_per_hour * enter_hits / (frame_rate * SECONDS_PER_HOUR))

    def triggered_alpha(self) -> float:
        """Return the probability in (0, 0.5] with which one good part may be called NOK."""
        return min(0.5, self.false_nok_per_1000 / PARTS)


@dataclass(frozen=True, slots=True)
class Threshold:
    """A raw threshold and how far the calibration set supports it. A score at or above ``value`` is an anomaly.

    Attributes:
        value: the raw threshold.
        alpha: false-alarm probability per frame that it was fitted for.
        n: calibration scores.
        n_groups: groups among them; equals n where every image is its own group.
        budget_supported: the calibration set is large enough to promise alpha (n_groups >= 1 / alpha - 1).
        smallest_supported_alpha: 1 / (n_groups + 1).
        method: ``empirical`` (an order statistic), ``tail_fit`` (extrapolated) or ``external`` (set from outside).
    """

    value: float
    alpha: float
    n: int
    n_groups: int
    budget_supported: bool
    smallest_supported_alpha: float
    method: Literal["empirical", "tail_fit", "external"]


class _BoundThreshold(BaseModel):
    """Names the bundle and the memory that a raw score belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle_id: str = Field(
        pattern=r"^[0-9a-f]{64}$", title="Bundle", description="Id of the bundle for which the value was chosen."
    )
    memory_version: int = Field(
        0,
        ge=0,
        title="Memory version",
        description="Version of the memory for which the value was chosen; 0 is the one packed in the bundle.",
    )

    product: str | None = Field(
        None,
        max_length=200,
        title="Product",
        description="Of a bundle for several products, the one for which the value was chosen.",
    )

    def _other(self, *, bundle_id: str, memory_version: int, product: str) -> str:
        if bundle_id != self.bundle_id:
            return f"it was set for bundle {self.bundle_id[:12]}, not {bundle_id[:12]}"
        if memory_version != self.memory_version:
            return f"it was set for memory version {self.memory_version}, not {memory_version}"
        if product != (self.product or ""):
            return f"it was set for {self.product or 'no product'}, not {product or 'a bundle of one product'}"
        return ""


class ExternalThreshold(_BoundThreshold):
    """A threshold set from outside; it holds only for the bundle and memory version that it names."""

    value: float = Field(allow_inf_nan=False, title="Value", description="Raw score at and above which a frame is NOK.")

    def mismatch(self, *, bundle_id: str, memory_version: int, product: str = "") -> str:
        """Return why the threshold must not be used here; empty where it may."""
        other = self._other(bundle_id=bundle_id, memory_version=memory_version, product=product)
        return other and f"external threshold ignored: {other}"


class RunTimeThreshold(_BoundThreshold):
    """A threshold given to a running box; it wins over the one in the settings while it holds.

    Attributes:
        value: raw score at and above which a frame is NOK; None for what the budget gives.
        scope: of the camera when it was given, see :attr:`~edge.judgement.verdicts.Judge.scope`; a score under another
            mask or smallest area is another score.
        product_file: digest of the file that the product is of, see
            :attr:`~edge.products.product_file.ProductFile.digest`; empty of one of the bundle's own.
        given_at: UTC, RFC 3339, for people.
    """

    value: float | None = Field(allow_inf_nan=False)
    scope: str = Field("", max_length=64)
    product_file: str = Field("", max_length=64)
    given_at: str = Field("", max_length=40)

    def mismatch(
        self, *, bundle_id: str, memory_version: int, scope: str, product: str = "", product_file: str = ""
    ) -> str:
        """Return why the threshold must not be used here; empty where it may."""
        other = self._other(bundle_id=bundle_id, memory_version=memory_version, product=product)
        if not other and self.product_file != product_file:
            other = f"it was set for another file of product {product}"
        if not other and self.scope != scope:
            other = "the camera's region, mask or smallest area was another one"
        return other and f"threshold given at run time ignored: {other}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which of the thresholds given from outside holds.

    Attributes:
        value: raw; None where the budget decides.
        source: ``run time``, ``settings`` or ``budget``.
        notice: why a threshold that was given is not used; empty where all are.
    """

    value: float | None
    source: Literal["run time", "settings", "budget"]
    notice: str = ""


def choose_threshold(
    *,
    run_time: RunTimeThreshold | None,
    external: ExternalThreshold | None,
    bundle_id: str,
    memory_version: int,
    scope: str,
    product: str = "",
    product_file: str = "",
) -> Chosen:
    """Choose between a threshold given at run time, that of the settings, and the budget, in this order.

    Args:
        run_time: given by a command, with a value or with None for the budget.
        external: of the settings.
        bundle_id: of the bundle in use.
        memory_version: of the memory in use.
        scope: of the camera's region, mask and smallest area.
        product: that is judged; empty in a bundle of one.
        product_file: digest of the file that it is of; empty of one of the bundle's own.
    """
    notice = ""
    if run_time is not None:
        notice = run_time.mismatch(
            bundle_id=bundle_id, memory_version=memory_version, scope=scope, product=product, product_file=product_file
        )
        if not notice:
            return Chosen(run_time.value, "budget" if run_time.value is None else "run time")
        # "None" took something away; where it does not hold, nothing that judges is missing.
        notice = "" if run_time.value is None else notice
    if external is not None:
        other = external.mismatch(bundle_id=bundle_id, memory_version=memory_version, product=product)
        if not other:
            return Chosen(external.value, "settings", notice)
        notice = f"{notice}; {other}" if notice else other
    return Chosen(None, "budget", notice)


def p_value(score: float, scores: npt.NDArray[np.floating]) -> float:
    """Return the conformal p-value (1 + number of calibration scores >= score) / (n + 1), in (0, 1].

    Args:
        score: raw score to be placed; NaN gives NaN.
        scores: float [n], calibration scores, any order.
    """
    if math.isnan(score):
        return float("nan")
    return (1 + int(np.count_nonzero(scores >= score))) / (scores.size + 1)


def fit_threshold(scores: npt.NDArray[np.floating], groups: npt.NDArray[np.str_] | None, alpha: float) -> Threshold:
    """Find the raw threshold that good images reach with probability at most ``alpha``.

    Images of one group (one part, one crop source) are not independent, so every group weighs the same, its images
    share that weight, and what the set can support is counted in groups: hierarchical conformal prediction (Lee,
    Barber and Willett 2023, arXiv:2306.06342). With one image per group this is the ceil((n + 1)(1 - alpha))-th
    order statistic. Where the groups are too few (n_groups < 1 / alpha - 1) a tail is fitted, see :func:`_tail`; the
    result is then an extrapolation and never below the highest calibration score.

    Args:
        scores: float [n], raw scores of held-out good images.
        groups: unicode [n]; None when every image is independent.
        alpha: false-alarm probability, 0 < alpha < 1.

    Returns:
        The threshold; the next float above the order statistic, since a score that equals it is still good.

    Raises:
        DataError: no scores, a score that is NaN or infinite, groups of another length, or fewer than 6 scores where
            the tail must be extrapolated.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha} is not in (0, 1)")
    values, weights, n_groups = _weighted(scores, groups)
    floor = 1 / (n_groups + 1)
    supported = _at_least(alpha, floor)
    if supported:
        # Weight 1 / (K + 1) is reserved for the group to come, whose scores may be anywhere above.
        value = _quantile(values, weights * n_groups / (n_groups + 1), 1 - alpha)
    elif values.size < MIN_TAIL_SCORES:
        raise DataError(
            f"{values.size} calibration scores cannot support a false-alarm probability of {alpha:.2g} (the smallest "
            f"is {floor:.2g}) and at least {MIN_TAIL_SCORES} are needed to extrapolate; calibrate with more good data"
        )
    else:
        value = max(_tail(values, weights, n_groups, alpha), float(values[-1]))
    return Threshold(
        value=float(np.nextafter(value, np.inf)),
        alpha=alpha,
        n=int(values.size),
        n_groups=n_groups,
        budget_supported=supported,
        smallest_supported_alpha=floor,
        method="empirical" if supported else "tail_fit",
    )


def leave_level(
    scores: npt.NDArray[np.floating], groups: npt.NDArray[np.str_] | None, quantile: float, threshold: float
) -> float:
    """Return the raw score below which a frame counts as calm: a quantile of good scores, at most the threshold.

    A quantile needs no positive scores, unlike a fraction of the threshold.

    Args:
        scores: float [n], raw scores of held-out good images.
        groups: unicode [n] or None, as in :func:`fit_threshold`.
        quantile: in (0, 1).
        threshold: the raw threshold in force.

    Raises:
        DataError: as in :func:`fit_threshold`.
    """
    values, weights, _ = _weighted(scores, groups)
    # As for the threshold, a score that equals the quantile is still calm.
    return min(float(np.nextafter(_quantile(values, weights, quantile), np.inf)), threshold)


def enter_level(
    scores: npt.NDArray[np.floating], groups: npt.NDArray[np.str_] | None, quantile: float | None, threshold: float
) -> float:
    """Return the raw score at and above which a frame is a hit that may begin an event, at least the threshold.

    Args:
        scores: float [n], raw scores of held-out good images.
        groups: unicode [n] or None, as in :func:`fit_threshold`.
        quantile: of good scores that do not reach the level, in (0, 1); None for the threshold itself.
        threshold: the raw threshold in force.

    Raises:
        DataError: as in :func:`fit_threshold`.
    """
    if quantile is None:
        return threshold
    return max(threshold, fit_threshold(scores, groups, 1 - quantile).value)


def _at_least(left: float, right: float) -> bool:
    # 1 - 0.9 < 0.1 in binary; a budget must not be refused for that.
    return left >= right or math.isclose(left, right, rel_tol=1e-9)


def _weighted(
    scores: npt.NDArray[np.floating], groups: npt.NDArray[np.str_] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], int]:
    """Sort scores and weigh them so that groups weigh the same and all weights sum to 1."""
    values = np.asarray(scores, dtype=np.float64).ravel()
    if values.size == 0:
        raise DataError("no calibration scores; export the bundle again with held-out good data")
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise DataError(f"{bad} of {values.size} calibration scores are NaN or infinite; export the bundle again")
    order = np.argsort(values, kind="stable")
    if groups is None:
        return values[order], np.full(values.size, 1 / values.size), int(values.size)
    if groups.size != values.size:
        raise DataError(f"{groups.size} groups for {values.size} calibration scores; export the bundle again")
    names, member, count = np.unique(groups.ravel(), return_inverse=True, return_counts=True)
    weights = 1 / (count[member].astype(np.float64) * names.size)
    return values[order], weights[order], int(names.size)


def _quantile(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], level: float) -> float:
    """Return the smallest value at which the cumulative weight reaches ``level``."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, level - 1e-9, side="left"))
    return float(values[min(index, values.size - 1)])


def _tail(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], n_groups: int, alpha: float) -> float:
    """Extrapolate a quantile with a generalised Pareto tail that carries its own estimation error.

    The shape is estimated by probability-weighted moments (Hosking and Wallis 1987, Technometrics 29:339) and pulled
    towards the exponential tail by 10 pseudo-observations. For an exponential tail known from k exceedances, the
    predictive distribution of the next one is a Pareto (Lomax) tail of shape 1 / k; that 1 / k is added. Simulated at
    alpha 1e-3 with 30 to 200 scores, the true probability is 0.4 (normal) to 2.4 (exponential, lognormal) times
    alpha; with 6 to 12 scores 0 to 2.3 times. Fewer groups than 6 say nothing of the spread between groups; their
    images are then treated as independent.
    """
    if n_groups < MIN_TAIL_SCORES:
        n_groups = int(values.size)
        weights = np.full(values.size, 1 / values.size)
    share = min(max(TAIL_FRACTION, TAIL_SCORES / n_groups), 1 - 1 / n_groups)
    base = _quantile(values, weights, 1 - share)
    above = values > base
    probability = float(weights[above].sum())
    if probability == 0:
        return base
    excess, weight = values[above] - base, weights[above] / probability
    mean = float((excess * weight).sum())
    exceedances = max(1.0, probability * n_groups)
    # Plotting positions at the middle of each weight; a0 = E[X], a1 = E[X (1 - F(X))], shape = 2 - a0 / (a0 - 2 a1).
    position = np.cumsum(weight) - weight / 2
    a1 = float((excess * weight * (1 - position)).sum())
    raw = 2 - mean / (mean - 2 * a1) if mean > 2 * a1 else SHAPE_RANGE[0]
    shape = float(np.clip(raw, *SHAPE_RANGE)) * exceedances / (exceedances + SHAPE_PRIOR)
    scale = mean * (1 - shape)
    shape += 1 / exceedances
    ratio = max(probability / alpha, 1.0)
    growth = math.log(ratio) if abs(shape) < 1e-6 else (ratio**shape - 1) / shape  # noqa: PLR2004 (its limit)
    return base + scale * growth
