"""Adaptation: the followers of a box's cameras with their files, commands and notices; a part of the box.

What is learned, and when, is the followers' own; who else may move meanwhile is the owner's, recipes are another's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from edge.adaptation.follower import Follower
from edge.adaptation.owner import DriftOwner, FollowedCamera
from edge.adaptation.reference import read_reference
from edge.alerts.command_messages import RecipeCommand, ResetCommand
from edge.alerts.message import NoticeKind, Severity
from edge.alerts.topics import RECIPE_VERB, RESET_VERB
from edge.errors import AdaptationError, BundleError, LinewardError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edge.adaptation.settings import AdaptationSettings
    from edge.adaptation.store import AdaptationStore
    from edge.alerts.message import AnyMessage
    from edge.alerts.publisher import Publisher
    from edge.frames import JudgedFrame
    from edge.inference.detector import Detector
    from edge.judgement.threshold_versions import ThresholdVersions
    from edge.products.recipes import CameraProducts

    Done = Callable[[dict[str, Any]], None]

_LOG = logging.getLogger(__name__)
# Between looks at the followers.
LOOK_S = 0.25
# What was learned since the last snapshot is on disk this often: a box that is killed loses no more.
SAVE_EVERY_S = 30.0
MAX_WAITING = 16


class Adaptation:
    """Lets cameras follow what their line shows, and answers ``cmd/reset``, in a thread of its own.

    Args:
        store: of followers and snapshots.
        versions: of thresholds, which belong to the same owner.
        notify: raises a notice.
        clock: monotonic seconds.

    Attributes:
        owner: of what drifts.
    """

    name = "adaptation"

    def __init__(
        self,
        store: AdaptationStore,
        *,
        versions: ThresholdVersions,
        notify: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.owner = DriftOwner()
        self._store, self._versions, self._notify, self._clock = store, versions, notify, clock
        self._answer: Callable[..., None] = _nobody
        self._waiting: queue.Queue[tuple[RecipeCommand | ResetCommand, Done | None] | None] = queue.Queue(MAX_WAITING)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._not_followed: dict[str, str] = {}
        self._counts = dict.fromkeys(("saved", "failed", "commands", "refused"), 0)
        self._trouble = ""
        self._told_damage = ""
        self._save_at = clock() + SAVE_EVERY_S

    def attach(self, publisher: Publisher) -> None:
        """Have commands brought, and answers taken."""
        self._answer = publisher.answer
        publisher.on_command(RESET_VERB, self.command)

    def follow(
        self,
        camera: str,
        settings: AdaptationSettings | None,
        detector: Detector,
        products: CameraProducts | None = None,
    ) -> FollowedCamera | None:
        """Make the follower of a camera, from what is kept of it under this bundle, in place of the one before.

        Args:
            camera: its name.
            settings: of its adaptation; None for none.
            detector: that judges it from now on.
            products: of the camera, with its recipes; where None its follower has recipes of its own.

        Returns:
            The camera; None where it shall not follow, or its bundle was packed without moments.
        """
        self._not_followed.pop(camera, None)
        bundle = f"{detector.bundle.id}/{detector.status.precision.value}"
        before = self.owner.remove(camera)
        if before is not None:
            # Of the same bundle it ends here, so that no number is given twice; of another it judges until the switch.
            before.closed = before.bundle == bundle
            self._save(before, last=before.closed)
        if settings is None or not settings.enabled:
            return None
        try:
            reference = read_reference(detector.bundle, detector.status.precision)
        except BundleError as error:
            self._not_followed[camera] = str(error)
            return None
        if reference is None:
            self._not_followed[camera] = "its bundle was packed without moments; export it again"
            return None
        if before is not None and before.closed:
            kept: bytes | None = before.follower.state()
            version = before.follower.version
        else:
            kept, version = self._kept(camera, bundle)
        try:
            follower = Follower(reference, settings, kept, given=version, products=products)
        except AdaptationError as error:
            self._tell_damage(f"camera {camera}: {error}")
            follower = Follower(reference, settings, given=version, products=products)
        if before is not None and not before.closed:
            # Until the switch its frames still come from the bundle before.
            follower.part_from_former()
        found = FollowedCamera(camera, follower, bundle=bundle, subclasses=reference.subclasses, noted=version)
        self.owner.put(found)
        return found

    def observe(self, judged: JudgedFrame) -> None:
        """Have a camera's follower learn from a frame; in the camera's thread, returns at once and never raises."""
        followed = self.owner.find(judged.frame.camera)
        if followed is not None:
            followed.observe(judged)

    def keep_only(self, cameras: Iterable[str]) -> None:
        """Forget cameras that are no more; what they learned stays on disk."""
        names = set(cameras)
        for followed in self.owner.cameras:
            if followed.name not in names:
                self.owner.remove(followed.name)
                followed.closed = True
                self._save(followed, last=True)
        self._not_followed = {name: why for name, why in self._not_followed.items() if name in names}

    def command(self, command: AnyMessage) -> dict[str, Any] | None:
        """Take a command; the answer follows. Never waits."""
        assert isinstance(command, (RecipeCommand, ResetCommand))
        try:
            self._waiting.put_nowait((command, None))
        except queue.Full:
            return {"ok": False, "id": command.id, "reason": "too many commands wait; send it again"}
        return None

    def settle(self, command: RecipeCommand, done: Done) -> None:
        """Have the cameras meant settle under a recipe that holds already; never waits.

        Args:
            command: that :meth:`why_not` had nothing against.
            done: called with the fields of its result, at once or later, in a thread of the box.
        """
        try:
            self._waiting.put_nowait((command, done))
        except queue.Full:
            done({"ok": False, "reason": "the recipe holds, but moments do not settle: too many commands wait"})

    def following(self) -> list[str]:
        """Names of the cameras that follow their line."""
        return [one.name for one in self.owner.cameras]

    def why_not(self, command: RecipeCommand | ResetCommand) -> str:
        """Say why a command cannot be obeyed; empty where it can."""
        recipe = (command.recipe or "") if isinstance(command, RecipeCommand) else None
        meant = [one for one in self.owner.cameras if command.camera in (None, one.name)]
        return self._why_not(command.camera, recipe, meant)

    def start(self) -> None:
        """Begin to look after the followers."""
        if self._versions.damage:
            self._tell_damage(self._versions.damage)
        self._thread = threading.Thread(target=self._run, name="adaptation", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Cameras judge on for a moment: what they still learn is kept by :meth:`stop`."""

    def stop(self, timeout: float) -> bool:
        """Keep what was learned and end; False where that takes longer than ``timeout`` seconds."""
        self._stopping.set()
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            _LOG.debug("commands wait; the thread will look up by itself")
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def status(self) -> dict[str, Any]:
        """How each follower stands; empty where no camera was meant to follow."""
        cameras = {one.name: one.status() for one in self.owner.cameras}
        if not cameras and not self._not_followed:
            return {}
        return {
            "cameras": cameras,
            "not_followed": dict(self._not_followed),
            "counters": dict(self._counts),
            "trouble": self._trouble,
        }

    def warnings(self) -> list[str]:
        """What an operator should know now."""
        found = [text for one in self.owner.cameras for text in one.warnings()]
        found += [f"{name}: adaptation is off: {why}" for name, why in sorted(self._not_followed.items())]
        told = (self._trouble, self._versions.trouble, self._versions.damage, self._store.damage)
        return found + [text for text in told if text]

    def look(self) -> None:
        """Tell what has changed, and keep what has."""
        now = self._clock()
        due = now >= self._save_at
        for followed in self.owner.cameras:
            followed.note_snapshot()
            for change in followed.changes():
                self._notify(change.kind, change.severity, change.text, **change.figures)
            if followed.unsaved(since_snapshot=due):
                self._save(followed, last=False)
        if due:
            self._save_at = now + SAVE_EVERY_S
            self._versions.save()
        if self._store.damage != self._told_damage:
            self._tell_damage(self._store.damage)
            self._told_damage = self._store.damage

    def obey(self, command: RecipeCommand | ResetCommand) -> dict[str, Any]:
        """Have cameras settle anew, all that are meant or none.

        Returns:
            Fields of the command's result.
        """
        self._counts["commands"] += 1
        recipe = (command.recipe or "") if isinstance(command, RecipeCommand) else None
        meant = [one for one in self.owner.cameras if command.camera in (None, one.name)]
        reason = self._why_not(command.camera, recipe, meant)
        if reason:
            self._counts["refused"] += 1
            return {"ok": False, "reason": reason[:500]}
        not_kept = ""
        for followed in meant:
            before = followed.status()
            followed.follower.reset(recipe)
            followed.note_snapshot()
            not_kept = self._save(followed, last=False) or not_kept
            self._tell_reset(followed, recipe, before)
        if not_kept:
            return {"ok": False, "reason": f"settling, but a restart would undo it: {not_kept}"[:500]}
        detail = {"cameras": [one.name for one in meant], "moments": {one.name: one.follower.version for one in meant}}
        return {"ok": True, "count": len(meant), "detail": detail}

    def _why_not(self, camera: str | None, recipe: str | None, meant: list[FollowedCamera]) -> str:
        if not meant:
            not_followed = sorted(self._not_followed.items())
            why = "; ".join(f"{name}: {text}" for name, text in not_followed if camera in (None, name))
            known = ", ".join(one.name for one in self.owner.cameras) or "none"
            whom = "no camera follows" if camera is None else f"camera {camera!r} does not exist, or does not follow"
            return f"{whom} its line{f' ({why})' if why else ''}; following are: {known}"
        for followed in meant:
            names = [name for name in followed.products if name]
            if recipe and len(followed.products) > 1 and recipe not in names:
                return f"camera {followed.name}: its bundle has no sub-class {recipe!r}; it has: {', '.join(names)}"
        return ""

    def _tell_reset(self, followed: FollowedCamera, recipe: str | None, before: dict[str, Any]) -> None:
        named = "" if recipe is None else f" for recipe {recipe!r}" if recipe else ", the router chooses the product"
        text = f"camera {followed.name}: its moments settle anew on the next parts{named}"
        self._notify(
            NoticeKind.ADAPTATION_RESET, Severity.INFO, text, camera=followed.name, recipe=recipe,
            moments_version=followed.follower.version, phase_before=before["phase"], shift_before=before["shift"],
        )  # fmt: skip

    def _kept(self, camera: str, bundle: str) -> tuple[bytes | None, int]:
        try:
            kept = self._store.read(camera, bundle)
        except StoreError as error:
            self._fail(error)
            # Nothing can be known of what was given before: numbers above any count.
            return None, int(time.time())
        return kept.state, kept.version

    def _save(self, followed: FollowedCamera, *, last: bool) -> str:
        """Keep a follower; returns why that was not possible."""
        made, version, accepted = followed.made(), followed.follower.version, followed.accepted
        try:
            state = followed.follower.state()
            self._store.write(followed.name, followed.bundle, state, version, made, last=last)
        except StoreError as error:
            self._fail(error)
            return str(error)
        followed.saved(made, version, accepted)
        self._counts["saved"] += 1
        if self._trouble:
            _LOG.info("moments are kept again")
        self._trouble = ""
        return ""

    def _fail(self, error: LinewardError) -> None:
        self._counts["failed"] += 1
        if not self._trouble:
            _LOG.error("moments cannot be kept: %s", error)
        self._trouble = f"moments of cameras cannot be kept: {error}"

    def _tell_damage(self, text: str) -> None:
        if text:
            self._notify(NoticeKind.ADAPTATION_DAMAGED, Severity.ALARM, text)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._guarded(self._obey_next)
            self._guarded(self.look)
        self._guarded(self._close)

    def _obey_next(self) -> None:
        try:
            taken = self._waiting.get(timeout=LOOK_S)
        except queue.Empty:
            return
        if taken is not None:
            command, done = taken
            verb = RECIPE_VERB if isinstance(command, RecipeCommand) else RESET_VERB
            try:
                values = self.obey(command)
            except Exception as error:  # noqa: BLE001 (whoever asked gets an answer)
                _LOG.exception("%s failed", verb)
                values = {"ok": False, "reason": f"{type(error).__name__}, see the log"}
            if done is None:
                self._answer(verb, id=command.id, **values)
            else:
                done(values)

    def _close(self) -> None:
        for followed in self.owner.cameras:
            followed.note_snapshot()
            self._save(followed, last=True)
        self._store.close()

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # noqa: BLE001 (the thread's rim: the next look may succeed)
            self._counts["failed"] += 1
            _LOG.exception("adaptation: a look failed")


def _nobody(*_: object, **__: object) -> None:
    """Answer nobody: no publisher is attached."""
