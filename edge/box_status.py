"""What a box says of itself: versions, and the figures that Prometheus reads. It changes nothing."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

from edge.alerts.mqtt import LinkKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edge.alerts.outbox import Outbox
    from edge.alerts.publisher import Publisher
    from edge.health.exposition import Figures
    from edge.health.metrics import Metrics
    from edge.settings import BoxSettings


def versions(engines: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python, of lineward, and of what it judges and sends with, by name."""
    names = ("lineward", "numpy", "paho-mqtt", *engines)
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def figures_of(
    settings: BoxSettings,
    status: Mapping[str, Any],
    metrics: Metrics,
    *,
    outbox: Outbox | None,
    publisher: Publisher | None,
    troubles: Sequence[str],
    stuck: int,
) -> Figures:
    """Put together what Prometheus reads.

    Args:
        settings: of the box.
        status: its last status.
        metrics: of the box.
        outbox: None before it is open.
        publisher: as the outbox.
        troubles: why the box is not well.
        stuck: loops that the watchdog misses.
    """
    from edge.health.exposition import Figures  # noqa: PLC0415 (its library is loaded only where somebody reads)

    link: dict[str, int] = {}
    if publisher is not None:
        link = publisher.counters | {"connected": int(publisher.state.kind is LinkKind.CONNECTED)}
    kept: dict[str, int] = {}
    if outbox is not None:
        kept = outbox.counters | {"depth": outbox.depth, "bytes": outbox.bytes}
    return Figures(
        site=settings.site,
        box=settings.box,
        status=status,
        stages=metrics.histograms(),
        outbox=kept,
        link=link,
        healthy=not troubles,
        stuck=stuck,
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # A Jetson's onnxruntime-gpu goes by another name.
        return "unknown"
