"""What a soak is made of: the box's settings, the faults around it, and a subscriber that asks for what is missing.

It must not know how long it lasts nor what is asked of the box.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from edge.alerts.commander import Commander
from edge.alerts.message import Alert, CameraState, Gap, Notice, Status
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.errors import LinewardError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks._mjpeg_server import MjpegServer
    from edge.bundle import Bundle
    from tests.faults.fault_proxy import FaultProxy
    from tests.mosquitto_process import Mosquitto

SITE, BOX, CAMERAS = "bench", "soak", ("opencv", "gstreamer")
FPS = 10.0
REPLAY_ROWS = 500
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Sample:
    """What the process is like at one moment."""

    at_s: float
    rss_mb: float
    descriptors: int
    threads: int
    calm: bool


@dataclass
class Soak:
    """What was seen."""

    samples: list[Sample] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    status: Status | None = None
    states: dict[str, str] = field(default_factory=dict)
    received: set[tuple[str, int]] = field(default_factory=set)
    gaps: list[Gap] = field(default_factory=list)
    repeated: int = 0
    recovered: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """Something that fails: ``begin`` and, when it is over, ``end``."""

    name: str
    begin: Callable[[], object]
    end: Callable[[], object] = lambda: None


def settings_of(bundle: Bundle, folder: Path, *, proxy: int, cameras: dict[str, MjpegServer], threshold: float) -> Any:  # noqa: ANN401 (YAML)
    """What the box's YAML file says."""
    pipeline = "souphttpsrc location={} is-live=true ! multipartdemux ! jpegdec ! videoconvert"
    sources = {
        "opencv": {"kind": "camera", "url": cameras["opencv"].url},
        "gstreamer": {"kind": "gstreamer", "pipeline": pipeline.format(cameras["gstreamer"].url)},
    }
    return {
        "site": SITE, "box": BOX, "state_dir": str(folder / "state"), "bundle": str(bundle.path.resolve()),
        "broker": {
            "url": f"mqtt://127.0.0.1:{proxy}", "replay_rows": REPLAY_ROWS, "backoff_max_s": 2.0, "keepalive_s": 5,
        },
        "status_every_s": 1.0,
        "evidence": {"max_mb": 8, "min_free_mb": 0},
        "cameras": [
            {
                "name": name, "source": {**source, "reconnect_seconds": 2.0, "stall_seconds": 3.0}, "frame_rate": FPS,
                "threshold": {"value": threshold, "bundle_id": bundle.id, "memory_version": 0},
                "events": {"enter_hits": 3, "enter_window": 5, "leave_calm": 5, "leave_quantile": 0.999},
            }
            for name, source in sources.items()
        ],
    }  # fmt: skip


class Watcher:
    """Takes in what a subscriber sees, in a thread; asks for what is missing as any consumer may."""

    def __init__(self, url: str, soak: Soak) -> None:
        self._settings, self._soak = BrokerSettings(url=url, backoff_max_s=0.5), soak
        self._subscriber = Subscriber(self._settings, kinds=EVERYTHING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stop = threading.Event()

    def __enter__(self) -> Watcher:  # noqa: PYI034 (Self needs Python 3.11)
        self._subscriber.start()
        self._subscriber.wait_until_ready(PATIENCE_S)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._subscriber.stop()

    @property
    def duplicates(self) -> int:
        """Messages that came more than once."""
        return self._subscriber.counters["duplicates"]

    def ask_again(self, last: tuple[str, int] | None = None) -> None:
        """Ask the box for numbers that have not come; ``last``: the highest one there is, where that is known."""
        received = self._soak.received
        for epoch in {epoch for epoch, _ in received}:
            numbers = {seq for one, seq in received if one == epoch}
            numbers |= {seq for gap in self._soak.gaps if gap.epoch == epoch for seq in range(gap.first, gap.last + 1)}
            top = last[1] if last is not None and last[0] == epoch else max(numbers)
            missing = sorted(set(range(1, top + 1)) - numbers)
            if missing:
                self._soak.repeated += len(missing)
                with contextlib.suppress(LinewardError), Commander(self._settings, site=SITE, box=BOX) as commander:
                    commander.ask("replay", {"epoch": epoch, "from": missing[0], "to": missing[-1]})

    def _run(self) -> None:
        while not self._stop.is_set():
            received = self._subscriber.receive(0.2)
            message = None if received is None else received.message
            if isinstance(message, (Alert, Notice, Gap)):
                self._soak.received.add((message.epoch, message.seq))
                if isinstance(message, Gap):
                    self._soak.gaps.append(message)
            elif isinstance(message, Status):
                self._soak.status = message
            elif isinstance(message, CameraState):
                self._soak.states[message.camera] = message.state


def faults_of(
    process: subprocess.Popen[bytes],
    broker: Mosquitto,
    proxy: FaultProxy,
    cameras: dict[str, MjpegServer],
    config: Path,
) -> list[Fault]:
    """The faults in their order."""
    turns = itertools.cycle([6, 5])

    def change_settings() -> None:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        content["cameras"][0]["events"]["leave_calm"] = next(turns)
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        process.send_signal(signal.SIGHUP)

    def limit_files(size: int) -> None:
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def swallow() -> None:
        proxy.faults.swallow = True

    def forward() -> None:
        proxy.faults.swallow = False
        proxy.reset()

    return [
        Fault("broker killed", broker.restart),
        Fault("broker away", broker.stop, broker.start),
        Fault("camera cut (OpenCV)", cameras["opencv"].cut, cameras["opencv"].plug_in),
        Fault("camera cut (GStreamer)", cameras["gstreamer"].cut, cameras["gstreamer"].plug_in),
        Fault("SIGHUP", lambda: process.send_signal(signal.SIGHUP)),
        Fault("camera's settings changed", change_settings),
        Fault("network black hole", swallow, forward),
        Fault("no file may grow", lambda: limit_files(4096), lambda: limit_files(resource.RLIM_INFINITY)),
    ]
