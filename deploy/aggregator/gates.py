"""Whether an update may enter the fleet's memory: is it of this world's scale, and would it blind the fleet?

Pure functions of arrays; they must not know rounds, files or who is told about a quarantine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deploy.aggregator.influence import Trial
from deploy.aggregator.scale import Peers, median_distance, scale_of, scale_of_update
from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.aggregator.canaries import Canaries
    from deploy.aggregator.scale import Scale
    from edge.federation.update import MemoryUpdate
    from edge.memory.bank import MemoryBank


class GateLimits(BaseModel):
    """Limits of the gate.

    The defaults were chosen on generated surfaces, so that boxes of surfaces and light that the reference had not
    seen passed with room to spare; ``benchmarks/poison.py`` measures what they reach on other data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spread: float = Field(
        4.0,
        gt=1,
        title="Spread",
        description="Most times the reference's (and the peers' median) spread that an update's rows may be spread.",
    )
    distance: float = Field(
        8.0,
        gt=1,
        title="Distance",
        description="Most spreads of the reference that the median row may lie from the reference's mean.",
    )
    grain: float = Field(
        0.95,
        gt=0,
        title="Grain",
        description="Most distance between neighbouring rows as a share of the spread; patches of a surface lie "
        "closer to each other than noise does.",
    )
    counts: float = Field(
        8.0,
        gt=1,
        title="Counts",
        description="Most times the peers' median that the patches claimed for each frame may be.",
    )
    mads: float = Field(
        6.0,
        gt=0,
        title="Deviations",
        description="Median absolute deviations of the peers (of logarithms, scaled to a normal deviation) within "
        "which spread and counts pass even beyond those ratios.",
    )
    pull_ratio: float = Field(
        1.0,
        ge=0,
        title="Pull ratio",
        description="Most that canary defects may be drawn nearer, as a multiple of what good patches are drawn.",
    )
    pull_slack: float = Field(
        0.08,
        ge=0,
        title="Pull slack",
        description="What they may be drawn nearer beyond that, as a share of the alarm threshold.",
    )
    foreign_slack: float = Field(
        0.2,
        ge=0,
        title="Foreign slack",
        description="The same for an update of another product than the canaries', whose good patches are no measure.",
    )
    silenced: float = Field(
        0.4,
        gt=0,
        le=1,
        title="Silenced",
        description="Most canary defects, as a share of those that alarm, that may cease to alarm.",
    )
    kin: float = Field(
        0.03,
        ge=0,
        lt=1,
        title="Kin of defects",
        description="Most rows, as a share of an update's, that are new to the reference and lie nearer to a canary "
        "defect than to anything good. Not asked of another product than the canaries'.",
    )
    kin_reach: float = Field(
        1.2,
        gt=0,
        title="Kin reach",
        description="Alarm thresholds within which a row counts as near to a canary defect.",
    )
    fewest_canaries: int = Field(
        20,
        ge=1,
        title="Fewest canaries",
        description="With fewer canary defects that alarm, nothing is concluded from canaries.",
    )


@dataclass(frozen=True, slots=True)
class Examination:
    """What came of an update at the gate.

    Attributes:
        accepted: whether it may be merged; else it goes to quarantine and an operator is told.
        reasons: one sentence for each limit that it broke; empty where accepted.
        figures: what was measured, by name, finite. ``canaries`` is the number of canary defects that alarmed and were
            tried; below ``fewest_canaries`` (0 where there are none) nothing was concluded from them, which an
            operator should be shown.
    """

    accepted: bool
    reasons: tuple[str, ...]
    figures: dict[str, float]


def examine(
    update: MemoryUpdate,
    *,
    reference: MemoryBank | None,
    canaries: Canaries | None,
    peers: Sequence[MemoryUpdate],
    limits: GateLimits | None = None,
) -> Examination:
    """Examine one update; see :func:`examine_all`.

    Args:
        update: as decoded.
        reference: a bank that is trusted.
        canaries: of the update's embedding space.
        peers: updates of the same pool; those of the same box are passed over.
        limits: None is the defaults.

    Raises:
        DataError: the reference, the canaries or a peer do not fit the update's embedding space.
    """
    others = [peer for peer in peers if peer.box != update.box]
    return examine_all([update, *others], reference=reference, canaries=canaries, limits=limits, first=1)[0]


def examine_all(
    updates: Sequence[MemoryUpdate],
    *,
    reference: MemoryBank | None,
    canaries: Canaries | None,
    limits: GateLimits | None = None,
    first: int | None = None,
) -> tuple[Examination, ...]:
    """Examine the updates of a pool, each beside those of all other boxes, in time linear in their number.

    Scale: the spread of an update's rows about their mean, beside the reference and beside the median and MAD of
    other boxes; how far they lie from the reference; how close to each other; patches claimed for each frame. Medians
    and MAD, because with m of n boxes colluding no deviation from the mean exceeds sqrt((n - m) / m). Wide, because a
    new product or light is far, too.

    Canaries: an update is tried on defects that alarm under the reference. It is refused where it draws them nearer
    than it draws good patches, where it silences them, or where many of its rows are new to the reference and nearer
    to a canary defect than to anything good. Far junk does not blind a memory, defect rows within the good rows'
    range do, and no clipping or trimming tells these from a rare good condition. With a trusted ``reference`` boxes
    that collude cannot cover for each other. Without, each update is tried against all other boxes, where they can,
    and its rows are not judged one by one.

    Args:
        updates: of one pool.
        reference: a bank that is trusted: the trainer's, or the last one accepted. An attacker who stays below the
            limits every round shifts the latter, so the trainer's is the safer one.
        canaries: of the same embedding space. Where they are of another product than an update, its rows are not
            judged one by one and the pull has more slack; canaries without a product are taken for the pool's own.
        limits: None is the defaults.
        first: examine only this many, the first; the others are peers. None is all.

    Returns:
        One examination for each, in their order.

    Raises:
        DataError: embedding ids or widths differ between updates, reference and canaries.
    """
    _refuse(updates, reference, canaries)
    limits = limits if limits is not None else GateLimits()
    scales = [scale_of_update(update) for update in updates]
    peers = Peers(updates, scales)
    trial = None
    if canaries is not None:
        sane = [update for update, scale in zip(updates, scales, strict=True) if scale.finite]
        rows = None if reference is None else reference.rows
        trial = Trial(canaries, reference=rows, updates=sane, fewest=limits.fewest_canaries)
    done = []
    for update, scale in zip(updates[:first], scales, strict=False):  # only the first are asked for
        found = _Finding()
        if scale.finite:
            _judge_scale(found, update, scale, reference, limits)
            _judge_beside_peers(found, update, scale, peers, limits)
            if trial is not None and canaries is not None:
                _judge_influence(found, update, trial, canaries, limits)
        else:
            found.reasons.append("rows are not finite or lie beyond float16")
        done.append(Examination(not found.reasons, tuple(found.reasons), found.figures))
    return tuple(done)


@dataclass(slots=True)
class _Finding:
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def limit(self, name: str, value: float, most: float, meaning: str) -> None:
        """Note a figure; where it is beyond its limit, a reason as well."""
        self.figures[name] = float(value)
        if value > most:
            self.reasons.append(f"{name} is {value:.3g}, at most {most:.3g} passes: {meaning}")


def _judge_scale(
    found: _Finding, update: MemoryUpdate, scale: Scale, reference: MemoryBank | None, limits: GateLimits
) -> None:
    found.limit("grain", scale.grain, limits.grain, "its rows lie as far apart as noise does")
    if reference is None:
        return
    world = scale_of(reference.rows).spread
    if world > 0:
        found.limit("spread", scale.spread / world, limits.spread, "its rows are spread far beyond the reference's")
        away = median_distance(update.rows, reference.rows.mean(0, dtype=np.float64)) / world
        found.limit("distance", away, limits.distance, "its rows lie far from the reference")


def _judge_beside_peers(found: _Finding, update: MemoryUpdate, scale: Scale, peers: Peers, limits: GateLimits) -> None:
    for name, own, ratio in (
        ("spread", scale.spread, limits.spread),
        ("per_frame", scale.per_frame, limits.counts),
    ):
        usual = peers.usual(name, update.box)
        if usual is not None and own > 0:
            # In logarithms: both are scales, which differ by factors.
            most = math.exp(min(max(math.log(ratio), limits.mads * usual.deviation), 700.0))  # still a float
            found.limit(f"{name}_to_peers", own / math.exp(usual.middle), most, "it is far above what other boxes send")


def _judge_influence(
    found: _Finding, update: MemoryUpdate, trial: Trial, canaries: Canaries, limits: GateLimits
) -> None:
    own = canaries.product in {"", update.product}
    seen = trial.influence(update, reach=limits.kin_reach)
    found.figures["canaries"] = float(seen.canaries)
    if seen.canaries < limits.fewest_canaries:
        return
    found.figures["clean_pull"] = seen.clean_pull
    most = limits.pull_ratio * seen.clean_pull + (limits.pull_slack if own else limits.foreign_slack)
    found.limit("canary_pull", seen.canary_pull, most, "it draws known defects nearer, and good patches less")
    found.limit("silenced", seen.silenced, limits.silenced, "with it, known defects cease to alarm")
    # Rows of a product that neither reference nor canaries know may lie nearer to a defect than to anything good.
    found.limit("kin", seen.kin, limits.kin if own else 1.0, "its new rows look like defects")


def _refuse(updates: Sequence[MemoryUpdate], reference: MemoryBank | None, canaries: Canaries | None) -> None:
    if not updates:
        raise DataError("there is no update to examine; wait until a box has sent one")
    first = updates[0]
    width = first.rows.shape[1]
    for update in updates:
        if update.embedding_id != first.embedding_id or update.rows.shape[1] != width or not len(update.rows):
            raise DataError(
                f"{first.box} and {update.box} have embedding ids {first.embedding_id[:12]} and "
                f"{update.embedding_id[:12]}, rows {list(first.rows.shape)} and {list(update.rows.shape)}; examine "
                "each embedding space in a pool of its own"
            )
    if reference is not None and reference.width != width:
        raise DataError(
            f"the reference has {reference.width} channels, updates have {width}; give a bank of this embedding space"
        )
    if canaries is not None and (canaries.embedding_id != first.embedding_id or canaries.width != width):
        raise DataError(
            f"the canaries are of embedding id {canaries.embedding_id[:12]} with {canaries.width} channels, updates "
            f"of {first.embedding_id[:12]} with {width}; make canaries with the bundle of these boxes"
        )
