"""The gate between a trained module and a bundle: what an engine computes must judge as the module judged.

Pure rules over scores and maps; it must not know how graphs are made or run. It can fail, and says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from deploy.metrics import image_auroc
from edge.bundle import Engine, Precision
from edge.errors import DataError, GateError

Canvases = npt.NDArray[Any]

MakeDefects = Callable[[float], Canvases]
"""Called with a contrast in (0, 1]; returns canvases as the good ones are, the same n and the same defects every time,
only fainter at a lower contrast. Row i is made from good image i modulo their number."""

Scorer = Callable[[Canvases], npt.NDArray[np.float32]]
"""From canvases [n, ...] to raw image scores float32 [n]."""

Jitter = Callable[[Canvases, int, int], tuple[Canvases, npt.NDArray[np.int64]]]
"""Called with good canvases, a number and a seed; returns what :func:`jitter` does, of canvases that are no images."""


LEAST_GOOD_IMAGES = 6
"""Held-out good images that the gate needs: an interquartile range of fewer says nothing."""


@dataclass(frozen=True, slots=True)
class ParityRules:
    """The limits of the gate, and how much it looks at.

    Attributes:
        shift: largest |median of paired score differences| on good images, in float32 interquartile ranges.
        flipped: largest share of good samples that one path flags and the other does not.
        alarm_rate: share of good samples that each path flags, each at its own threshold. At 0.02 unrelated scores
            would flip 4 %, so the limit of 1 % demands that three of four alarms are the same.
        auroc_drop: largest loss of I-AUROC on low-contrast defects.
        auroc_window: where float32 should be on them: neither sure of everything nor guessing.
        map_error: largest |map - torch| of a float32 engine, relative to the largest |torch| value of that image.
        worst_shift: likewise of a single product, where there are several; ``shift`` is then of their mean.
        worst_drop: likewise of I-AUROC, beyond twice its standard error: of many products with few images each, one is
            far off by chance.
        rerouted: largest share of good samples that a path gives to another expert than torch does.
        unknown: how much larger the share of good samples may be that a path holds for an unknown product.
        good_samples: good samples looked at; jittered copies fill up what the held-out images lack.
        defect_samples: defective samples looked at, at most.
    """

    shift: float = 0.25
    flipped: float = 0.01
    alarm_rate: float = 0.02
    auroc_drop: float = 0.005
    auroc_window: tuple[float, float] = (0.80, 0.95)
    map_error: float = 1e-3
    worst_shift: float = 0.5
    worst_drop: float = 0.02
    rerouted: float = 0.01
    unknown: float = 0.02
    good_samples: int = 400
    defect_samples: int = 200


class ProductParity(BaseModel):
    """Figures of one product on one engine and precision, as in :class:`PathParity`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shift_in_iqr: float
    auroc: float
    auroc_drop: float
    auroc_drop_se: float | None


class PathParity(BaseModel):
    """Figures of one engine and precision against torch in float32. None: not measured or not finite.

    ``rerouted`` and ``unknown`` are of a head with a router: the share of good samples that go to another expert, and
    how many more of them are held for an unknown product. Of several products ``median_shift``, ``shift_in_iqr``,
    ``auroc`` and ``auroc_drop`` are means over them, and ``products`` has those of each, by index.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Engine
    precision: Precision
    map_error: float | None
    median_shift: float | None
    shift_in_iqr: float | None
    flipped: float | None
    auroc: float | None
    auroc_drop: float | None
    auroc_drop_se: float | None
    rerouted: float | None = None
    unknown: float | None = None
    products: list[ProductParity] = []
    refusals: list[str]


class ParityReport(BaseModel):
    """What the gate measured; goes into the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: dict[str, Any]
    good_images: int
    good_samples: int
    defect_samples: int
    good_iqr: float
    contrast: float
    contrast_in_window: bool
    reference_auroc: float
    int8_head: bool
    dropped: list[str]
    paths: list[PathParity]
    passed: bool
    refusals: list[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """The images that every path is measured on; the same for all, so differences are paired.

    Attributes:
        good: uint8 [n, Hc, Wc, 3]; the first ``images`` are the held-out images themselves, the rest jittered copies.
        good_base: int64 [n], which held-out image a row comes from.
        defective: uint8 [m, Hc, Wc, 3].
        defect_base: int64 [m].
        images: how many held-out images there are.
        contrast: of the defects.
        in_window: whether float32 gave an I-AUROC inside the window at that contrast.
        good_products: int64 [n], which product each good row shows; None where there is one.
        defect_products: int64 [m].
    """

    good: Canvases
    good_base: npt.NDArray[np.int64]
    defective: Canvases
    defect_base: npt.NDArray[np.int64]
    images: int
    contrast: float
    in_window: bool
    good_products: npt.NDArray[np.int64] | None = None
    defect_products: npt.NDArray[np.int64] | None = None

    def parts(self) -> list[tuple[Sample, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
        """Return the sample of each product, and which good and defective rows it has; itself where there is one."""
        if self.good_products is None or self.defect_products is None:
            whole = np.ones(len(self.good), bool), np.ones(len(self.defective), bool)
            return [(self, *whole)]
        found = []
        for product in np.unique(self.good_products):
            good, bad = self.good_products == product, self.defect_products == product
            part = Sample(
                good=self.good[good], good_base=self.good_base[good], defective=self.defective[bad],
                defect_base=self.defect_base[bad], images=int(good[: self.images].sum()), contrast=self.contrast,
                in_window=self.in_window,
            )  # fmt: skip
            found.append((part, good, bad))
        return found


@dataclass(frozen=True, slots=True)
class PathScores:
    """What one path said of a :class:`Sample`.

    Attributes:
        good: float32 [n].
        defective: float32 [m].
        maps: float32 [k, h, w] of the first k good images, to compare maps; k may be 0.
        routes: float32 [n, E] of the good samples; None where the head has no router.
    """

    good: npt.NDArray[np.float32]
    defective: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))
    routes: npt.NDArray[np.float32] | None = None


def jitter(canvases: Canvases, count: int, seed: int) -> tuple[Canvases, npt.NDArray[np.int64]]:
    """Fill a set up to ``count`` with copies that are moved by up to 4 pixels, lit by +-3 % and noisy (sigma 1).

    No flips and no turns: those would not be good images of every product.

    Returns:
        uint8 [max(count, n), Hc, Wc, 3], the originals first, and int64 the index of the original of each.
    """
    n = len(canvases)
    base = np.concatenate([np.arange(n), np.arange(max(count - n, 0)) % n]).astype(np.int64)
    generator = np.random.default_rng(seed)
    copies = []
    for index in base[n:]:
        dy, dx = generator.integers(-4, 5, 2)
        padded = np.pad(canvases[index], ((4, 4), (4, 4), (0, 0)), mode="reflect")
        height, width = canvases.shape[1:3]
        moved = padded[4 + dy : 4 + dy + height, 4 + dx : 4 + dx + width].astype(np.float32)
        noisy = moved * generator.uniform(0.97, 1.03) + generator.standard_normal(moved.shape, dtype=np.float32)
        copies.append(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    return np.concatenate([canvases, np.stack(copies)]) if copies else canvases, base


def draw_sample(
    good: Canvases,
    make_defects: MakeDefects,
    score: Scorer,
    *,
    rules: ParityRules | None = None,
    seed: int = 0,
    copies: Jitter | None = None,
    products: npt.NDArray[np.int64] | None = None,
) -> Sample:
    """Choose the contrast on the float32 path and fill the sample up.

    The contrast is bisected (12 steps, on a logarithmic scale from 0.01 to 1) for the middle of the window. Where
    even 1 is too faint, or 0.01 too plain, the nearest is taken and recorded.

    Args:
        good: uint8 [n, Hc, Wc, 3], or what another modality's canvases are: held-out good canvases, n >= 6.
        make_defects: see :data:`MakeDefects`.
        score: the float32 path.
        rules: limits and counts.
        seed: of the jitter.
        copies: makes the jittered copies; None for images.
        products: int64 [n], which product each good canvas shows; None where there is one. The window is then of the
            mean of their I-AUROC, and each has its part of the defects.

    Raises:
        DataError: fewer than 6 good images, or the callback returns images of another size.
    """
    rules = rules or ParityRules()
    if len(good) < LEAST_GOOD_IMAGES:
        raise DataError(
            f"{len(good)} held-out good images; the parity gate needs at least {LEAST_GOOD_IMAGES}, hold out more"
        )
    good_scores = score(good)

    def auroc_at(contrast: float) -> float:
        canvases = make_defects(contrast)
        if canvases.dtype != good.dtype or canvases.shape[1:] != good.shape[1:] or not len(canvases):
            raise DataError(
                f"defects are {canvases.dtype} {canvases.shape}, expected {good.dtype} {good.shape[1:]} each"
            )
        found = score(canvases)
        if products is None:
            return _auroc(good_scores, found)
        shown = np.resize(products, len(found))
        return float(np.mean([_auroc(good_scores[products == p], found[shown == p]) for p in np.unique(products)]))

    low, high = rules.auroc_window
    contrast, reached = _bisect(auroc_at, (low + high) / 2, window=(low, high))
    defective = make_defects(contrast)
    drawn = _drawn(np.resize(np.zeros(1) if products is None else products, len(defective)), rules.defect_samples)
    defective, defect_base = defective[drawn], (drawn % len(good)).astype(np.int64)
    samples, base = (jitter if copies is None else copies)(good, rules.good_samples, seed)
    return Sample(
        good=samples, good_base=base, defective=defective, defect_base=defect_base, images=len(good),
        contrast=contrast, in_window=low <= reached <= high,
        good_products=None if products is None else products[base],
        defect_products=None if products is None else products[defect_base],
    )  # fmt: skip


def _drawn(products: npt.NDArray[Any], most: int) -> npt.NDArray[np.int64]:
    """Return the first rows of each product, in order, ``most`` in all or a few more."""
    known = np.unique(products)
    each = -(-most // len(known))
    return np.sort(np.concatenate([np.flatnonzero(products == one)[:each] for one in known])).astype(np.int64)


def _bisect(
    auroc_at: Callable[[float], float], target: float, *, window: tuple[float, float], steps: int = 12
) -> tuple[float, float]:
    """Return the contrast whose I-AUROC is nearest the target, and that I-AUROC."""
    left, right = math.log(0.01), 0.0
    best = (1.0, auroc_at(1.0))
    if best[1] <= window[1]:
        return best  # contrast cannot be raised further
    # A fifth of the window from its middle is as good as its middle.
    near = (window[1] - window[0]) / 5
    for _ in range(steps):
        contrast = math.exp((left + right) / 2)
        value = auroc_at(contrast)
        if abs(value - target) < abs(best[1] - target):
            best = (contrast, value)
        if abs(value - target) <= near:
            break
        left, right = (left, math.log(contrast)) if value > target else (math.log(contrast), right)
    return best


def judge(
    sample: Sample,
    reference: PathScores,
    paths: dict[tuple[Engine, Precision], PathScores],
    *,
    rules: ParityRules | None = None,
    optional: Sequence[Precision] = (),
    int8_head: bool = True,
) -> ParityReport:
    """Compare every path with the reference.

    On good images: |median(path - reference)| over the held-out images themselves is at most ``rules.shift`` of the
    reference's interquartile range; of all good samples at most ``rules.flipped`` are flagged by one and not by the
    other, where each flags the ``alarm_rate`` share with its own highest scores, as calibration would. On the
    defects the I-AUROC of the path is at most ``rules.auroc_drop`` below the reference's on the same images; its
    standard error (paired, DeLong, one base image with all its copies as one unit) is recorded beside it. A float32
    path must also give the reference's maps to ``rules.map_error``. Where there is a router, at most ``rules.rerouted``
    of the good samples may go to another expert, and ``rules.unknown`` more of them be refused as unknown.

    Args:
        sample: what was judged.
        reference: of torch in float32.
        paths: of each engine and precision.
        rules: the limits.
        optional: precisions that are dropped, not refused, when they fail.
        int8_head: recorded in the report.

    Returns:
        The report; ``passed`` when no path that is not optional was refused.
    """
    rules = rules or ParityRules()
    parts = sample.parts()
    iqr = float(np.mean([_iqr(reference.good[good][: part.images]) for part, good, _ in parts]))
    auroc = float(
        np.mean([_auroc(reference.good[good][: part.images], reference.defective[bad]) for part, good, bad in parts])
    )
    results = [
        _judge_path(key, scores, reference=reference, sample=sample, rules=rules)
        for key, scores in sorted(paths.items())
    ]
    failed = [result for result in results if result.refusals]
    refusals = [text for result in failed if result.precision not in optional for text in result.refusals]
    return ParityReport(
        rules={name: getattr(rules, name) for name in rules.__slots__},
        good_images=sample.images, good_samples=len(sample.good), defect_samples=len(sample.defective),
        good_iqr=iqr, contrast=sample.contrast, contrast_in_window=sample.in_window,
        reference_auroc=auroc, int8_head=int8_head,
        dropped=[f"{r.engine.value} {r.precision.value}" for r in failed if r.precision in optional],
        paths=results, passed=not refusals, refusals=refusals,
    )  # fmt: skip


def require(report: ParityReport) -> None:
    """Raise what the gate refused.

    Raises:
        GateError: with every refused figure.
    """
    if report.passed:
        return
    cure = (
        "; pack without it: --precision float32"
        if all(Precision.INT8.value in text for text in report.refusals)
        else "; the exported graph does not compute what the module computes"
    )
    raise GateError("parity gate refused the bundle: " + "; ".join(report.refusals) + cure)


def _judge_path(
    key: tuple[Engine, Precision],
    path: PathScores,
    *,
    reference: PathScores,
    sample: Sample,
    rules: ParityRules,
) -> PathParity:
    engine, precision = key
    name = f"{engine.value} {precision.value}"
    if not (np.isfinite(path.good).all() and np.isfinite(path.defective).all()):
        return PathParity(
            engine=engine, precision=precision, map_error=None, median_shift=None, shift_in_iqr=None, flipped=None,
            auroc=None, auroc_drop=None, auroc_drop_se=None, refusals=[f"{name}: scores are not finite"],
        )  # fmt: skip
    found = [
        _figures(_part(path, good, bad), _part(reference, good, bad), part, rules.alarm_rate)
        for part, good, bad in sample.parts()
    ]
    shift, shift_in_iqr, auroc, drop = (
        float(np.mean([getattr(one, name) for one in found])) for name in ("shift", "shift_in_iqr", "auroc", "drop")
    )
    flipped = sum(one.flipped for one in found) / len(path.good)
    several = len(found) > 1
    map_error = _map_error(path.maps, reference.maps) if precision is Precision.FLOAT32 and len(path.maps) else None
    rerouted, unknown = _routing(path.routes, reference.routes)
    checks = (
        (shift_in_iqr, rules.shift, "median score shift on good images is {:.3f} of the float32 IQR"),
        (flipped, rules.flipped, "flipped decisions on good images {:.4f}"),
        (drop, rules.auroc_drop, "I-AUROC on low-contrast defects drops by {:.4f}"),
        (
            max(one.shift_in_iqr for one in found) if several else None,
            rules.worst_shift,
            "median score shift on good images of one product is {:.3f} of the float32 IQR",
        ),
        (
            max(one.drop - 2 * (one.drop_se or 0.0) for one in found) if several else None,
            rules.worst_drop,
            "I-AUROC on low-contrast defects of one product drops by {:.4f} beyond chance",
        ),
        (map_error, rules.map_error, "maps differ from torch by {:.2e} relative"),
        (rerouted, rules.rerouted, "good images given to another expert {:.4f}"),
        (unknown, rules.unknown, "more good images held for an unknown product {:.4f}"),
    )
    refusals = [
        f"{name}: {text.format(value)} (limit {limit})"
        for value, limit, text in checks
        if value is not None and not value <= limit
    ]
    return PathParity(
        engine=engine, precision=precision, map_error=map_error, median_shift=shift, shift_in_iqr=shift_in_iqr,
        flipped=flipped, auroc=auroc, auroc_drop=drop, auroc_drop_se=_mean_error([one.drop_se for one in found]),
        rerouted=rerouted, unknown=unknown, refusals=refusals,
        products=[
            ProductParity(
                shift_in_iqr=one.shift_in_iqr, auroc=one.auroc, auroc_drop=one.drop, auroc_drop_se=one.drop_se
            ) for one in found
        ] if several else [],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Figures:
    """Of one product: see :class:`PathParity`; ``flipped`` counts samples."""

    shift: float
    shift_in_iqr: float
    flipped: int
    auroc: float
    drop: float
    drop_se: float | None


def _figures(path: PathScores, reference: PathScores, sample: Sample, alarm_rate: float) -> _Figures:
    originals = slice(0, sample.images)
    shift = float(np.median(path.good[originals].astype(np.float64) - reference.good[originals]))
    # Copies are harder than the images that the contrast was set on; they count for flipped decisions only.
    auroc = _auroc(path.good[originals], path.defective)
    return _Figures(
        shift=shift,
        shift_in_iqr=abs(shift) / max(_iqr(reference.good[originals]), 1e-12),
        flipped=int(np.sum(_flags(path.good, alarm_rate) != _flags(reference.good, alarm_rate))),
        auroc=auroc,
        drop=_auroc(reference.good[originals], reference.defective) - auroc,
        drop_se=_drop_error(reference, path, sample),
    )


def _part(scores: PathScores, good: npt.NDArray[np.bool_], bad: npt.NDArray[np.bool_]) -> PathScores:
    return PathScores(good=scores.good[good], defective=scores.defective[bad])


def _iqr(scores: npt.NDArray[np.float32]) -> float:
    quartiles = np.percentile(scores, (25, 75))
    return float(quartiles[1] - quartiles[0])


def _mean_error(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of a mean of independent figures."""
    known = [one for one in errors if one is not None]
    return math.sqrt(sum(one * one for one in known)) / len(errors) if len(known) == len(errors) else None


def _flags(scores: npt.NDArray[np.float32], rate: float) -> npt.NDArray[np.bool_]:
    """Flag the ``rate`` share with the highest scores; ties go by order, so that both paths flag equally many."""
    flags = np.zeros(len(scores), bool)
    flags[np.argsort(-scores, kind="stable")[: max(1, round(rate * len(scores)))]] = True
    return flags


def _map_error(maps: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    if maps.shape != reference.shape or not np.isfinite(maps).all():
        return float("inf")
    peak = np.maximum(np.abs(reference).max((1, 2)), 1e-12)
    return float((np.abs(maps - reference).max((1, 2)) / peak).max())


def _routing(
    routes: npt.NDArray[np.float32] | None, reference: npt.NDArray[np.float32] | None
) -> tuple[float | None, float | None]:
    """Return the share of samples that go to another expert, and how many more are held for unknown."""
    if reference is None:
        return None, None
    if routes is None or routes.shape != reference.shape or not np.isfinite(routes).all():
        return 1.0, 1.0
    unknown = float(np.mean(routes.max(1) < 0) - np.mean(reference.max(1) < 0))
    return float(np.mean(routes.argmax(1) != reference.argmax(1))), unknown


def _auroc(good: npt.NDArray[np.float32], defective: npt.NDArray[np.float32]) -> float:
    labels = np.repeat([False, True], [len(good), len(defective)])
    value = image_auroc(labels, np.concatenate([good, defective]))
    return float("nan") if value is None else value


def _drop_error(reference: PathScores, path: PathScores, sample: Sample) -> float | None:
    """Standard error of the paired I-AUROC difference: DeLong's components, averaged per base image first."""
    gained = [_components(scores.good[: sample.images], scores.defective) for scores in (reference, path)]
    variance = 0.0
    for index, base in ((0, sample.good_base[: sample.images]), (1, sample.defect_base)):
        difference = gained[0][index] - gained[1][index]
        groups = np.unique(base, return_inverse=True)[1]
        means = np.bincount(groups, difference) / np.bincount(groups)
        if len(means) < 2:  # noqa: PLR2004 (no variance of one)
            return None
        variance += float(means.var(ddof=1)) / len(means)
    return math.sqrt(variance)


def _components(
    good: npt.NDArray[np.float32], defective: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    wins = (defective[None, :] > good[:, None]) + 0.5 * (defective[None, :] == good[:, None])
    return wins.mean(1), wins.mean(0)
