"""Follower: one camera's moments, from judged frame to the next frame's look. No clock, no thread, no file of its own.

What it decides is in :mod:`running` (the estimate), :mod:`freeze` (when nothing is learned) and :mod:`routing`.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.adaptation.certain import certain
from edge.adaptation.correction import MomentCorrection
from edge.adaptation.follower_state import ExpertHeader, Header, decode, encode, fingerprint
from edge.adaptation.freeze import AlarmWindow
from edge.adaptation.look import Look
from edge.adaptation.routing import Switch
from edge.adaptation.running import Running, Taken
from edge.adaptation.shift import shift_of
from edge.errors import AdaptationError
from edge.frames import Decision
from edge.products.recipes import CameraProducts, RecipeHistory

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.adaptation.moments import Moments, Reference
    from edge.adaptation.settings import AdaptationSettings
    from edge.frames import Frame, JudgedFrame, Prediction

    Route = npt.NDArray[np.float32]

_DRIFT_OVER = 0.9  # the drift notice is taken back below this share of its level


class Phase(str, Enum):
    """What a camera's follower does.

    ``settling``: averages what it sees since a reset or a change of recipe, alarming frames too.
    ``following``: learns from frames that do not alarm. ``frozen``: too many alarm; it learns nothing.
    """

    SETTLING = "settling"
    FOLLOWING = "following"
    FROZEN = "frozen"


class Fate(str, Enum):
    """What became of a frame that the follower was shown."""

    ACCEPTED = "accepted"
    ALARMED = "alarmed"
    FROZEN = "frozen"
    OUTSIDE = "outside"
    BROKEN = "broken"
    LATE = "late"
    UNMEASURED = "unmeasured"
    NOT_JUDGED = "not_judged"
    UNKNOWN = "unknown"
    OTHER_PRODUCT = "other_product"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Moments that are or were in force.

    Attributes:
        version: counts the camera's snapshots.
        expert: that they belong to.
        moments: that frames are taken to show; the reference itself after a reset.
        own: share of each frame's own moments that is mixed in.
        shift: from the reference, in units of what is usual.
    """

    version: int
    expert: int
    moments: Moments
    own: float
    shift: float


class _Expert:
    """One expert's estimate, what of it is in force, and the look made of that."""

    def __init__(self, index: int, reference: Reference, settings: AdaptationSettings) -> None:
        self.index = index
        self.reference = reference.moments[index]
        self._spread = reference.spread[index] if reference.spread else None
        self._images = reference.images[index] if reference.spread else 1
        self._usual = reference.usual[index]
        self.running = Running(self.reference, self._usual, settings)
        self.force = Snapshot(0, index, self.reference, 0.0, 0.0)
        self.look = Look(index, measure=True)
        self.settling = self.touched = False
        self.since = self.first = self.former = 0

    def told(self) -> Moments:
        """What the frames so far can tell; nothing learned yet: the reference, beside the frame's own moments."""
        if not self.running.count:
            return self.reference
        if self._spread is None:
            return self.running.moments
        return certain(
            self.running.moments, self.reference, self._spread, frames=self.running.frames, images=self._images
        )

    def moved(self) -> float:
        """How far what frames tell lies from what is in force, in units of what is usual."""
        return shift_of(self.told(), self.force.moments) / self._usual

    def install(self, version: int, *, own: float) -> None:
        self.former = self.force.version
        moments = self.told()
        self._force(Snapshot(version, self.index, moments, own, self.running.size))
        self.since = 0

    def _force(self, snapshot: Snapshot) -> None:
        self.force = snapshot
        correction = MomentCorrection(snapshot.moments, self.reference, own=snapshot.own)
        self.look = Look(self.index, snapshot.version, correction, measure=True)

    def header(self) -> ExpertHeader:
        force, count = self.force, self.running.count
        return ExpertHeader(
            version=force.version, own=force.own, count=count, settling=self.settling, touched=self.touched,
            since=self.since, first=self.first, former=self.former, outside=self.running.outside,
            at_bound=self.running.at_bound,
        )  # fmt: skip

    def restore(self, header: ExpertHeader, rows: dict[str, npt.NDArray[np.float64]]) -> None:
        index, layout = self.index, self.running.layout
        self.running.restore(
            rows["mean"][index], rows["std"][index], header.count, outside=header.outside, at_bound=header.at_bound
        )
        self.settling, self.touched = header.settling, header.touched
        self.since, self.first, self.former = header.since, header.first, header.former
        if header.version:
            moments = layout.moments(rows["force_mean"][index], rows["force_std"][index])
            self._force(Snapshot(header.version, index, moments, header.own, self.running.size_of(moments)))


class Follower:
    """Follows what one camera shows. Calls from several threads are taken one after the other.

    It begins at the reference and follows; only :meth:`reset` makes it settle, since only somebody who sees the line
    can say that the next parts are good. Each change of what is in force has a version of its own, counted per camera.

    Args:
        reference: of the bundle.
        settings: of the box.
        state: what :meth:`state` gave, to go on from.
        given: no number up to this one is given any more, for snapshots of an earlier run or of another bundle.
        products: of the camera with its recipes, which somebody else changes; where None it has recipes of its own.

    Raises:
        AdaptationError: the state is damaged, or belongs to another bundle.
    """

    def __init__(
        self,
        reference: Reference,
        settings: AdaptationSettings,
        state: bytes | None = None,
        *,
        given: int = 0,
        products: CameraProducts | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self._reference, self._settings = reference, settings
        self._experts = [_Expert(index, reference, settings) for index in range(len(reference.moments))]
        self._switch = Switch(settings.switch_frames)
        self._window = AlarmWindow(settings.window, settings.freeze_rate, settings.thaw_rate)
        self._owns_recipes = products is None
        self._products = products or CameraProducts(
            lambda: reference.subclasses, RecipeHistory(), routed=len(self._experts), unified=False
        )
        self._version, self._drifting = given, False
        self._counts: Counter[str] = Counter()
        if state is not None:
            self._restore(state)
        asked = self._products.asked().index
        if asked is not None and asked < len(self._experts) and asked != self._switch.expert:
            self._switch.set(asked)

    def look(self, frame: Frame | None = None) -> Look:
        """How a frame is to be seen.

        Args:
            frame: of the camera; None for one that is captured now.
        """
        asked = self._products.asked(frame).index
        if asked is None:
            return self._experts[self._switch.expert].look
        # Of a product that was added to the bundle nobody knows what it was trained on.
        return self._experts[asked].look if asked < len(self._experts) else Look(asked)

    def rerouted(self, route: Route | None, frame: Frame | None = None) -> Look | None:
        """Return how a frame is to be seen again because it shows another sub-class than it was seen as.

        Args:
            route: float32 [E] of the frame's prediction.
            frame: as in :meth:`look`.

        Returns:
            The look of the sub-class that the router names; None where it agrees, names none, or the recipe decides.
        """
        asked = self._products.asked(frame)
        if route is None or asked.problem or asked.index is not None:
            return None
        shown = self._products.shown(route)
        with self._lock:
            self._lighten(shown)
            if shown is None or shown == self._switch.expert:
                return None
            return self._experts[shown].look

    def refusal(self, route: Route | None, frame: Frame | None = None) -> str:
        """Say why a frame must not be judged by any expert; empty where one may.

        Args:
            route: float32 [E] of the frame's prediction; None where the bundle has no router.
            frame: as in :meth:`look`.
        """
        return self._products.refusal(route, frame)

    def take(self, judged: JudgedFrame) -> None:
        """Learn from a frame at the end of its way, where it may be learned from; never raises."""
        with self._lock:
            fate = self._take(judged)
            self._counts[fate.value] += 1
            shift, level = self.shift, self._settings.drift
            self._drifting = shift >= (level * _DRIFT_OVER if self._drifting else level)

    def reset(self, recipe: str | None = None) -> None:
        """Go back to the reference and settle, the next parts being good; alarms so far are forgotten.

        Args:
            recipe: the sub-class that comes now; only its moments are forgotten. None keeps the recipe and forgets
                those of all; an empty one lets the router decide from now on, and forgets those of all too. A bundle
                of one product takes any name. Where somebody else has the recipes, it holds already.

        Raises:
            AdaptationError: the bundle has no such sub-class.
        """
        names = tuple(self._products.names)
        several = len(names) > 1
        if recipe and several and recipe not in names:
            raise AdaptationError(f"recipe {recipe!r} is none of the bundle's: {', '.join(names)}; name one of them")
        with self._lock:
            self._window.clear()
            self._drifting = False
            forgotten = self._experts
            if recipe is not None and self._owns_recipes:
                self._products.history.set(recipe)
            if recipe and several:
                forgotten = self._experts[names.index(recipe) :][:1]
                for expert in forgotten:
                    self._switch.set(expert.index)
            for expert in forgotten:
                expert.running.begin()
                expert.settling = True
                expert.touched = False
                self._install(expert, own=1.0)
                expert.first = self._version

    def part_from_former(self) -> None:
        """Learn from no frame that was seen before this call: another bundle measured it, perhaps uncorrected too."""
        with self._lock:
            for expert in self._experts:
                if not expert.force.version:
                    self._install(expert, own=expert.force.own)
                expert.former = expert.force.version

    @property
    def phase(self) -> Phase:
        """Of the sub-class that frames begin with."""
        if self._experts[self._switch.expert].settling:
            return Phase.SETTLING
        return Phase.FROZEN if self._window.frozen else Phase.FOLLOWING

    @property
    def version(self) -> int:
        """Of the newest snapshot, 0 for none; it grows by 1 with each."""
        return self._version

    @property
    def shift(self) -> float:
        """From the reference to the estimate of the present sub-class, in units of what is usual; <= the bound."""
        return self._experts[self._switch.expert].running.size

    @property
    def drifting(self) -> bool:
        """Whether the shift is at the level of the drift notice, or was and has not gone back well below it."""
        return self._drifting

    @property
    def at_bound(self) -> bool:
        """Whether the bound keeps the present estimate from following."""
        return self._experts[self._switch.expert].running.at_bound

    @property
    def products(self) -> tuple[str, ...]:
        """Names that a recipe may have, those of the experts first."""
        return tuple(self._products.names)

    @property
    def recipe(self) -> str:
        """That was asked for; empty for none."""
        return self._products.history.now

    @property
    def learning(self) -> bool:
        """Whether others may learn from this camera's frames: not while it settles or is frozen."""
        return self.phase is Phase.FOLLOWING

    def snapshots(self, after: int) -> list[Snapshot]:
        """Return those in force that are newer than a version, oldest first: a reset makes one of each sub-class."""
        with self._lock:
            found = [expert.force for expert in self._experts if expert.force.version > after]
        return sorted(found, key=lambda one: one.version)

    def snapshot(self) -> Snapshot:
        """Return the newest one that is in force."""
        with self._lock:
            return max((expert.force for expert in self._experts), key=lambda force: force.version)

    def status(self) -> dict[str, Any]:
        """What the box's status says of it; figures of shift in units of what is usual."""
        with self._lock:
            counts = {fate.value: self._counts[fate.value] for fate in Fate}
            return {
                "phase": self.phase.value,
                "version": self._version,
                "recipe": self.recipe or None,
                "subclass": self._reference.subclasses[self._switch.expert] or None,
                "shift": round(self.shift, 4),
                "bound": self._settings.bound,
                "at_bound": self.at_bound,
                "drifting": self._drifting,
                "alarm_rate": round(self._window.rate, 4),
                "frames": counts,
                "switched": self._counts["switched"],
            }

    def state(self) -> bytes:
        """Return everything it must know again after a restart."""
        pinned = self._products.asked().index
        with self._lock:
            header = Header(
                fingerprint=fingerprint(self._reference), version=self._version, recipe=self.recipe,
                pinned=pinned if pinned is None or pinned < len(self._experts) else None,
                expert=self._switch.expert, other=self._switch.other, seen=self._switch.seen,
                alarms=self._window.alarms, frozen=self._window.frozen, drifting=self._drifting,
                counts=dict(self._counts),
                experts=tuple(expert.header() for expert in self._experts),
            )  # fmt: skip
            rows = [
                (one.running.mean, one.running.std, *one.running.layout.rows(one.force.moments))
                for one in self._experts
            ]
        names = ("mean", "std", "force_mean", "force_std")
        return encode(header, {name: np.stack([row[i] for row in rows]) for i, name in enumerate(names)})

    def _restore(self, state: bytes) -> None:
        header, rows = decode(state, self._reference, self._experts[0].running.layout.length)
        for expert, kept in zip(self._experts, header.experts, strict=True):
            expert.restore(kept, rows)
        settings = self._settings
        self._window = AlarmWindow(
            settings.window, settings.freeze_rate, settings.thaw_rate, header.alarms, frozen=header.frozen
        )
        self._switch.set(header.expert, header.other, header.seen)
        self._version, self._drifting = max(self._version, header.version), header.drifting
        if header.recipe:
            self._products.history.begin_with(header.recipe)
        self._counts = Counter(header.counts)
        for expert in self._experts:
            # The settings may allow less than they did.
            if not expert.force.shift <= settings.bound:
                self._install(expert, own=expert.force.own)

    def _take(self, judged: JudgedFrame) -> Fate:
        prediction, verdict = judged.prediction, judged.verdict
        if prediction is None:
            return Fate.NOT_JUDGED
        asked = self._products.asked(judged.frame)
        shown: int | None = self._switch.expert if asked.index is None else asked.index
        if asked.problem or (shown is not None and shown >= len(self._experts)):
            return Fate.NOT_JUDGED if asked.problem else Fate.UNMEASURED
        if prediction.route is not None and len(self._experts) > 1:
            shown = self._products.shown(prediction.route)
            if asked.index is None:
                self._lighten(shown)
                self._counts["switched"] += self._switch.take(shown)
        if shown is None:
            return Fate.UNKNOWN
        if asked.index is not None and shown != asked.index:
            return Fate.OTHER_PRODUCT
        if verdict.decision is Decision.NOT_JUDGED:
            return Fate.NOT_JUDGED
        self._window.take(alarmed=verdict.decision is Decision.NOK)
        return self._learn(self._experts[shown], prediction, alarmed=judged.alarmed)

    def _learn(self, expert: _Expert, prediction: Prediction, *, alarmed: bool) -> Fate:
        if prediction.moments is None:
            return Fate.UNMEASURED
        version = prediction.moments_version
        # Taps are measured behind the correction of the canvas, so moments seen through another's tell nothing.
        if version < expert.first or version not in (expert.force.version, expert.former):
            return Fate.LATE
        if not expert.settling:
            if self._window.frozen:
                return Fate.FROZEN
            if alarmed:
                return Fate.ALARMED
        taken = expert.running.take(prediction.moments)
        if taken is not Taken.ACCEPTED:
            if expert.settling and expert.force.own and expert.running.at_bound:
                # A frame's own moments know no bound: what stays beyond it is not to be made to look good.
                self._install(expert, own=0.0)
            return Fate(taken.value)
        expert.touched = True
        expert.since += 1
        self._come_into_force(expert)
        return Fate.ACCEPTED

    def _come_into_force(self, expert: _Expert) -> None:
        count, settings = expert.running.count, self._settings
        if expert.settling:
            expert.settling = count < settings.settle_frames
            if not expert.settling:
                self._install(expert, own=0.0)
            elif count & (count - 1) == 0:
                # At 1, 2, 4, 8 ... frames: each halves what the mean still lacks. The frame itself counts as one more.
                self._install(expert, own=1 / (count + 1))
        elif expert.since >= settings.every_frames and expert.moved() >= settings.least:
            self._install(expert, own=0.0)

    def _install(self, expert: _Expert, *, own: float) -> None:
        self._version += 1
        expert.install(self._version, own=own)

    def _lighten(self, shown: int | None) -> None:
        """Let a sub-class that was never followed begin under the light of the present one, which was."""
        if shown is None or shown == self._switch.expert:
            return
        present, other = self._experts[self._switch.expert], self._experts[shown]
        if present.touched and not (other.touched or other.settling):
            other.running.carry(present.running)
            other.touched = True
            self._install(other, own=0.0)
