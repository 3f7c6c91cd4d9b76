"""DriftOwner: the one place that says who may change what a camera is judged by: moments, memory, threshold.

It must not know files, threads or messages.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge.adaptation.follower import Fate, Phase
from edge.adaptation.look import PLAIN
from edge.adaptation.store import MadeSnapshot
from edge.alerts.message import NoticeKind, Severity
from edge.frames import Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.adaptation.follower import Follower
    from edge.adaptation.look import Look
    from edge.frames import JudgedFrame

# A router refuses one good part in twenty; a product that is another one is refused by most of its parts.
UNKNOWN_WINDOW = 10
_UNKNOWN_FROM, _KNOWN_FROM = 5, 1
# Snapshots of which nobody has taken note yet; a follower makes a few in a second.
_MAX_MADE = 256
_FORGOTTEN = "it settles anew, and how far what it shows is from the training set is measured again"
_FROM_TRAINING = "times what is usual from the training set"


@dataclass(frozen=True, slots=True)
class Change:
    """What a person should know of a camera, once.

    Attributes:
        kind: of the notice.
        severity: of the notice.
        text: for people.
        figures: behind it, as JSON values.
    """

    kind: NoticeKind
    severity: Severity
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


class FollowedCamera:
    """A camera with its follower: hears its frames, and says what has changed since it was asked last.

    Args:
        name: of the camera.
        follower: of its moments.
        bundle: names bundle and precision that it belongs to.
        subclasses: name of each expert's sub-class.
        noted: snapshots up to this version were noted before; those of the follower so far where None.

    Attributes:
        closed: nothing is learned any more; another has taken its place.
    """

    def __init__(
        self, name: str, follower: Follower, *, bundle: str, subclasses: Sequence[str], noted: int | None = None
    ) -> None:
        self.name, self.follower, self.bundle = name, follower, bundle
        self.subclasses = tuple(subclasses)
        self._made: deque[MadeSnapshot] = deque(maxlen=_MAX_MADE)
        self._lock = threading.Lock()
        self._noted = follower.version if noted is None else noted
        self._refused: deque[bool] = deque(maxlen=UNKNOWN_WINDOW)
        self._refusal, self._unknowns = "", 0
        # What an earlier run has told is not told again.
        self._told = {
            NoticeKind.ADAPTATION_FROZEN: follower.phase is Phase.FROZEN,
            NoticeKind.ADAPTATION_DRIFT: follower.drifting,
            NoticeKind.ADAPTATION_BOUND: follower.at_bound,
            NoticeKind.PRODUCT_UNKNOWN: False,
        }
        self._saved = (-1, -1)
        self.closed = False

    def observe(self, judged: JudgedFrame) -> None:
        """Learn from a frame; in the camera's thread, returns at once and never raises."""
        if self.closed:
            return
        prediction = judged.prediction
        if prediction is not None:
            self._count_refusal(self.follower.refusal(prediction.route, judged.frame))
        self.follower.take(judged)
        self.note_snapshot()

    def note_snapshot(self) -> None:
        """Note what is in force, where it was not noted yet."""
        if self.follower.version == self._noted:
            return
        with self._lock:
            now_us = time.time_ns() // 1000
            for one in self.follower.snapshots(self._noted):
                self._noted = one.version
                self._made.append(MadeSnapshot(self.name, self.bundle, self.subclasses[one.expert], one, now_us))

    def made(self) -> list[MadeSnapshot]:
        """Return snapshots that :meth:`saved` was not told of, oldest first."""
        with self._lock:
            return list(self._made)

    @property
    def products(self) -> tuple[str, ...]:
        """That a recipe may name: its sub-classes, and products that were added to the bundle."""
        return self.follower.products

    @property
    def accepted(self) -> int:
        """Frames learned from."""
        return int(self.follower.status()["frames"][Fate.ACCEPTED.value])

    def unsaved(self, *, since_snapshot: bool) -> bool:
        """Whether there is something to keep.

        Args:
            since_snapshot: what was learned since the last snapshot counts, too.
        """
        version, accepted = self._saved
        return version != self.follower.version or (since_snapshot and accepted != self.accepted)

    def saved(self, made: list[MadeSnapshot], version: int, accepted: int) -> None:
        """Note what is on disk."""
        self._saved = (version, accepted)
        with self._lock:
            for one in made:
                if self._made and self._made[0] is one:
                    self._made.popleft()

    @property
    def hold(self) -> str:
        """Why nobody may learn from this camera now; empty where anybody may."""
        if self.unknown:
            return "it shows an unknown product"
        phase = self.follower.phase
        return "" if phase is Phase.FOLLOWING else f"its moments are {phase.value}"

    @property
    def unknown(self) -> bool:
        """Whether most of its last frames show a product that cannot be judged."""
        return self._unknowns >= (_KNOWN_FROM + 1 if self._told[NoticeKind.PRODUCT_UNKNOWN] else _UNKNOWN_FROM)

    def changes(self) -> list[Change]:
        """Say what begins and what ends, each once."""
        return [one for one in (self._froze(), self._drifted(), self._bounded(), self._lost_product()) if one]

    def status(self) -> dict[str, Any]:
        """How it stands, as JSON values."""
        return self.follower.status() | {"unknown_product": self._refusal if self.unknown else None}

    def warnings(self) -> list[str]:
        """What an operator should know now."""
        follower, found = self.follower, list[str]()
        if follower.phase is Phase.FROZEN:
            found.append("adaptation is frozen: too many frames alarm; look at the line, then reset it on good parts")
        if follower.at_bound:
            bound = follower.status()["bound"]
            found.append(f"adaptation is at its bound: what it shows is {bound:.3g} {_FROM_TRAINING}, or farther")
        elif follower.drifting:
            found.append(f"what it shows is {follower.shift:.3g} {_FROM_TRAINING}")
        if self.unknown:
            found.append(f"unknown product: {self._refusal}")
        return [f"{self.name}: {text}" for text in found]

    def _count_refusal(self, refusal: str) -> None:
        self._refused.append(bool(refusal))
        # One figure for whoever asks from another thread.
        self._unknowns = sum(self._refused)
        self._refusal = refusal or self._refusal

    def _figures(self) -> dict[str, Any]:
        follower = self.follower
        status = follower.status()
        names = ("phase", "shift", "bound", "alarm_rate", "recipe", "subclass")
        return {"camera": self.name, "moments_version": follower.version} | {name: status[name] for name in names}

    def _turned(self, kind: NoticeKind, *, now: bool) -> bool:
        turned = self._told[kind] is not now
        self._told[kind] = now
        return turned

    def _froze(self) -> Change | None:
        frozen = self.follower.phase is Phase.FROZEN
        if not self._turned(NoticeKind.ADAPTATION_FROZEN, now=frozen):
            return None
        figures = self._figures()
        if frozen:
            text = (
                f"camera {self.name}: {figures['alarm_rate']:.0%} of its frames alarm; its moments are frozen, "
                f"{figures['shift']:.3g} {_FROM_TRAINING}. Where the parts are good, reset it"
            )
            return Change(NoticeKind.ADAPTATION_FROZEN, Severity.ALARM, text, figures)
        if self.follower.phase is Phase.SETTLING:
            # Somebody has reset it, and that is told.
            return None
        text = f"camera {self.name}: {figures['alarm_rate']:.0%} of its frames alarm; its moments follow again"
        return Change(NoticeKind.ADAPTATION_THAWED, Severity.INFO, text, figures)

    def _drifted(self) -> Change | None:
        drifting = self.follower.drifting
        if not self._turned(NoticeKind.ADAPTATION_DRIFT, now=drifting):
            return None
        figures = self._figures() | {"lasting": drifting}
        text = f"camera {self.name}: what it shows is {figures['shift']:.3g} {_FROM_TRAINING}"
        if not drifting:
            settling = self.follower.phase is Phase.SETTLING
            text = f"camera {self.name}: {_FORGOTTEN}" if settling else f"{text}, no longer far"
        severity = Severity.WARNING if drifting else Severity.INFO
        return Change(NoticeKind.ADAPTATION_DRIFT, severity, text, figures)

    def _bounded(self) -> Change | None:
        at_bound = self.follower.at_bound
        if not self._turned(NoticeKind.ADAPTATION_BOUND, now=at_bound):
            return None
        figures = self._figures() | {"lasting": at_bound}
        text = (
            f"camera {self.name}: what it shows is at the bound of {figures['bound']:.3g} that is followed, or beyond; "
            "it is not followed farther and will alarm"
            if at_bound
            else f"camera {self.name}: {_FORGOTTEN}"
            if self.follower.phase is Phase.SETTLING
            else f"camera {self.name}: what it shows is within the bound again"
        )
        return Change(NoticeKind.ADAPTATION_BOUND, Severity.ALARM if at_bound else Severity.INFO, text, figures)

    def _lost_product(self) -> Change | None:
        unknown = self.unknown
        if not self._turned(NoticeKind.PRODUCT_UNKNOWN, now=unknown):
            return None
        figures = self._figures() | {"lasting": unknown}
        text = f"camera {self.name}: {self._refusal}" if unknown else f"camera {self.name}: its product is known again"
        return Change(NoticeKind.PRODUCT_UNKNOWN, Severity.ALARM if unknown else Severity.INFO, text, figures)


class DriftOwner:
    """What drifts on a box, and what must stand still while something else moves. Safe to call from any thread.

    Moments follow the light, the memory follows the parts, a threshold belongs to one memory. If two of them learned
    from the same frames at once, each would take for its own what the other is about to correct: so the memory learns
    from a camera only while its moments follow, from frames as they were corrected, and is not switched while a camera
    settles.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cameras: dict[str, FollowedCamera] = {}

    @property
    def cameras(self) -> list[FollowedCamera]:
        """Those that follow."""
        with self._lock:
            return list(self._cameras.values())

    def find(self, camera: str) -> FollowedCamera | None:
        """Return a camera that follows; None where it does not."""
        with self._lock:
            return self._cameras.get(camera)

    def put(self, camera: FollowedCamera) -> None:
        """Take a camera in, in place of the one of its name."""
        with self._lock:
            self._cameras[camera.name] = camera

    def remove(self, camera: str) -> FollowedCamera | None:
        """Forget a camera; returns it, None where it did not follow."""
        with self._lock:
            return self._cameras.pop(camera, None)

    def hold(self, camera: str) -> str:
        """Say why the memory must not learn from a camera now; empty where it may."""
        found = self.find(camera)
        return "" if found is None else found.hold

    def hold_switch(self) -> str:
        """Say why the memory must not be switched now; empty where it may."""
        settling = [one.name for one in self.cameras if one.follower.phase is Phase.SETTLING]
        return f"moments of {', '.join(settling)} settle" if settling else ""

    def look_at(self, judged: JudgedFrame) -> Look | None:
        """Return how a frame was seen, for whoever embeds it again; in the camera's thread, before its follower learns.

        Returns:
            The look; None where nobody may learn from this frame: its camera holds, it was not judged, or it was seen
            by moments that are no longer those of its camera.
        """
        followed = self.find(judged.frame.camera)
        prediction = judged.prediction
        if followed is None:
            return PLAIN
        if prediction is None or judged.verdict.decision is Decision.NOT_JUDGED or followed.hold:
            return None
        look = followed.follower.look(judged.frame)
        return look if look.version == prediction.moments_version else None
