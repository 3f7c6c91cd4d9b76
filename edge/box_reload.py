"""Reloading: what new settings change in a running box, and one reload at a time, refused or applied as a whole.

Decides and guards only; cameras, detectors and parts are changed by the box.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.errors import LinewardError, SettingsError
from edge.health.watchdog import notify_systemd
from edge.inspection.plan import plan_stations

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.settings import BoxSettings, CameraSettings

_LOG = logging.getLogger(__name__)
# What a running box can take over. Everything else belongs to files, sockets or threads that live as long as it does.
RELOADABLE = frozenset(
    {
        "adaptation",
        "bundle",
        "cameras",
        "engine",
        "precision",
        "products",
        "provider",
        "signals",
        "stations",
        "status_every_s",
        "threads",
    }
)


@dataclass(frozen=True, slots=True)
class ReloadPlan:
    """What new settings change in the cameras.

    Attributes:
        ended: names of cameras that are removed, disabled or changed.
        begun: settings of cameras that are added, enabled or changed.
        switched: settings of the cameras that go on and are judged by another detector.
    """

    ended: tuple[str, ...] = ()
    begun: tuple[CameraSettings, ...] = ()
    switched: tuple[CameraSettings, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ended or self.begun or self.switched)


def check_reloadable(old: BoxSettings, new: BoxSettings) -> None:
    """Refuse settings that a running box cannot take over.

    Raises:
        SettingsError: keys differ that need a restart; the message names them.
    """
    refused = [
        name for name in type(new).model_fields if name not in RELOADABLE and getattr(old, name) != getattr(new, name)
    ]
    if refused:
        raise SettingsError(f"{', '.join(refused)}: cannot change in a running box; restart it")


def plan_reload(old: BoxSettings, new: BoxSettings, switched: Callable[[str], bool]) -> ReloadPlan:
    """Compare the cameras of two settings.

    Args:
        old: in force.
        new: that shall be.
        switched: whether an unchanged camera is judged by another detector from now on.
    """
    before = {camera.name: (camera, *_beside(camera, old)) for camera in old.cameras if camera.enabled}
    after = {camera.name: (camera, *_beside(camera, new)) for camera in new.cameras if camera.enabled}
    same = [name for name, one in after.items() if before.get(name) == one]
    return ReloadPlan(
        ended=tuple(name for name in before if name not in same),
        begun=tuple(one[0] for name, one in after.items() if name not in same),
        switched=tuple(after[name][0] for name in same if switched(name)),
    )


class Reloads:
    """One reload at a time, in a thread of its own where a signal asks for it.

    systemd is told as sd_notify(3) wants it: ``RELOADING=1`` with the monotonic time in microseconds, then ``READY=1``,
    whether the new settings were taken or not.

    Args:
        apply: brings settings into force, or raises a LinewardError and leaves the box as it is.
        refused: is told why settings are not in force, once each time.
    """

    def __init__(self, *, apply: Callable[[BoxSettings], None], refused: Callable[[str], None]) -> None:
        self._apply, self._refused = apply, refused
        self._one = threading.Lock()
        self._asked = threading.Event()
        self._thread: threading.Thread | None = None
        self._refusal = ""

    def ask(self) -> None:
        """Want the settings read again; safe in a signal handler."""
        self._asked.set()

    def step(self, reread: Callable[[], BoxSettings]) -> None:
        """Begin a reload where one was asked for and none goes on; returns at once."""
        if self._asked.is_set() and (self._thread is None or not self._thread.is_alive()):
            self._asked.clear()
            self._thread = threading.Thread(target=self.run, args=(reread,), name="reload", daemon=True)
            self._thread.start()

    def run(self, reread: Callable[[], BoxSettings]) -> None:
        """Read settings and bring them into force; what is wrong with them is logged and shown, and changes nothing."""
        try:
            self.apply(reread)
        except LinewardError as error:
            self._refusal = str(error)
            self._refused(self._refusal)
        else:
            self._refusal = ""

    def apply(self, read: Callable[[], BoxSettings]) -> None:
        """Read settings and bring them into force; what is wrong with them is the caller's to tell.

        Raises:
            LinewardError: they cannot be read or cannot come into force; nothing has changed.
        """
        with self._one:
            notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                self._apply(read())
            finally:
                notify_systemd("READY=1")

    def warnings(self) -> list[str]:
        """Why the settings in force are not the latest ones; empty where they are."""
        refusal = self._refusal
        return [f"the new settings are not in force: {refusal}"] if refusal else []


def _beside(camera: CameraSettings, settings: BoxSettings) -> tuple[object, object]:
    """Return what else makes a camera: its station, and how it follows its line."""
    # Not the settings alone: a station is another one, too, when one of its cameras is triggered otherwise.
    station = next((plan for plan in plan_stations(settings) if camera.name in plan.cameras), None)
    return station, settings.adaptation_of(camera)
