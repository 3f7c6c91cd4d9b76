"""Other settings in a running box: what changed changes, everything else loses no frame."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import threading
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml

from edge.alerts.message import Alert, Notice
from edge.box import Box
from edge.cli import RESTART_EXIT
from edge.frames import EventPhase
from edge.settings import BoxSettings, load_settings
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from tests.edge.tiny_memory import make_memory_bundle
from tests.end_to_end.test_box import SOON, collect, listening, running, said

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.bundle import Bundle
    from edge.frames import Verdict
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "other", product="other")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of good and of defective frames."""
    folder = tmp_path_factory.mktemp("images")
    for name, make in (("good", good_frame), ("bad", defective_frame)):
        (folder / name).mkdir()
        for index in range(3):
            cv2.imwrite(str(folder / name / f"{index}.png"), make(3000 + index))
    return {"good": folder / "good", "bad": folder / "bad"}


class Seen:
    """Sequence numbers of judged frames, by camera."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seqs: dict[str, list[int]] = defaultdict(list)

    def take(self, _name: str, verdict: Verdict) -> None:
        with self._changed:
            self._seqs[verdict.camera].append(verdict.camera_seq)
            self._changed.notify_all()

    def of(self, camera: str) -> list[int]:
        with self._changed:
            return list(self._seqs[camera])

    def wait_for_more(self, camera: str, count: int = 5) -> None:
        with self._changed:
            wanted = len(self._seqs[camera]) + count
            assert self._changed.wait_for(lambda: len(self._seqs[camera]) >= wanted, SOON)


def camera(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": {"kind": "folder", "path": str(folder), "loop": True, "fps": 50}, **more}


def settings(folder: Path, bundle: Path, url: str, cameras: list[dict[str, Any]], **more: Any) -> BoxSettings:
    return BoxSettings.model_validate(
        {
            "site": "plant", "box": "box1", "state_dir": folder / "state", "bundle": bundle, "threads": 1,
            "engine": "onnxruntime", "broker": {"url": url, "backoff_max_s": 0.5}, "cameras": cameras, **more,
        }
    )  # fmt: skip


def write_config(path: Path, bundle: Path, url: str, cameras: list[dict[str, Any]], **more: Any) -> None:
    content = {
        "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle), "threads": 1,
        "engine": "onnxruntime", "broker": {"url": url}, "cameras": cameras, **more,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))


@contextlib.contextmanager
def started(wanted: BoxSettings) -> Iterator[tuple[Box, Seen]]:
    seen = Seen()
    box = Box(wanted, on_verdict=seen.take)
    box.start()
    try:
        yield box, seen
    finally:
        box.stop()


def without_gap(seqs: list[int]) -> bool:
    return seqs == list(range(len(seqs)))


def test_unchanged_camera_loses_no_frame_while_others_change(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, images: dict[str, Path]
) -> None:
    def wanted(*cameras: dict[str, Any]) -> BoxSettings:
        return settings(tmp_path, bundle.path, mosquitto.url, list(cameras))

    stays = camera("stays", images["bad"])
    before = wanted(stays, camera("changes", images["good"]), camera("goes", images["good"]))
    slower = camera("changes", images["good"], events={"enter_hits": 2, "enter_window": 2})
    after = wanted(camera("comes", images["good"]), stays, slower)
    with listening(mosquitto.url) as subscriber:
        with started(before) as (box, seen):
            for name in ("stays", "changes", "goes"):
                seen.wait_for_more(name)
            worker = box.cameras["stays"]
            box.reload(after)
            gone, changed = seen.of("goes"), seen.of("changes")
            for name in ("stays", "changes", "comes"):
                seen.wait_for_more(name)
            status = box.status()

            assert box.cameras["stays"] is worker
        messages = collect(subscriber, said("stopped"))

    assert without_gap(seen.of("stays"))
    alerts = [m for m in messages if isinstance(m, Alert) and m.camera == "stays" and m.phase is not EventPhase.UPDATE]
    assert [alert.phase.value for alert in alerts] == ["new", "end"]
    assert alerts[1].camera_seq == seen.of("stays")[-1]
    assert without_gap(seen.of("comes"))
    assert seen.of("goes") == gone
    assert list(status["cameras"]) == ["comes", "stays", "changes"]
    later = seen.of("changes")
    assert later == sorted(set(later))
    assert len(later) > len(changed)
    assert box.settings == after
    assert not box.status()["warnings"] or all("settings" not in text for text in box.status()["warnings"])


def test_disabled_camera_is_shown_and_enabled_again(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, images: dict[str, Path]
) -> None:
    one, two = camera("one", images["good"]), camera("two", images["good"])
    with started(settings(tmp_path, bundle.path, mosquitto.url, [one, {**two, "enabled": False}])) as (box, seen):
        seen.wait_for_more("one")
        states = {name: shown["state"] for name, shown in box.status()["cameras"].items()}
        box.reload(settings(tmp_path, bundle.path, mosquitto.url, [one, two]))
        seen.wait_for_more("two")

    assert states["two"] == "disabled"
    assert without_gap(seen.of("one"))


def test_switched_link_brings_the_other_bundle_between_two_frames(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, other_bundle: Bundle, images: dict[str, Path]
) -> None:
    link = tmp_path / "judging"
    link.symlink_to(bundle.path)
    wanted = settings(tmp_path, link, mosquitto.url, [camera("cam", images["bad"])])
    with listening(mosquitto.url) as subscriber, started(wanted) as (box, seen):
        seen.wait_for_more("cam")
        assert box._contents.detectors is not None
        old = weakref.ref(box._contents.detectors.default)
        (tmp_path / "next").symlink_to(other_bundle.path)
        (tmp_path / "next").rename(link)
        box.reload(wanted)
        seen.wait_for_more("cam", 10)
        messages = collect(
            subscriber,
            lambda found: [m.phase.value for m in found if isinstance(m, Alert)][:3] == ["new", "end", "new"],
        )
        gc.collect()
        status = box.status()

        assert old() is None
    alerts = [m for m in messages if isinstance(m, Alert)]
    assert [alert.bundle.id for alert in alerts] == [bundle.id, bundle.id, other_bundle.id]
    assert [alert.product for alert in alerts] == ["tiny", "tiny", "other"]
    assert status["bundle"]["id"] == other_bundle.id
    assert without_gap(seen.of("cam"))


@pytest.mark.parametrize("case", ["broker", "damaged bundle"])
def test_what_cannot_be_taken_over_changes_nothing(
    case: str, tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, images: dict[str, Path]
) -> None:
    cameras = [camera("cam", images["bad"])]
    before = settings(tmp_path, bundle.path, mosquitto.url, cameras)
    more = [*cameras, camera("more", images["good"])]
    (tmp_path / "empty").mkdir()
    if case == "broker":
        after = settings(tmp_path, bundle.path, "mqtt://elsewhere", more)
    else:
        after = settings(tmp_path, tmp_path / "empty", mosquitto.url, more)
    with listening(mosquitto.url) as subscriber, started(before) as (box, seen):
        seen.wait_for_more("cam")
        box.reload(after)
        seen.wait_for_more("cam")
        messages = collect(subscriber, lambda found: any(isinstance(m, Notice) for m in found))
        refused = box.status()
        box.reload(before)

        assert not any("settings" in text for text in box.status()["warnings"])
    notice = next(m for m in messages if isinstance(m, Notice))
    assert notice.kind == "settings.refused"
    assert ("broker" if case == "broker" else str(tmp_path / "empty")) in notice.text
    assert any(notice.text in text for text in refused["warnings"])
    assert list(refused["cameras"]) == ["cam"]
    assert without_gap(seen.of("cam"))


def test_box_with_a_memory_ends_to_be_started_again(
    tmp_path: Path, mosquitto: Mosquitto, images: dict[str, Path]
) -> None:
    memory = make_memory_bundle(tmp_path / "memory")
    config = tmp_path / "box.yaml"

    def write(*names: str) -> None:
        write_config(config, memory.path, mosquitto.url, [camera(name, images["good"]) for name in names], memory={})

    write("one")
    with listening(mosquitto.url) as subscriber, running(config) as box:
        collect(subscriber, lambda found: any(getattr(m, "state", "") == "ok" for m in found))
        write("one", "two")
        box.send_signal(signal.SIGHUP)

        assert box.wait(SOON) == RESTART_EXIT
        collect(subscriber, said("stopped"))


def test_sighup_reads_the_file_again_and_systemd_is_told(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, images: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "box.yaml"

    def write(*names: str, **more: Any) -> None:
        write_config(config, bundle.path, mosquitto.url, [camera(name, images["good"]) for name in names], **more)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, listening(mosquitto.url) as subscriber:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(SOON)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def told(wanted: str) -> str:
            while wanted not in (said := systemd.recv(4096).decode()):
                assert said == "WATCHDOG=1", said
            return said

        write("one")
        load_settings(config)
        with running(config) as box:
            told("READY=1")
            write("one", bogus=1)
            box.send_signal(signal.SIGHUP)
            assert "\nMONOTONIC_USEC=" in told("RELOADING=1")
            told("READY=1")
            messages = collect(subscriber, lambda found: any(isinstance(m, Notice) for m in found))
            write("one", "two")
            box.send_signal(signal.SIGHUP)
            told("RELOADING=1")
            told("READY=1")
            collect(subscriber, lambda found: any(getattr(m, "camera", "") == "two" for m in found))
            box.send_signal(signal.SIGTERM)
            told("STOPPING=1")

            assert box.wait(SOON) == 0
    notice = next(m for m in messages if isinstance(m, Notice))
    assert "bogus: unknown key" in notice.text
