"""The nuisance benchmark: its changes of the picture, its arithmetic, and one short turn of everything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks import nuisance
from benchmarks.nuisance import CLEAN, CNN_ONLY, NUISANCES, Scores, goals, light, pose, resolution
from trainer.methods.hetnet.fit import GlobalTeacher, HetNetConfig, HetNetMethod

if TYPE_CHECKING:
    from pathlib import Path


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_light_scales_and_ends_at_white() -> None:
    image = picture()
    assert np.array_equal(light(image, 1.0), image)
    assert np.array_equal(light(image, 1.4), np.minimum(np.rint(image * np.float32(1.4)), 255).astype(np.uint8))
    assert light(image, 0.6).max() == 153


def test_pose_turns_and_enlarges_about_the_middle() -> None:
    image = np.zeros((65, 65, 3), np.uint8)
    image[20:45, 30:35] = 255
    assert np.array_equal(pose(image), image)
    quarter = pose(image, angle=90)
    assert quarter[32, 22].min() == 255
    assert quarter[22, 32].max() == 0
    assert (pose(image, scale=2.0) > 127).sum() == pytest.approx(4 * (image > 127).sum(), rel=0.15)


def test_resolution_changes_the_pixels_and_not_the_view() -> None:
    image = picture()
    for factor in (0.5, 2.0):
        changed = resolution(image, factor)
        assert changed.shape == (round(48 * factor), round(64 * factor), 3)
        assert changed.mean() == pytest.approx(image.mean(), abs=3)


def test_drift_is_in_deviations_of_clean_scores_and_paired() -> None:
    clean = np.arange(40, dtype=np.float64)
    scores = Scores({CLEAN: clean, "a": clean + 3, "b": clean[::-1].copy()}, {CLEAN: clean + 100, "a": clean + 103})
    assert scores.drift(["a"]) == pytest.approx(3 / clean.std())
    assert scores.drift(["b"]) > scores.drift(["a"])
    assert scores.auroc([CLEAN, "a"]) == 1.0


def test_goal_compares_the_global_teacher_with_the_cnn_alone() -> None:
    clean = np.arange(20, dtype=np.float64)

    def moved(by: float) -> Scores:
        return Scores({CLEAN: clean, **dict.fromkeys(NUISANCES, clean + by)}, {})

    done = {"one": {"hetnet": moved(2.0), CNN_ONLY: moved(4.0)}}
    averaged = {name: {key: scores.drift(list(NUISANCES)) for key in ("all but part", "all")}
                for name, scores in done["one"].items()}  # fmt: skip
    found = goals(averaged, done)
    assert [goal.value for goal in found] == [pytest.approx(0.5)] * 2
    assert all(goal.met for goal in found)
    assert goals({"hetnet": averaged["hetnet"]}, done) == []


def test_unknown_detectors_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nuisance.main(["--detectors", "hetnet", "nothing"])
    assert "unknown detector nothing" in capsys.readouterr().err


def test_benchmark_measures_every_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[GlobalTeacher] = []
    original = HetNetMethod.fit

    def fit(context: Any, config: HetNetConfig) -> Any:
        seen.append(config.teacher)
        return original(context, config.model_copy(update={"steps": 2, "denoising_steps": 1}))

    monkeypatch.setattr(HetNetMethod, "fit", fit)
    monkeypatch.setattr("benchmarks._images.TEXTURES", ("cloth",))
    monkeypatch.setattr("benchmarks._images._VALIDATION_DEFECTS", 8)
    found = nuisance.main(["--size", "64", "--train", "12", "--test", "6", "--json", str(tmp_path / "n.json")])
    assert seen == [GlobalTeacher.SELF, GlobalTeacher.NONE]
    assert set(found) == {"hetnet", CNN_ONLY}
    assert all(np.isfinite(value) for figures in found.values() for value in figures.values())
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in ("hetnet", CNN_ONLY, "mean"))
    assert "drift shrinks by (all)" in said
    scores = json.loads((tmp_path / "n.json").read_text())["scores"]["web/cloth"]["hetnet"]
    assert set(scores["good"]) == {CLEAN, *NUISANCES}
    assert all(len(values) == 3 for values in (*scores["good"].values(), *scores["defective"].values()))
    assert scores["good"][CLEAN] != scores["good"]["light x0.6"]
