"""Followers over a box's life: a reload, another bundle and the way back, and a memory that learns beside them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import cv2
import pytest

from edge.alerts.commander import Commander
from edge.alerts.settings import BrokerSettings
from edge.inference.preprocessing import to_canvas
from tests.edge.tiny_bundle import MOMENTS, defective_frame, good_frame, make_tiny_bundle, repack, write_moments
from tests.edge.tiny_memory import PREPROCESSING, make_memory_bundle
from tests.end_to_end.test_reload import SOON, camera, settings, started

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.alerts.message import CommandResult
    from edge.box import Box
    from edge.bundle import Bundle
    from edge.settings import BoxSettings
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
# A snapshot with every frame, so that a version says how many were learned.
EAGER = {"every_frames": 1, "least": 0, "settle_frames": 5, "window": 10, "freeze_rate": 0.5, "thaw_rate": 0.1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", moments=True)


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "other", product="other", moments=True)


@pytest.fixture(scope="module")
def memory_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a memory and moments."""
    donor = make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "donor")
    bundle = make_memory_bundle(tmp_path_factory.mktemp("bundle") / "woven")
    write_moments(donor.path, PREPROCESSING, [to_canvas(good_frame(seed), PREPROCESSING) for seed in range(30)])
    (donor.path / MOMENTS).rename(bundle.path / MOMENTS)
    return repack(bundle, moments_file=MOMENTS)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), good_frame(3000 + index))
    return folder


def shown(box: Box, name: str) -> dict[str, Any]:
    found: dict[str, Any] = box.status()["detail"].get("adaptation", {}).get("cameras", {}).get(name, {})
    return found


def wait_until(box: Box, holds: Callable[[dict[str, Any]], bool], name: str = "cam") -> dict[str, Any]:
    deadline = time.monotonic() + SOON
    while not holds(found := shown(box, name)):
        assert time.monotonic() < deadline, f"waited in vain; {found} {box.status()['warnings']}"
        time.sleep(0.01)
    return found


def test_reload_keeps_what_cameras_have_learned(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, good: Path
) -> None:
    def wanted(*cameras: dict[str, Any], **adaptation: Any) -> BoxSettings:
        return settings(tmp_path, bundle.path, mosquitto.url, list(cameras), adaptation={**EAGER, **adaptation})

    stays, changes = camera("stays", good), camera("changes", good)
    with started(wanted(stays, changes)) as (box, _):
        for name in ("stays", "changes"):
            wait_until(box, lambda one: one["version"] > 10, name)
        worker, before = box.cameras["stays"], {name: shown(box, name) for name in ("stays", "changes")}
        box.reload(wanted(stays, {**changes, "events": {"leave_calm": 4}}, camera("comes", good)))
        assert box.cameras["stays"] is worker
        for name, one in before.items():
            assert (
                wait_until(box, lambda now, one=one: now["version"] > one["version"] + 5, name)["phase"] == "following"
            )
        wait_until(box, lambda one: one.get("version", 0) > 3, "comes")

        version = shown(box, "stays")["version"]
        box.reload(wanted(stays, changes, bound=5.0))
        assert box.cameras["stays"] is not worker
        found = wait_until(box, lambda one: one["version"] > version, "stays")
        assert found["bound"] == 5
        assert shown(box, "comes") == {}


def test_other_bundle_begins_at_its_moments_and_the_one_before_goes_on(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, other_bundle: Bundle, good: Path
) -> None:
    link = tmp_path / "judging"
    link.symlink_to(bundle.path)
    wanted = settings(tmp_path, link, mosquitto.url, [camera("cam", good)], adaptation=EAGER)

    def switch_to(target: Bundle) -> None:
        (tmp_path / "next").symlink_to(target.path)
        (tmp_path / "next").rename(link)
        box.reload(wanted)

    with started(wanted) as (box, _):
        first = wait_until(box, lambda one: one["version"] > 10)
        switch_to(other_bundle)
        second = wait_until(box, lambda one: one["frames"]["accepted"] > 3)
        assert second["frames"]["accepted"] < first["frames"]["accepted"]
        # No number is given twice, whatever the follower of the other bundle still gave.
        assert second["version"] > first["version"]
        switch_to(bundle)
        third = wait_until(box, lambda one: one["frames"]["accepted"] > first["frames"]["accepted"])
        assert third["version"] > second["version"]


def test_reset_is_done_once_for_its_key_and_not_after_its_expiry(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, good: Path
) -> None:
    wanted = settings(tmp_path, bundle.path, mosquitto.url, [camera("cam", good)], adaptation=EAGER)

    def ask(verb: str, **how: Any) -> CommandResult:
        broker = BrokerSettings(url=mosquitto.url, backoff_max_s=0.5)
        with Commander(broker, site="plant", box="box1") as commander:
            return commander.ask(verb, {"camera": "cam"} | how.pop("fields", {}), timeout=SOON, **how)

    def done() -> int:
        return int(box.status()["detail"]["adaptation"]["counters"]["commands"])

    with started(wanted) as (box, _):
        wait_until(box, lambda one: one["version"] > 3)
        first = ask("reset", key="k1")
        assert first.ok, first.reason
        again = ask("reset", key="k1")
        assert (again.ok, again.detail) == (True, first.detail)
        assert done() == 1
        refused = ask("recipe", fields={"recipe": "blue", "expires_at": "2020-01-01T00:00:00Z"})
        assert not refused.ok
        assert refused.reason.startswith(("expired", "clock"))
        assert done() == 1
        assert ask("recipe", fields={"recipe": "blue"}).ok
        wait_until(box, lambda one: one["recipe"] == "blue" and one["phase"] == "following")


def test_memory_learns_while_moments_follow_and_not_while_they_are_frozen(
    tmp_path: Path, mosquitto: Mosquitto, memory_bundle: Bundle, good: Path
) -> None:
    wanted = settings(
        tmp_path, memory_bundle.path, mosquitto.url, [camera("cam", good)], adaptation=EAGER,
        memory={"every_s": 0.1, "quantile": 0.99, "ship_every_s": 3600},
    )  # fmt: skip

    def fed() -> int:
        return int(box.status()["detail"]["memory"]["fed_since_start"])

    with started(wanted) as (box, seen):
        wait_until(box, lambda one: one["version"] > 5)
        wait_until(box, lambda _: fed() > 2)
        for index in range(3):
            cv2.imwrite(str(good / f"{index}.png"), defective_frame(9000 + index))
        wait_until(box, lambda one: one["phase"] == "frozen")
        seen.wait_for_more("cam", 3)
        memory = box.status()["detail"]["memory"]
        looked_at = memory["fed_since_start"] + memory["turned_away_since_start"]
        seen.wait_for_more("cam", 20)
        after = box.status()["detail"]["memory"]
        assert after["fed_since_start"] + after["turned_away_since_start"] <= looked_at + 1, "one may have been waiting"
