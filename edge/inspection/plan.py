"""Plans: the stations that a box's settings ask for, the implied ones included. Makes nothing and opens nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.capture.settings import SourceKind, TriggerMode
from edge.inspection.settings import TriggerSource
from edge.settings import Mode

if TYPE_CHECKING:
    from edge.inspection.settings import StationSettings
    from edge.settings import BoxSettings, CameraSettings

NS_PER_MS = 1_000_000
# Parts of a station without a deadline wait in its camera's queue; these are on their way in or out of it.
_BESIDE_THE_QUEUE = 8


@dataclass(frozen=True, slots=True)
class StationPlan:
    """One station; two plans that are equal make stations that behave alike.

    Attributes:
        name: for its topics.
        own: implied by one camera and named like it.
        cameras: in order.
        disabled: of them, those that are switched off: their views are always missing.
        trigger: what says that a part is there.
        nok_views: so many NOK views make a part NOK.
        deadline_ns: from trigger to verdict; None for no limit.
        match_ns: window of frames of one part, of several live cameras whose frames are the triggers.
        delay_ns: from a trigger to the first frame of a camera that runs freely.
        capacity: parts without a verdict.
        live: whether the cameras are live; else they read files.
        fired: cameras with a software trigger.
        free: live cameras that run at their own rate.
        named_by_file: cameras whose frames have the part's name.
    """

    name: str
    own: bool
    cameras: tuple[str, ...]
    disabled: frozenset[str]
    trigger: TriggerSource
    nok_views: int
    deadline_ns: int | None
    match_ns: int
    delay_ns: int
    capacity: int
    live: bool
    fired: frozenset[str]
    free: frozenset[str]
    named_by_file: frozenset[str]


def plan_stations(settings: BoxSettings) -> tuple[StationPlan, ...]:
    """The stations of a box: those that the settings name, then one for each other triggered camera that is enabled."""
    cameras = {camera.name: camera for camera in settings.cameras}
    named = [_named(station, [cameras[name] for name in station.cameras]) for station in settings.stations]
    taken = {name for station in settings.stations for name in station.cameras}
    implied = [
        _implied(camera)
        for camera in settings.cameras
        if camera.mode is Mode.TRIGGERED and camera.enabled and camera.name not in taken
    ]
    return (*named, *implied)


def _named(station: StationSettings, cameras: list[CameraSettings]) -> StationPlan:
    return StationPlan(
        name=station.name,
        own=False,
        cameras=station.cameras,
        disabled=frozenset(camera.name for camera in cameras if not camera.enabled),
        trigger=station.trigger,
        nok_views=station.nok_views,
        deadline_ns=round(station.deadline_ms * NS_PER_MS),
        match_ns=round(station.match_ms * NS_PER_MS),
        delay_ns=round(station.delay_ms * NS_PER_MS),
        capacity=station.max_parts,
        live=cameras[0].source.live,
        fired=_fired(cameras),
        free=frozenset(
            one.name for one in cameras if one.source.live and one.source.trigger is TriggerMode.FREE and one.enabled
        ),
        named_by_file=_named_by_file(cameras),
    )


def _implied(camera: CameraSettings) -> StationPlan:
    return StationPlan(
        name=camera.name,
        own=True,
        cameras=(camera.name,),
        disabled=frozenset(),
        trigger=TriggerSource.FRAME,
        nok_views=1,
        # Less than a nanosecond is no time at all.
        deadline_ns=None if camera.timeout_ms is None else max(1, round(camera.timeout_ms * NS_PER_MS)),
        match_ns=0,
        delay_ns=0,
        capacity=camera.source.capacity + _BESIDE_THE_QUEUE,
        live=camera.source.live,
        fired=frozenset(),
        free=frozenset(),
        named_by_file=_named_by_file([camera]),
    )


def _fired(cameras: list[CameraSettings]) -> frozenset[str]:
    return frozenset(camera.name for camera in cameras if camera.source.trigger is TriggerMode.SOFTWARE)


def _named_by_file(cameras: list[CameraSettings]) -> frozenset[str]:
    return frozenset(camera.name for camera in cameras if camera.source.kind is SourceKind.FOLDER)
