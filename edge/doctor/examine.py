"""All checks of a machine, in an order that names causes before effects. What one check sees, the next may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.doctor.broker import look_at_broker
from edge.doctor.engines import look_at_bundles, look_at_installed, made
from edge.doctor.findings import fine, isolated, of_error
from edge.doctor.host import (
    box_is_running,
    look_at_clock,
    look_at_disk,
    look_at_keys,
    look_at_memory,
    look_at_ports,
)
from edge.errors import LinewardError
from edge.settings import BoxSettings, load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.doctor.findings import Finding


def examine(config: Path | None, *, seconds: float = 3.0, scale: float | None = None) -> Iterator[Finding]:
    """Look at everything that a box needs, and yield each finding as it comes.

    Nothing is changed but one message to the broker, see :func:`edge.doctor.broker.look_at_broker`. What is missing
    ends its own check only.

    Args:
        config: the box's YAML file; without one only the machine is looked at.
        seconds: for the frames of each camera.
        scale: pixels of the camera frame per millimetre, for all cameras.
    """
    settings: BoxSettings | None = None
    if config is not None:
        try:
            settings = load_settings(config)
        except LinewardError as error:
            yield of_error("settings", str(config), error)
        else:
            names = ", ".join(camera.name for camera in settings.cameras)
            yield fine("settings", str(config), f"{settings.site}/{settings.box} with {names}")
    yield from isolated("engine", "", look_at_installed)
    when = None if settings is None else made(settings)
    yield from isolated("clock", "", lambda: look_at_clock(when))
    yield from isolated("memory", "", look_at_memory)
    if settings is not None:
        yield from _examine_box(settings, seconds=seconds, scale=scale)


def _examine_box(settings: BoxSettings, *, seconds: float, scale: float | None) -> Iterator[Finding]:
    running = box_is_running(settings)
    if running:
        yield fine("box", f"{settings.site}/{settings.box}", "is running; figures of speed are taken beside it")
    yield from isolated("disk", "", lambda: look_at_disk(settings))
    yield from isolated("key", "", lambda: look_at_keys(settings))
    yield from isolated("port", "", lambda: look_at_ports(settings, running=running))
    yield from isolated("broker", "", lambda: look_at_broker(settings))
    yield from isolated("camera", "", lambda: _cameras(settings, seconds=seconds, scale=scale, running=running))


def _cameras(settings: BoxSettings, *, seconds: float, scale: float | None, running: bool) -> Iterator[Finding]:
    # OpenCV is loaded here and not before: without it the other checks still have something to say.
    from edge.doctor.cameras import list_genicam, look_at_cameras  # noqa: PLC0415

    yield from isolated("camera", "genicam", lambda: list_genicam(settings.cameras))
    seen = look_at_cameras(settings.cameras, seconds=seconds, running=running)
    for one in seen:
        yield from one.findings
    yield from isolated("bundle", "", lambda: look_at_bundles(settings, seen, scale=scale))
