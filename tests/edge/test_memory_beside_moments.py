"""A memory beside moments that follow the light: still while they settle, taught by what they have corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from edge.adaptation.correction import MomentCorrection
from edge.adaptation.look import Look
from edge.adaptation.measure import measure_canvas
from edge.alerts.command_messages import AcceptCommand
from edge.alerts.message import build
from edge.inference.preprocessing import to_canvas
from tests.edge.memory_bench import Bench, Fleet
from tests.edge.tiny_bundle import good_frame
from tests.edge.tiny_memory import make_memory_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle


@dataclass
class Held:
    """What the owner of drift says."""

    learning: str = ""
    switch: str = ""

    def hold(self, camera: str) -> str:
        assert camera == "cam"
        return self.learning

    def hold_switch(self) -> str:
        return self.switch


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_memory_bundle(tmp_path_factory.mktemp("bundle") / "b")


def test_memory_is_not_switched_while_a_camera_settles(bundle: Bundle, tmp_path: Path) -> None:
    held = Held()
    bench = Bench(bundle, tmp_path, link=Fleet(), drift=held)
    bench.wait(0)
    before = bench.detector.memory_version
    assert bench.link is not None
    bench.link.bank = bench.fleet_bank()
    bench.wait(0)
    bench.show_good(6)
    held.switch = "moments of cam settle"
    bench.wait(100)
    assert bench.detector.memory_version == before
    assert bench.status["held"] == "moments of cam settle"
    held.switch = ""
    bench.wait(0)
    assert bench.detector.memory_version == before + 1


def test_thresholds_of_a_commissioning_set_wait_until_cameras_have_settled(bundle: Bundle, tmp_path: Path) -> None:
    held = Held(switch="moments of cam settle")
    images = tmp_path / "good"
    images.mkdir()
    for seed in range(600, 612):
        cv2.imwrite(str(images / f"{seed}.png"), good_frame(seed))
    bench = Bench(bundle, tmp_path / "state", drift=held, commissioning=str(images))
    bench.wait(0)
    bench.wait(0)
    assert bench.detector.memory_version == 0
    held.switch = ""
    bench.wait(0)
    assert bench.detector.memory_version == 1
    bench.wait(0)
    assert bench.detector.memory_version == 1


def test_part_of_a_camera_that_is_held_cannot_be_declared_good(bundle: Bundle, tmp_path: Path) -> None:
    held = Held()
    bench = Bench(bundle, tmp_path, drift=held, learn="declared")
    verdict = bench.show(good_frame(3000))
    command = build(AcceptCommand, camera="cam", camera_seq=verdict.camera_seq)
    held.learning = "its moments are frozen"
    refused = bench.order(command)
    assert not refused["ok"]
    assert "camera cam teaches nothing now: its moments are frozen" in refused["reason"]
    held.learning = ""
    assert bench.order(command)["ok"]


@pytest.mark.parametrize("declared", [False, True], ids=["by score", "declared"])
def test_memory_learns_frames_as_they_were_corrected(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, declared: bool
) -> None:
    bench = Bench(bundle, tmp_path, quantile=0.99, learn="declared" if declared else "score")
    learned: list[np.ndarray] = []
    take = bench.opened.learner.take

    def note(embedding: np.ndarray, *values: object, **named: object) -> bool:
        learned.append(embedding)
        return take(embedding, *values, **named)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(bench.opened.learner, "take", note)
    good = good_frame(3000)
    dark = (good * 0.6).astype(np.uint8)
    preprocessing = bundle.manifest.preprocessing
    now, reference = (measure_canvas(to_canvas(image, preprocessing)[np.newaxis]) for image in (dark, good))
    verdict = bench.show(dark, look=Look(version=3, correction=MomentCorrection(now, reference)))
    if declared:
        learned.clear()
        assert bench.order(build(AcceptCommand, camera="cam", camera_seq=verdict.camera_seq))["ok"]
    (rows,) = learned
    bright, unlit = (bench.detector.embeddings_of_canvas(to_canvas(image, preprocessing)) for image in (good, dark))
    assert np.abs(rows - bright).mean() < 0.2 * np.abs(unlit - bright).mean()
