"""Boxes whose link to the fleet is a folder, and rounds under an engine that carries on from there."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import cv2
import pytest
import yaml

from deploy.flower.book import open_book
from deploy.flower.exchange import FolderExchange
from deploy.flower.rounds import Answered, Conductor, Kept
from edge.box import Box
from edge.errors import SettingsError
from edge.settings import load_settings
from tests.edge.tiny_bundle import good_frame
from tests.edge.tiny_memory import make_memory_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOON = 60.0
BOXES = ("plant/box1", "plant/box2")


class FolderFleet:
    """An engine without messages: it looks into the boxes' folders itself."""

    def __init__(self, folder: Path) -> None:
        self.sides = {box: FolderExchange(folder / box.rpartition("/")[2]) for box in BOXES}
        self.events: list[Answered | Kept] = []

    def online(self):
        return list(self.sides)

    def ask(self, box, invitation):
        self.events.append(Answered(box, self.sides[box].update(invitation)))

    def tell(self, box, outcome, bank):
        if outcome is not None:
            self.sides[box].settle(outcome)
        self.events.append(Kept(box, 0 if bank is None else self.sides[box].store(bank)))

    def poll(self):
        events, self.events = self.events, []
        return events


@pytest.fixture
def configs(tmp_path: Path) -> list[Path]:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(20):
        cv2.imwrite(str(images / f"{index:03d}.png"), good_frame(1000 + index))
    bundle = make_memory_bundle(tmp_path / "bundle")
    source = {"kind": "folder", "path": str(images), "loop": True, "fps": 30}
    paths = []
    for box in BOXES:
        name = box.rpartition("/")[2]
        (tmp_path / name).mkdir()
        settings = {
            "site": "plant", "box": name, "state_dir": f"state-{name}", "bundle": str(bundle.path), "threads": 1,
            "engine": "onnxruntime", "broker": {"url": "mqtt://127.0.0.1:1"},
            "federation": {"fleet": "f", "exchange": name},
            "memory": {"every_s": 0.02, "ship_every_s": 1, "shadow_frames": 5, "shadow_s": 0, "drift_per_week": 1000,
                       "quantile": 0.9, "update": {"beta": 0.5}, "min_frames": 1.5},
            "cameras": [{"name": "cam", "mode": "triggered", "budget": {"false_nok_per_1000": 20}, "source": source}],
        }  # fmt: skip
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(settings))
    return paths


@contextlib.contextmanager
def running(box: Box) -> Iterator[None]:
    thread = threading.Thread(target=box.run, kwargs={"drain_s": 0.0})
    thread.start()
    try:
        yield
    finally:
        box.request_stop()
        thread.join(SOON)
        assert not thread.is_alive()


def told(box: Box) -> int:
    """How many outcomes a box has read. They lie in one file: of a second update, that of the first may be gone."""
    link = box.status()["detail"]["memory"]["link"]
    return int(link["receipts"] + sum(link["refused"].values()))


def test_two_boxes_come_to_share_a_memory_by_folders(tmp_path: Path, configs: list[Path]) -> None:
    (tmp_path / "aggregator.yaml").write_text(yaml.safe_dump({
        "key_file": "unused", "boxes": "unused", "state_dir": "state",
        "rounds": {"fleet": "f", "close_at": 2, "min_boxes": 2, "min_frames": 1}, "merge": {"rows": 48},
    }))  # fmt: skip
    boxes = [Box(load_settings(config)) for config in configs]
    deadline = time.monotonic() + SOON

    with running(boxes[0]), running(boxes[1]), open_book(tmp_path / "aggregator.yaml", answer_s=5) as book:
        fleet = FolderFleet(tmp_path)
        rounds = Conductor(fleet, book, wait=lambda: time.sleep(0.05), clock=time.monotonic, ask_s=0.5, tell_s=5)
        report = rounds.run(1)
        while not all(box.status()["memory"]["fleet"] >= 1 and told(box) for box in boxes):
            assert time.monotonic() < deadline, [box.status()["detail"]["memory"] for box in boxes]
            time.sleep(0.1)
        links = [box.status()["detail"]["memory"]["link"] for box in boxes]

    assert set(report.kept) == set(BOXES)
    assert {link["state"] for link in links} == {"connected"}
    assert all(link["bank_version"] >= 1 for link in links)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"exchange": None}, "aggregator is missing"), ({"aggregator": "tcp://localhost:1"}, "takes the place")],
)
def test_link_is_either_an_aggregator_or_a_folder(tmp_path: Path, configs: list[Path], changes, reason) -> None:
    settings = yaml.safe_load(configs[0].read_text())
    settings["federation"] |= changes
    configs[0].write_text(yaml.safe_dump(settings))

    with pytest.raises(SettingsError, match=reason):
        load_settings(configs[0])
