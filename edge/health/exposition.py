"""What a box shows to Prometheus: figures in, metric families out. It must not know where figures come from.

Names follow prometheus.io/docs/practices/naming: base units, ``_total`` for counters, one meaning per name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)

from edge.adaptation.follower import Phase
from edge.capture.capture import CameraState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.core import Metric

    from edge.health.metrics import Histogram

# Counters of a camera in the status -> name without _total, and what is counted.
_CAMERA_COUNTERS = {
    "captured": ("lineward_frames_captured", "Frames read and decoded."),
    "judged": ("lineward_frames_judged", "Frames that got OK or NOK."),
    "nok": ("lineward_frames_nok", "Frames at or above the threshold."),
    "not_judged": ("lineward_frames_not_judged", "Frames or parts that were not judged, with a reason."),
    "dropped": ("lineward_frames_dropped", "Frames lost to the drop policy."),
    "corrupt": ("lineward_frames_corrupt", "Images that could not be decoded."),
    "failed": ("lineward_frames_failed", "Frames whose judging failed."),
    "reconnects": ("lineward_camera_reconnects", "Connections made after the first was lost."),
    "restarts": ("lineward_camera_restarts", "Captures made anew after they broke down."),
    "events": ("lineward_anomaly_events", "Anomaly events that began."),
}
_OUTBOX_COUNTERS = {
    "appended": ("lineward_outbox_appended", "Messages stored."),
    "acknowledged": ("lineward_outbox_acknowledged", "Messages that the broker has acknowledged."),
    "dropped": ("lineward_outbox_dropped", "Messages given up on purpose, each with a gap message in its place."),
    "set_aside": ("lineward_outbox_dead_letters", "Messages that the broker refuses for good."),
    "commits": ("lineward_outbox_commits", "Disk syncs that stored messages took."),
}
_LINK_COUNTERS = {
    "published": ("lineward_broker_published", "Messages sent, repeats included."),
    "refused": ("lineward_broker_refused", "Messages that the broker has refused."),
    "connections": ("lineward_broker_connections", "Connections to the broker."),
    "commands": ("lineward_commands", "Commands received."),
}
# Of a follower in the status -> name, and what it is.
_ADAPTATION_GAUGES = {
    "shift": (
        "adaptation_shift",
        "From the training set to what is shown; good images differ by 1.",
    ),
    "bound": ("adaptation_shift_bound", "Largest shift that is followed."),
    "alarm_rate": ("adaptation_alarm_rate", "Share of alarming frames in the window that freezes."),
    "version": ("moments_version", "Of the newest snapshot of moments, 0 for none."),
    "drifting": ("adaptation_drifting", "1 while the shift is at the level of the drift notice."),
    "at_bound": ("adaptation_at_bound", "1 while the bound keeps moments from following."),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """A box at one moment.

    Attributes:
        site: of the box.
        box: its name.
        status: the fields of :class:`edge.alerts.message.Status`.
        stages: latency histograms by stage.
        outbox: counters of the outbox, with ``depth`` and ``bytes``; empty before it is open.
        link: counters of the connection to the broker, with ``connected``.
        healthy: whether all loops go round.
        stuck: loops that do not.
    """

    site: str
    box: str
    status: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Histogram] = field(default_factory=dict)
    outbox: Mapping[str, int] = field(default_factory=dict)
    link: Mapping[str, int] = field(default_factory=dict)
    healthy: bool = False
    stuck: int = 0


def families(figures: Figures) -> Iterator[Metric]:
    """Yield what Prometheus reads of a box."""
    status = figures.status
    yield from _box(figures)
    yield _stages(figures)
    yield from _cameras(status.get("cameras", {}))
    yield from _adaptation(status.get("detail", {}).get("adaptation", {}).get("cameras", {}))
    yield from _outbox(figures)
    counts = CounterMetricFamily("lineward_counts", "Every counter of the box, by its name in the status.",
                                 labels=["what"])  # fmt: skip
    for what, value in status.get("drops", {}).items():
        counts.add_metric([what], value)
    yield counts


def _box(figures: Figures) -> Iterator[Metric]:
    status = figures.status
    bundle, memory = status.get("bundle") or {}, status.get("memory") or {}
    yield InfoMetricFamily("lineward_box", "Who the box is.", {"site": figures.site, "box": figures.box})
    yield InfoMetricFamily("lineward_build", "Versions.", _texts(status.get("versions", {})))
    yield InfoMetricFamily(
        "lineward_engine",
        "What judges on.",
        {"engine": status.get("engine") or "", "precision": status.get("precision") or ""},
    )
    yield InfoMetricFamily(
        "lineward_bundle",
        "The box's own bundle.",
        {"id": bundle.get("id", ""), "method": bundle.get("method", ""), "product": status.get("product") or ""},
    )
    gauges = {
        "lineward_up_seconds": ("Since the start.", status.get("uptime_ms", 0) / 1e3),
        "lineward_healthy": ("1 while all loops go round.", float(figures.healthy)),
        "lineward_stuck_loops": ("Loops that the watchdog misses.", figures.stuck),
        "lineward_warnings": ("What an operator should know; the texts are in the status.",
                              len(status.get("warnings", ()))),
        "lineward_memory_version": ("Of the memory in force, 0 for the packed one.", memory.get("version", 0)),
        "lineward_fleet_memory_version": ("Of the fleet's memory in it, 0 for none.", memory.get("fleet", 0)),
    }  # fmt: skip
    if status.get("clock_synced") is not None:
        gauges["lineward_clock_synchronised"] = ("1 while a time server is followed.", float(status["clock_synced"]))
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(name, text, value)


def _stages(figures: Figures) -> Metric:
    found = HistogramMetricFamily(
        "lineward_stage_duration_seconds",
        "Of a frame: preprocess, inference, judgement; processing is their sum, total counts from its capture; "
        "store is a message onto the disk.",
        labels=["stage"],
    )
    for stage, histogram in sorted(figures.stages.items()):
        buckets = [("+Inf" if bound == float("inf") else repr(bound), count) for bound, count in histogram.buckets]
        found.add_metric([stage], buckets, histogram.sum_s)
    return found


def _cameras(cameras: Mapping[str, Any]) -> Iterator[Metric]:
    state = StateSetMetricFamily("lineward_camera_state", "1 for the state that a camera is in.", labels=["camera"])
    queued = GaugeMetricFamily("lineward_queue_depth", "Frames that wait to be judged.", labels=["camera"])
    threshold = GaugeMetricFamily("lineward_threshold", "Raw score from which a frame is NOK.", labels=["camera"])
    version = GaugeMetricFamily("lineward_threshold_version", "Changes of the threshold.", labels=["camera"])
    counters = {
        key: CounterMetricFamily(name, text, labels=["camera"]) for key, (name, text) in _CAMERA_COUNTERS.items()
    }
    names = [one.value for one in CameraState]
    for name, said in cameras.items():
        state.add_metric([name], {one: one == said["state"] for one in dict.fromkeys((*names, said["state"]))})
        if said.get("queued") is not None:
            queued.add_metric([name], said["queued"])
        if said.get("threshold"):
            threshold.add_metric([name], said["threshold"]["value"])
        if said.get("threshold_version") is not None:
            version.add_metric([name], said["threshold_version"])
        for key, family in counters.items():
            if key in said["counters"]:
                family.add_metric([name], said["counters"][key])
    yield from (state, queued, threshold, version, *counters.values())


def _adaptation(cameras: Mapping[str, Any]) -> Iterator[Metric]:
    if not cameras:
        return
    phase = StateSetMetricFamily("lineward_adaptation_phase", "1 for what a follower does.", labels=["camera"])
    frames = CounterMetricFamily(
        "lineward_adaptation_frames", "Frames shown to a follower, by what became of them.", labels=["camera", "fate"]
    )
    gauges = {
        key: GaugeMetricFamily(f"lineward_{name}", text, labels=["camera"])
        for key, (name, text) in _ADAPTATION_GAUGES.items()
    }
    for name, said in cameras.items():
        phase.add_metric([name], {one.value: one.value == said["phase"] for one in Phase})
        for fate, count in said["frames"].items():
            frames.add_metric([name, fate], count)
        for key, family in gauges.items():
            family.add_metric([name], float(said[key]))
    yield from (phase, frames, *gauges.values())


def _outbox(figures: Figures) -> Iterator[Metric]:
    yield GaugeMetricFamily("lineward_broker_connected", "1 while connected.", figures.link.get("connected", 0))
    yield GaugeMetricFamily(
        "lineward_outbox_depth", "Messages that wait for an acknowledgement.", figures.outbox.get("depth", 0)
    )
    yield GaugeMetricFamily("lineward_outbox_bytes", "Size of all messages kept.", figures.outbox.get("bytes", 0))
    for known, values in ((_OUTBOX_COUNTERS, figures.outbox), (_LINK_COUNTERS, figures.link)):
        for key, (name, text) in known.items():
            if key in values:
                yield CounterMetricFamily(name, text, values[key])


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    # A label's name has no hyphen.
    return {name.replace("-", "_"): str(value) for name, value in values.items()}
