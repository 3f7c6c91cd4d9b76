"""One box, one bundle, two products: recipes over MQTT and Modbus, wrong parts, restarts, reloads, other bundles."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml

from edge.alerts.commander import Commander
from edge.alerts.message import Alert, Notice, NoticeKind, Status, VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.inspection.registers import RecipeAnswer
from tests.edge.routed_bundle import BRIGHT, DARK, bright_frame, dark_frame
from tests.edge.unified_bundle import PRODUCTS, broken, make_product_file, make_unified_bundle
from tests.end_to_end.test_inspection import LINEWARD, collect, listening, running
from tests.end_to_end.test_reload import SOON, camera, settings, started
from tests.plc import Plc

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

    from edge.alerts.message import CommandResult
    from edge.box import Box
    from edge.bundle import Bundle
    from edge.settings import BoxSettings
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
# What lies in front of the press, part after part; the folder is begun anew with each start of the box.
PARTS: list[tuple[str, bool]] = [
    (DARK, False), (BRIGHT, False), (BRIGHT, True), (DARK, False), (DARK, True), (BRIGHT, False),
]  # fmt: skip
LOOSE = {"budget": {"false_events_per_hour": 5000}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_unified_bundle(tmp_path_factory.mktemp("bundle") / "unified", moments=True)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_unified_bundle(tmp_path_factory.mktemp("bundle") / "blind", router=False)


def image_of(product: str, seed: int, *, defective: bool = False) -> np.ndarray:
    image = dark_frame(seed) if product == DARK else bright_frame(seed)
    return broken(image) if defective else image


def folder_of(path: Path, parts: list[tuple[str, bool]]) -> Path:
    path.mkdir()
    for index, (product, defective) in enumerate(parts):
        cv2.imwrite(str(path / f"{index:03d}.png"), image_of(product, 5000 + index, defective=defective))
    return path


def config_of(path: Path, url: str, bundle: Bundle) -> Path:
    press = {"kind": "folder", "path": str(folder_of(path / "press", PARTS)), "trigger": "software"}
    belt = folder_of(path / "belt", [(DARK, True)] * 2)
    content = {
        "site": "plant", "box": "box1", "state_dir": str(path / "state"), "bundle": str(bundle.path), "threads": 1,
        "engine": "onnxruntime", "broker": {"url": url, "backoff_max_s": 0.5}, "modbus": {"port": 0},
        "cameras": [
            camera("belt", belt, **LOOSE) | {"source": {"kind": "folder", "path": str(belt), "loop": True, "fps": 20}},
            {"name": "top", "mode": "triggered", "source": press, "budget": {"false_nok_per_1000": 100}},
        ],
        "stations": [{"name": "press", "cameras": ["top"], "trigger": "modbus", "deadline_ms": 20_000}],
    }  # fmt: skip
    config = path / "box.yaml"
    config.write_text(yaml.safe_dump(content))
    return config


def asker(url: str) -> Commander:
    return Commander(BrokerSettings(url=url, backoff_max_s=0.5), site="plant", box="box1")


def recipe(ask: Commander, name: str | None, camera: str | None = None) -> CommandResult:
    return ask.ask("recipe", {"recipe": name, "camera": camera}, timeout=SOON)


def test_a_line_changes_its_product_over_mqtt_and_modbus(mosquitto: Mosquitto, bundle: Bundle, tmp_path: Path) -> None:
    config = config_of(tmp_path, mosquitto.url, bundle)
    read: list[dict[str, Any]] = []
    with listening(mosquitto.url) as subscriber, asker(mosquitto.url) as ask:
        with running(config) as port:
            plc = Plc(port)
            plc.wait_until_running()

            def part() -> None:
                plc.trigger(plc.triggered)
                read.append(plc.verdict())

            assert plc.recipe == 0
            part()  # the router sees a dark one
            assert plc.choose(2) == (2, RecipeAnswer.IN_FORCE)
            part()
            part()
            part()  # a dark one, where bright ones run
            answer = recipe(ask, DARK, "top")
            assert answer.ok, answer.reason
            assert answer.detail["cameras"] == ["top"]
            part()
            assert plc.choose(9) == (1, RecipeAnswer.UNKNOWN_NUMBER)
            part()  # a bright one, where dark ones run
            # The other camera, which no PLC knows: first by the router, then by command.
            messages = collect(subscriber, lambda found: any(isinstance(one, Alert) for one in found))
            assert recipe(ask, BRIGHT, "belt").ok
            messages += collect(
                subscriber,
                lambda found: any(
                    isinstance(one, Status) and one.cameras["belt"]["recipe"]["name"] == BRIGHT
                    for one in found  # type: ignore[call-overload, index] (JSON)
                ),
            )
            refused = recipe(ask, "tiles")
            assert not refused.ok
            assert "its bundle has no product 'tiles'; it has: dark, bright" in refused.reason

        first = [one for one in messages if isinstance(one, VerdictMessage)]
        assert [(one.decision.value, one.adaptation.subclass) for one in first] == [
            ("OK", DARK), ("OK", BRIGHT), ("NOK", BRIGHT), ("NOT_JUDGED", ""), ("NOK", DARK), ("NOT_JUDGED", ""),
        ]  # fmt: skip
        assert "it shows dark, the recipe is bright" in first[3].reason
        assert "it shows bright, the recipe is dark" in first[5].reason
        assert [one["decision"] for one in read] == [one.decision.value for one in first]
        assert {one.adaptation.subclass for one in messages if isinstance(one, Alert)} == {DARK}
        kinds = [one.kind for one in messages if isinstance(one, Notice)]
        assert kinds.count(NoticeKind.RECIPE_SET.value) == 3
        assert NoticeKind.RECIPE_REFUSED.value in kinds

        # Nobody says anything, and the recipes are those of before.
        with running(config) as port:
            plc, after = Plc(port), []
            plc.wait_until_running()
            assert plc.recipe == 1
            for _ in range(2):
                plc.trigger(1)
                after.append(plc.verdict()["decision"])
            assert after == ["OK", "NOT_JUDGED"]


def statuses(box: Box, name: str = "cam") -> dict[str, Any]:
    found: dict[str, Any] = box.status()["cameras"][name]
    return found


def wait(holds: Callable[[], object], box: Box) -> None:
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain; {box.status()['cameras']} {box.status()['warnings']}"
        time.sleep(0.01)


def test_without_recipe_and_router_nothing_is_judged_until_somebody_says_what_runs(
    mosquitto: Mosquitto, blind: Bundle, tmp_path: Path
) -> None:
    dark = folder_of(tmp_path / "dark", [(DARK, False)] * 3)
    wanted = settings(tmp_path, blind.path, mosquitto.url, [camera("cam", dark, **LOOSE)])
    with asker(mosquitto.url) as ask, started(wanted) as (box, _):
        wait(lambda: statuses(box)["counters"]["not_judged"] > 2, box)
        assert any("nothing is judged: it has no recipe" in text for text in box.status()["warnings"])
        assert statuses(box)["counters"]["judged"] == 0
        # Nothing follows the line here: no adaptation is configured.
        assert recipe(ask, DARK).ok
        wait(lambda: statuses(box)["counters"]["ok"] > 2, box)
        assert statuses(box)["judged_as"] == DARK
        assert not [text for text in box.status()["warnings"] if "nothing is judged" in text]


def test_a_camera_that_follows_its_line_settles_under_its_recipe(
    mosquitto: Mosquitto, bundle: Bundle, tmp_path: Path
) -> None:
    bright = folder_of(tmp_path / "bright", [(BRIGHT, False)] * 3)
    eager = {"every_frames": 1, "least": 0, "settle_frames": 5}
    wanted = settings(tmp_path, bundle.path, mosquitto.url, [camera("cam", bright, **LOOSE)], adaptation=eager)

    def follower(box: Box) -> dict[str, Any]:
        found: dict[str, Any] = box.status()["detail"]["adaptation"]["cameras"]["cam"]
        return found

    with asker(mosquitto.url) as ask:
        with started(wanted) as (box, _):
            answer = recipe(ask, BRIGHT)
            assert answer.ok, answer.reason
            assert set(answer.detail) == {"cameras", "moments", "recipe", "since"}
            wait(lambda: follower(box)["phase"] == "following" and follower(box)["subclass"] == BRIGHT, box)
            assert follower(box)["recipe"] == BRIGHT
            wait(lambda: statuses(box)["judged_as"] == BRIGHT, box)
        with started(wanted) as (box, _):
            assert (follower(box)["recipe"], follower(box)["subclass"]) == (BRIGHT, BRIGHT)
            assert ask.ask("reset", {}, timeout=SOON).ok
            assert recipe(ask, None).ok
            wait(lambda: follower(box)["recipe"] is None, box)
            assert statuses(box)["recipe"]["name"] is None


def test_a_product_is_added_by_a_reload_and_a_foreign_file_is_refused(
    mosquitto: Mosquitto, blind: Bundle, bundle: Bundle, tmp_path: Path
) -> None:
    def middle_frame(seed: int) -> np.ndarray:
        return bright_frame(seed, 30)

    (tmp_path / "middle").mkdir()
    for index in range(3):
        cv2.imwrite(str(tmp_path / "middle" / f"{index}.png"), middle_frame(5000 + index))
    fits, foreign = tmp_path / "fits.safetensors", tmp_path / "foreign.safetensors"
    make_product_file(fits, blind, middle_frame, name="middle")
    make_product_file(foreign, bundle, middle_frame, name="other")

    def wanted(*files: Path) -> BoxSettings:
        cam = camera("cam", tmp_path / "middle", **LOOSE)
        return settings(tmp_path, blind.path, mosquitto.url, [cam], products=files)

    with asker(mosquitto.url) as ask, started(wanted(foreign)) as (box, _):
        worker = box.cameras["cam"]
        assert any("product file refused" in text and "foreign" in text for text in box.status()["warnings"])
        assert "has no product 'middle'" in recipe(ask, "middle").reason
        box.reload(wanted(fits, foreign))
        assert box.cameras["cam"] is worker
        assert box.status()["detail"]["recipes"]["products"] == {"cam": [*PRODUCTS, "middle"]}
        assert any("its thresholds are those of dark" in text for text in box.status()["warnings"])
        assert recipe(ask, "middle").ok
        wait(lambda: statuses(box).get("judged_as") == "middle" and statuses(box)["counters"]["judged"] > 2, box)
        assert statuses(box)["counters"]["nok"] == 0
        # What one product is given is no other's.
        asked = {"camera": "cam", "value": 0.001, "bundle_id": blind.id, "memory_version": 0, "product": "middle"}
        given = ask.ask("threshold", asked, timeout=SOON)
        assert given.ok, given.reason
        wait(lambda: statuses(box)["counters"]["nok"] > 0, box)
        assert [name for name, one in statuses(box)["products"].items() if one["threshold"]["value"] < 0.01] == [
            "middle"
        ]
    # At the start, too, and with the recipe of before.
    with started(wanted(fits)) as (box, _):
        wait(lambda: statuses(box)["counters"]["nok"] > 0, box)
        assert statuses(box)["judged_as"] == "middle"
        # A threshold is of the file that it was given for.
        make_product_file(fits, blind, middle_frame, name="middle", rows=8)
        box.reload(wanted(fits))
        assert any("set for another file of product middle" in text for text in box.status()["warnings"])
        assert statuses(box)["products"]["middle"]["levels"]["threshold_source"] == "budget"


def test_a_reload_that_is_refused_adds_no_product(mosquitto: Mosquitto, blind: Bundle, tmp_path: Path) -> None:
    parts, file = folder_of(tmp_path / "parts", [(BRIGHT, False)] * 2), tmp_path / "file.safetensors"
    make_product_file(file, blind, lambda seed: bright_frame(seed, 30), name="middle")
    before = settings(tmp_path, blind.path, mosquitto.url, [camera("cam", parts, **LOOSE)])
    more = camera("more", parts, region_of_interest={"mask": str(tmp_path / "missing.png")})

    def wanted(*cameras: dict[str, Any], files: tuple[Path, ...]) -> BoxSettings:
        return settings(tmp_path, blind.path, mosquitto.url, [camera("cam", parts, **LOOSE), *cameras], products=files)

    with asker(mosquitto.url) as ask, started(before) as (box, _):
        assert recipe(ask, BRIGHT).ok
        box.reload(wanted(more, files=(file, tmp_path / "none.safetensors")))
        assert any("missing.png" in text for text in box.status()["warnings"])
        assert box.status()["detail"]["recipes"]["products"] == {"cam": list(PRODUCTS)}
        assert box.status()["detail"]["recipes"]["refused_files"] == []
        assert "has no product 'middle'" in recipe(ask, "middle").reason
        # The same file in settings that can come into force.
        box.reload(wanted(files=(file,)))
        assert recipe(ask, "middle").ok
        wait(lambda: statuses(box).get("judged_as") == "middle", box)


def test_a_recipe_outlives_its_bundle_where_the_next_one_has_the_product(
    mosquitto: Mosquitto, blind: Bundle, bundle: Bundle, tmp_path: Path
) -> None:
    def middle_frame(seed: int) -> np.ndarray:
        return bright_frame(seed, 30)

    link, fits = tmp_path / "judging", tmp_path / "fits.safetensors"
    link.symlink_to(blind.path)
    make_product_file(fits, blind, middle_frame, name="middle")
    dark = folder_of(tmp_path / "dark", [(DARK, False)] * 3)
    wanted = settings(tmp_path, link, mosquitto.url, [camera("cam", dark, **LOOSE)], products=[fits])

    def switch_to(target: Bundle) -> None:
        (tmp_path / "next").symlink_to(target.path)
        (tmp_path / "next").replace(link)
        box.reload(wanted)
        wait(lambda: statuses(box)["bundle"]["id"] == target.id, box)

    with asker(mosquitto.url) as ask, started(wanted) as (box, _):
        assert recipe(ask, DARK).ok
        switch_to(bundle)
        assert statuses(box)["recipe"]["name"] == DARK
        before = statuses(box)["counters"]["ok"]
        wait(lambda: statuses(box)["counters"]["ok"] > before, box)
        switch_to(blind)
        assert recipe(ask, "middle").ok
        switch_to(bundle)  # which has no such product
        assert any("the recipe is middle, which the bundle does not have" in text for text in box.status()["warnings"])
        refused = statuses(box)["counters"]["not_judged"]
        wait(lambda: statuses(box)["counters"]["not_judged"] > refused, box)
        assert recipe(ask, DARK).ok
        judged = statuses(box)["counters"]["ok"]
        wait(lambda: statuses(box)["counters"]["ok"] > judged, box)


def test_a_replay_is_told_what_its_images_show(mosquitto: Mosquitto, blind: Bundle, tmp_path: Path) -> None:
    dark = folder_of(tmp_path / "dark", [(DARK, False)] * 3)

    def replay(*more: str) -> subprocess.CompletedProcess[str]:
        fixed = ["--bundle", str(blind.path), "--source", str(dark), "--broker", mosquitto.url, "--mode", "triggered"]
        loose = ["--false-nok-per-1000", "30", "--engine", "onnxruntime", "--threads", "1"]
        command = [*LINEWARD, "replay", *fixed, *loose, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out = tmp_path / "summary.json"
    said = replay("--recipe", DARK, "--json", str(out))
    assert said.returncode == 0, said.stderr
    summary = json.loads(out.read_text())
    assert (summary["frames"], summary["judged"], summary["not_judged"]) == (3, 3, 0)
    refused = replay("--recipe", "tiles")
    assert refused.returncode == 2
    assert "has no product 'tiles'; it has dark, bright" in refused.stderr
