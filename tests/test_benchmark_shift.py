"""The shift benchmark: its shifts and its figures by hand, and a short turn of judging through the parts of a box."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import shift
from benchmarks._shift_figures import AUROC, FALSE_POSITIVES, MISSES, Figures, reached_by
from benchmarks._shift_heads import Source, apart, thinned, trunk_of
from benchmarks._shift_scores import NONE, OWN, RUNNING, Scores, judge, some
from benchmarks._shifts import CLEAN, DIMMED, REQUIRED, SERIES, conditions, dimmed
from edge.bundle import Preprocessing
from trainer.data.folder import Sample

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from benchmarks._shifts import Image

BY_NAME = {one.name: one for one in SERIES}


def picture(seed: int = 0, side: int = 64) -> Image:
    return np.random.default_rng(seed).integers(40, 160, (side, side, 3)).astype(np.uint8)


def changed(name: str, strength: float, image: Image) -> Image:
    return BY_NAME[name].change(image, strength, np.random.default_rng(0))


def test_every_condition_has_a_name_of_its_own_and_goals_are_for_some_of_them() -> None:
    names = list(conditions())
    assert names[:2] == [CLEAN, DIMMED]
    assert len(names) == 2 + 5 * 11
    assert set(REQUIRED) < set(names)


@pytest.mark.parametrize("name", [name for name in conditions() if name != CLEAN])
def test_a_shift_changes_the_picture_and_keeps_its_shape_and_does_the_same_again(name: str) -> None:
    images = np.stack([picture(1), picture(1)])
    first = conditions()[name].of(images, seed=3)
    assert first.shape == images.shape
    assert first.dtype == np.uint8
    assert (first != images).any()
    assert (conditions()[name].of(images, seed=3) == first).all()
    assert (images == picture(1)).all()


@pytest.mark.parametrize("one", SERIES, ids=lambda one: one.name)
def test_strengths_go_from_weak_to_strong(one: shift.Series) -> None:
    # Turning, scaling and moving change a smooth picture by little at first; compressing changes only what is rough.
    y, x = np.mgrid[:64, :64]
    smooth = (100 + 40 * np.sin(x / 9) * np.cos(y / 7))[..., None] + np.array([0, 15, -15])
    image = picture() if one.name.startswith("JPEG") else np.clip(smooth, 0, 255).astype(np.uint8)
    moved = [np.abs(changed(one.name, s, image).astype(float) - image).mean() for s in one.strengths]
    assert moved == sorted(moved)
    assert moved[0] < moved[-1]


def test_light_by_hand() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    assert (dimmed(image) == round(72 + 40.8)).all()
    assert (changed("gain", 0.5, image) == 50).all()
    assert (changed("offset", 0.16, image) == 141).all()
    assert (changed("gamma", 2.0, image) == round(255 * (100 / 255) ** 2)).all()
    assert changed("white balance", 0.1, image)[0, 0].tolist() == [110, 100, 90]
    assert (changed("offset", 0.24, np.full((4, 4, 3), 250, np.uint8)) == 255).all()


def test_an_ageing_lamp_gets_darker_and_redder() -> None:
    red, green, blue = changed("lamp ageing", 3000, np.full((4, 4, 3), 200, np.uint8))[0, 0].tolist()
    # Wien: exp(14388 / 0.55 um * (1 / 3200 K - 1 / 3000 K)) = 0.58 of the green light.
    assert green == pytest.approx(200 * 0.58, abs=1)
    assert blue < green < red < 200


@pytest.mark.parametrize("length", [1.5, 2.0, 3.0, 5.0, 8.0])
def test_a_moving_part_smears_along_the_rows_by_its_length(length: float) -> None:
    image = np.zeros((9, 41, 3), np.uint8)
    image[4, 20] = 240
    smeared = changed("conveyor speed", length, image)
    assert smeared.sum() == pytest.approx(3 * 240, abs=3 * length)
    assert not smeared[[3, 5]].any()
    assert smeared[4, 20, 0] == pytest.approx(240 / length, abs=1)
    assert smeared[4, :, 0].tolist() == smeared[4, ::-1, 0].tolist()


def test_blur_and_noise_have_the_size_they_say() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert np.std(changed("noise", 6, grey).astype(float)) == pytest.approx(6, rel=0.05)
    edge = np.zeros((8, 64, 3), np.uint8)
    edge[:, 32:] = 255
    step = np.diff(changed("blur", 1.5, edge)[4, :, 0].astype(float))
    at = np.arange(len(step))
    middle = (step * at).sum() / step.sum()
    assert np.sqrt((step * (at - middle) ** 2).sum() / step.sum()) == pytest.approx(1.5, rel=0.05)


def sample(group: str, index: int, condition: str = "") -> Sample:
    from pathlib import Path

    return Sample(Path(f"{index}.png"), "test", "good", False, None, condition, group, "")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40), st.integers(1, 30), st.integers(0, 3))
def test_images_for_moments_are_of_other_groups_than_those_judged(groups: list[str], count: int, seed: int) -> None:
    samples = [sample(group, index) for index, group in enumerate(groups)]
    moments, judged = apart(samples, count, seed)
    if len(set(groups)) > 1:
        assert not {one.group for one in moments} & {one.group for one in judged}
    assert not set(moments) & set(judged)
    assert 1 <= len(moments) <= count
    assert judged
    assert (moments, judged) == apart(samples, count, seed)


def test_images_for_moments_are_of_the_same_mix_as_those_judged() -> None:
    several = [sample(f"{kind}{index // 2}", index, kind) for index, kind in enumerate("a" * 20 + "b" * 10)]
    # One group is a condition: it has to be split. One group in every condition: it must not be.
    single = [sample(kind, index, kind) for index, kind in enumerate("a" * 20 + "b" * 10)]
    across = [sample(str(index // 3), index, "abc"[index % 3]) for index in range(30)]
    for samples, kinds in ((several, "ab"), (single, "ab"), (across, "abc")):
        moments, judged = apart(samples, 10, 0)
        for kind in kinds:
            share = len(samples) / sum(one.condition == kind for one in samples)
            for part in (moments, judged):
                assert len(part) / sum(one.condition == kind for one in part) == pytest.approx(share, rel=0.35)
    assert not {one.group for one in apart(across, 10, 0)[0]} & {one.group for one in apart(across, 10, 0)[1]}


def test_thinned_and_some_draw_evenly() -> None:
    samples = [sample("a", index) for index in range(9)]
    assert [int(one.path.stem) for one in thinned(samples, 3)] == [0, 4, 8]
    assert len(thinned(samples, 20)) == 9
    assert some(9, 0.34) == [0, 4, 8]
    assert some(2, 0.1) == [0]


def scores(
    name: str,
    table: Mapping[str, Mapping[str, tuple[list[float], list[float]]]],
    rows: Mapping[str, tuple[list[int], list[int]]],
) -> Scores:
    good, bad = (max(len(one[i]) for one in rows.values()) for i in (0, 1))
    groups = ([f"g{i}" for i in range(good)], [f"b{i}" for i in range(bad)])
    followed = {condition: {"shift": 1.0, "accepted": 1.0} for condition in rows}
    found = {how: dict(each) for how, each in table.items()}
    return Scores(name, groups, {"memory": 5.0}, {"memory": found}, dict(rows), followed)


def folder_by_hand(name: str = "a") -> Scores:
    whole = ([0, 1, 2, 3], [0, 1])
    clean = ([1.0, 2.0, 3.0, 6.0], [7.0, 4.0])
    return scores(
        name,
        {
            NONE: {CLEAN: clean, DIMMED: ([6.0, 7.0, 8.0, 9.0], [9.0, 9.0])},
            OWN: {CLEAN: ([1.0, 2.0, 3.0, 8.0], [7.0, 4.0]), DIMMED: ([6.0, 7.0, 8.0, 9.0], [9.0, 9.0])},
            RUNNING: {CLEAN: clean, DIMMED: ([5.0, 2.0, 3.0, 9.0], [9.0, 4.0])},
        },
        {CLEAN: whole, DIMMED: whole},
    )


def test_figures_by_hand() -> None:
    figures = Figures([folder_by_hand()], resamples=200)
    one = ["memory"]
    assert figures.rate(FALSE_POSITIVES, one, NONE, [CLEAN]).value == 0.25
    # A score that equals the threshold is an anomaly, as on a box.
    assert figures.rate(FALSE_POSITIVES, one, RUNNING, [DIMMED]).value == 0.5
    assert figures.rate(MISSES, one, RUNNING, [DIMMED]).value == 0.5
    assert figures.rate(AUROC, one, NONE, [CLEAN]).value == 7 / 8
    # 0.25 -> 1.0 uncorrected, 0.5 corrected: two thirds of the rise.
    recovered = figures.recovery(one, RUNNING, [DIMMED])
    assert recovered.value == pytest.approx(2 / 3)
    low, high = recovered.interval
    assert low < 2 / 3 < high <= 1
    assert figures.recovery(one, OWN, [DIMMED]).value == 0
    assert figures.cost(one, OWN).value == pytest.approx(1 / 8)
    assert figures.cost(one, RUNNING).value == 0


def test_recovery_compares_with_clean_images_that_were_judged_under_the_shift_too() -> None:
    found = folder_by_hand()
    half = ([0, 3], [1])
    for each in found.scores["memory"].values():
        each[DIMMED] = ([each[DIMMED][0][i] for i in half[0]], [each[DIMMED][1][i] for i in half[1]])
    found.rows[DIMMED] = half
    found.scores["memory"][RUNNING][DIMMED] = ([4.0, 9.0], [9.0])
    figures = Figures([found], resamples=20)
    # Clean on images 0 and 3 is 0.5 (on all 0.25), shifted 1.0, corrected 0.5: the whole rise is recovered.
    assert figures.recovery(["memory"], RUNNING, [DIMMED]).value == 1
    assert figures.rate(FALSE_POSITIVES, ["memory"], NONE, [CLEAN]).value == 0.25


def test_matched_thresholds_are_those_that_a_share_of_clean_images_reaches() -> None:
    found = folder_by_hand()
    figures = Figures([found], resamples=5, matched=0.5)
    assert figures.rate(FALSE_POSITIVES, ["memory"], NONE, [CLEAN]).value == 0.5
    assert figures.alone(found).rate(FALSE_POSITIVES, ["memory"], NONE, [CLEAN]).value == 0.5
    assert reached_by([1.0, 2.0, 3.0, 4.0], 0.05) > 4
    assert 3 < reached_by([4.0, 2.0, 3.0, 1.0], 0.25) < 4


def test_a_rise_too_small_to_share_is_not_a_figure() -> None:
    found = folder_by_hand()
    found.scores["memory"][NONE][DIMMED] = found.scores["memory"][NONE][CLEAN]
    estimate = Figures([found], resamples=20).recovery(["memory"], RUNNING, [DIMMED])
    assert np.isnan(estimate.value)
    assert str(estimate) == "-"


def _written(path: Path, one: Scores) -> list[Path]:
    path.write_text(json.dumps([one.plain()]), encoding="utf-8")
    return [path]


def test_folders_weigh_the_same_and_files_of_one_folder_are_put_together(tmp_path: Path) -> None:
    whole = folder_by_hand()

    def part(condition: str) -> dict[str, object]:
        plain = folder_by_hand().plain()
        plain["scores"] = {
            "memory": {how: {condition: each[condition]} for how, each in whole.scores["memory"].items()}
        }
        return {**plain, "rows": {condition: whole.rows[condition]}, "followed": {condition: {}}}

    paths = [tmp_path / "clean.json", tmp_path / "rest.json"]
    for path, condition in zip(paths, (CLEAN, DIMMED), strict=True):
        path.write_text(json.dumps([part(condition)]), encoding="utf-8")
    (read,) = shift.read(paths)
    ours, theirs = Figures([read], resamples=50), Figures([whole], resamples=50)
    for how in (NONE, RUNNING):
        ours_found, theirs_found = (f.recovery(["memory"], how, [DIMMED]) for f in (ours, theirs))
        assert ours_found.value == theirs_found.value
        assert ours_found.interval == theirs_found.interval
    with pytest.raises(ValueError, match="not all detectors and shifts"):
        shift.read([paths[0], *_written(tmp_path / "b.json", folder_by_hand("b"))])
    pbas = folder_by_hand().plain()
    pbas |= {"scores": {"pbas": pbas["scores"]["memory"]}, "thresholds": {"pbas": 3.0}}
    (both,) = shift.read([*paths, *_written(tmp_path / "pbas.json", Scores.read(pbas))])
    assert Figures([both], resamples=5).rate(FALSE_POSITIVES, ["pbas"], NONE, [CLEAN]).value == 0.5
    other = folder_by_hand("b")
    other.scores["memory"][NONE][CLEAN] = ([6.0] * 4, [7.0, 7.0])
    assert Figures([whole, other], resamples=5).rate(FALSE_POSITIVES, ["memory"], NONE, [CLEAN]).value == 0.625
    other.thresholds["memory"] = 9.0
    paths[1].write_text(json.dumps([{**other.plain(), "folder": "a"}]), encoding="utf-8")
    with pytest.raises(ValueError, match="same images and thresholds"):
        shift.read(paths)


def test_the_report_prints_draws_and_judges_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = ([0, 1, 2, 3, 4], [0, 1, 2])
    found = {
        how: {
            name: (
                (rng.random(5) * (0.1 if how == RUNNING else 1) + (how == NONE and name != CLEAN) * 9).tolist(),
                (rng.random(3) + 9).tolist(),
            )
            for name in conditions()
        }
        for how in (NONE, OWN, RUNNING)
    }
    goals = shift.show([scores("a", found, dict.fromkeys(conditions(), rows))], tmp_path / "shift.png")
    by_name = {goal.name: goal for goal in goals}
    assert all(by_name[f"recovered, {name}, mean of methods"].value == 1 for name in REQUIRED)
    assert all(goal.met for goal in goals if np.isfinite(goal.limit))
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in conditions())
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """A folder of noise judged by a detector of a few patches, at 64 pixels."""
    import torch

    from deploy.export import export_head, tap_shapes
    from edge.bundle import Pooling
    from trainer.backbones.efficientnet_lite import lite0_trunk

    class Brightness(torch.nn.Module):
        """Distance of s16 from its mean on pictures that nothing changed."""

        tap_names, state_names, map_stride = ("s16",), (), 16

        def __init__(self, mean: torch.Tensor) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(mean)

        def forward(self, tap: torch.Tensor) -> tuple[torch.Tensor]:
            return ((tap - self.mean).square().mean(1),)

    many = np.stack([picture(i) for i in range(40)])
    groups = np.arange(40).astype(np.str_)
    trunk = lite0_trunk()
    with torch.inference_mode():
        tap = trunk(torch.from_numpy(many[:8]))[trunk.tap_names.index("s16")]
    path = tmp_path_factory.mktemp("head") / "head.onnx"
    export_head(Brightness(tap.mean(0, keepdim=True)), path, tap_shapes=tap_shapes(trunk, (64, 64)))
    source = Source(
        "a", path.parent, Preprocessing(height=64, width=64), many[:8], many[8:28], groups[8:28], many[28:34],
        many[34:38], groups[34:38], 255 - many[38:], groups[38:], "",
    )  # fmt: skip
    from benchmarks._shift_heads import Detector

    chosen = {name: one for name, one in conditions().items() if name in {CLEAN, DIMMED, "gain 0.5", "noise 16 levels"}}
    detector = Detector("memory", path, ("s16",), Pooling(cells=1))
    return judge(source, [detector], chosen, trunk_of(64), alpha=0.1, share=0.5, report=lambda _what: None)


def test_judging_takes_back_what_light_changed_and_leaves_clean_images_as_they_were(judged: Scores) -> None:
    found = judged.scores["memory"]
    clean, shifted, corrected = (
        np.array(found[how][name][0]) for how, name in ((NONE, CLEAN), (NONE, DIMMED), (RUNNING, DIMMED))
    )
    # Less contrast brings pictures of noise nearer to their mean.
    assert clean.mean() - shifted.mean() > 1
    assert abs(corrected - clean).mean() < 0.5 * abs(shifted - clean).mean()
    # An image's own moments cost some difference between images, and are then the same in any light.
    own, own_dimmed = (np.array(found[OWN][name][0]) for name in (CLEAN, DIMMED))
    assert abs(own_dimmed - own).mean() < 0.5 * abs(shifted - clean).mean()
    # Moments of six small pictures are rough; they must still leave clean ones nearly as they were.
    assert abs(np.array(found[RUNNING][CLEAN][0]) - clean).mean() < 0.3 * abs(shifted - clean).mean()
    assert judged.followed[CLEAN]["shift"] < judged.followed[DIMMED]["shift"]


def test_judging_takes_fewer_images_where_no_goal_depends_on_them(judged: Scores) -> None:
    assert judged.rows[DIMMED] == ([0, 1, 2, 3], [0, 1])
    assert judged.rows["gain 0.5"] == ([0, 3], [0])
    assert [len(part) for part in judged.scores["memory"][RUNNING]["gain 0.5"]] == [2, 1]
    assert Scores.read(json.loads(json.dumps(judged.plain()))).thresholds == judged.thresholds


def test_a_follower_that_takes_no_frame_says_so(judged: Scores) -> None:
    assert judged.followed[DIMMED]["accepted"] == 1
    assert 0 <= judged.followed["noise 16 levels"]["accepted"] <= 1
