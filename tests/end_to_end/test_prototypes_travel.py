"""Prototypes that travel, live: two boxes learn from good parts, an aggregator merges, and both judge by the result."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import yaml

from deploy.aggregator.store import Store
from deploy.parity import ParityRules
from edge.alerts.message import VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.bundle import Preprocessing
from edge.federation.wire import Limits, decode_bank
from tests.fleet_service import merging
from trainer import export as exporting
from trainer.data.conveyor import write_default
from trainer.data.generic import generic_canvases
from trainer.export import export_run
from trainer.fit import train

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploy.aggregator.service import Service
    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 60.0
LINEWARD = [str(Path(sys.executable).parent / "lineward")]
BOXES = ("box1", "box2")
ALPHA, PLACE = 0.3, 2
PARTS, FIFTH = 20, 5


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_default(
        tmp_path_factory.mktemp("web") / "web", seed=4, kind="metal", train=60, test_good=PARTS, test_defective=0,
        side=96,
    )  # fmt: skip


@pytest.fixture
def images(tmp_path: Path, parts: Path) -> Path:
    """What a box sees again and again: good parts, every fifth with a red square."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, file in enumerate(sorted((parts / "test" / "good").glob("*.png"))):
        image = cv2.imread(str(file))
        assert image is not None
        if index % FIFTH == FIFTH - 1:
            image[36:60, 36:60] = (20, 20, 250)
        cv2.imwrite(str(folder / f"{index:03d}.png"), image)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    generic = generic_canvases(64)[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "generic_canvases", lambda: generic)
        run = train(
            method="prototypes", data=parts, out=folder / "run", device="cpu", progress=lambda *_: None,
            preprocessing=Preprocessing(height=64, width=64),
            settings={"travels": True, "sets": json.dumps([{"tap": "s8", "alpha": ALPHA, "cells": 8}])},
        )  # fmt: skip
        rules = ParityRules(shift=4.0, flipped=0.2, auroc_drop=0.2, good_samples=32, defect_samples=32)
        return export_run(run.path, folder / "b", precision="float32", rules=rules, progress=lambda *_: None)


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Service]:
    with merging(tmp_path, BOXES, rows=96, soon=SOON) as service:
        yield service


@contextlib.contextmanager
def running(folder: Path, box: str, **values: Any) -> Iterator[None]:
    """``lineward run``, as a process of its own."""
    settings = {
        "site": "plant", "box": box, "state_dir": f"state-{box}", "threads": 1, "engine": "onnxruntime",
        "status_every_s": 0.5, **values,
    }  # fmt: skip
    settings["federation"] |= {"key_file": f"{box}.key_secret", "aggregator_key_file": "aggregator/aggregator.key"}
    (folder / f"{box}.yaml").write_text(yaml.safe_dump(settings))
    with (folder / f"{box}.log").open("wb") as log:
        process = subprocess.Popen([*LINEWARD, "run", "--config", str(folder / f"{box}.yaml")], stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_two_boxes_come_to_judge_by_each_others_prototypes(
    mosquitto: Mosquitto, aggregator: Service, bundle: Bundle, images: Path, tmp_path: Path
) -> None:
    values = {
        "bundle": str(bundle.path),
        "broker": {"url": mosquitto.url, "backoff_max_s": 0.5},
        "federation": {"fleet": "f", "aggregator": aggregator.endpoint},
        "memory": {"every_s": 0.02, "ship_every_s": 1, "shadow_frames": 5, "shadow_s": 0, "drift_per_week": 1000,
                   "quantile": 0.9, "update": {"beta": 0.5}, "min_frames": 1.5},
        "cameras": [{"name": "cam", "mode": "triggered", "budget": {"false_nok_per_1000": 50},
                     "source": {"kind": "folder", "path": str(images), "loop": True, "fps": 15}}],
    }  # fmt: skip
    verdicts: dict[str, list[VerdictMessage]] = {box: [] for box in BOXES}
    deadline = time.monotonic() + SOON
    with Subscriber(BrokerSettings(url=mosquitto.url, backoff_max_s=0.5), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(SOON)
        with running(tmp_path, "box1", **values), running(tmp_path, "box2", **values):
            while min(map(len, verdicts.values())) < PARTS:
                received = subscriber.receive(deadline - time.monotonic())
                assert received is not None, [(tmp_path / f"{box}.log").read_text()[-2000:] for box in BOXES]
                message = received.message
                if isinstance(message, VerdictMessage) and message.memory.fleet >= 1:
                    verdicts[message.box].append(message)
    with Store(aggregator.settings.store, serve=False) as store:
        (pool,) = store.pools()
        kept = store.bank(pool)
        assert kept is not None
        bank = decode_bank(store.bank_bytes(kept), Limits())
    assert set(bank.members) == {f"plant/{box}" for box in BOXES}
    assert bank.boxes.max() == len(BOXES), "prototypes of both boxes stand behind one of the fleet's"
    places = bank.rows[:, -PLACE:] / (ALPHA / 2) ** 0.5
    assert np.logical_and(places > 0, places < 1).all()
    assert np.ptp(places, 0).min() > 1 / 2, "they kept their places"
    for box in BOXES:
        decided = {message.part_id: message.decision.value for message in verdicts[box]}
        right = [(value == "NOK") == (int(part) % FIFTH == FIFTH - 1) for part, value in decided.items()]
        assert np.mean(right) >= 0.9, (box, decided)  # the budget allows a false alarm in twenty
        assert all(value == "NOK" for part, value in decided.items() if int(part) % FIFTH == FIFTH - 1)
