"""The embedded example: readable, exact, seeded, and never tested on what it trained on."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge.errors import DataError
from trainer.data import conveyor, surfaces
from trainer.data.conveyor import KINDS, independent_crops, stamp, write_default, write_replay
from trainer.data.folder import check, content_hash, load_image, load_mask, read_folder, split_holdout
from trainer.synthesis.image2d import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", KINDS)
def test_example_is_a_readable_folder_with_masks_and_disjoint_pieces(kind: str, tmp_path: Path) -> None:
    families = len(FAMILIES)
    steps: list[tuple[str, int, int]] = []
    out = write_default(
        tmp_path / "x", seed=3, kind=kind, train=14, test_good=3, test_defective=families, side=96,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    images = read_folder(out)
    assert images.notes == ()
    assert check(images).sizes == {(96, 96): 17 + families}
    assert steps[-1][1:] == (17 + families, 17 + families)
    assert {s.label for s in images.test} == {"good", *FAMILIES}
    assert all(load_mask(s, (96, 96)).any() for s in images.test if s.anomalous)
    train, test = ({s.group for s in part} for part in (images.train, images.test))
    assert not train & test
    assert (len(train), len(test)) == independent_crops(kind, train=14, test=3 + families)
    assert split_holdout(images.train, 0.2, 0, 3).by_group


def test_example_same_seed_same_bytes(tmp_path: Path) -> None:
    made = [
        write_default(tmp_path / name, seed=seed, kind="metal", train=2, test_good=1, test_defective=1, side=64)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    hashes = [content_hash((*read_folder(out).train, *read_folder(out).test)) for out in made]
    assert hashes[0] == hashes[1] != hashes[2]


def test_photographs_pieces_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    numbered = np.arange(512 * 512, dtype=np.int64).reshape(512, 512)
    photo = np.stack([numbered % 256, numbered // 256 % 256, numbered // 65536], axis=2).astype(np.uint8)
    monkeypatch.setattr(surfaces, "load_image", lambda _: photo)
    piece = surfaces.pieces("brick", 0, 256, 12)
    views = [piece("train", i)[1] for i in range(12)] + [piece("test", i)[1] for i in range(4)]
    seen = np.concatenate([view.reshape(-1, 3).astype(np.int64) @ [1, 256, 65536] for view in views])
    assert len(np.unique(seen)) == len(seen) == 512 * 512


def test_photographs_replay_stays_on_the_strip_of_test(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = np.zeros((512, 512, 3), np.uint8)
    photo[:, :384] = 255  # where training looks
    monkeypatch.setattr(surfaces, "load_image", lambda _: photo)
    web = surfaces.open_web("gravel", 0, 256)
    assert all(web.view(place, 128).max() == 0 for place in range(0, 1200, 37))


def test_stamped_defect_stays_in_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    view = np.full((128, 128, 3), 120, np.uint8)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        defect = stamp(view, rng)
        seen = conveyor.look_at_mask(defect.mask, conveyor.Pose.draw(rng), 256)
        assert seen.any()
        assert not seen[[0, -1]].any()
        assert not seen[:, [0, -1]].any()


@pytest.mark.parametrize("kind", ["wafer", "brick"])
def test_replay_truth_is_where_pixels_differ(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conveyor, "sensor_noise", lambda image, _: image)
    made = write_replay(tmp_path / "with", seed=5, kind=kind, frames=64, side=96)
    monkeypatch.setattr(conveyor._Scar, "on", lambda _, view, __: (view, np.zeros(view.shape[:2], bool)))
    good = write_replay(tmp_path / "without", seed=5, kind=kind, frames=64, side=96)
    assert set(good.labels) == {""}
    rows = list(csv.DictReader(made.truth.open(encoding="utf-8")))
    assert [row["file"] for row in rows] == sorted(path.name for path in made.frames.iterdir())
    assert [row["family"] for row in rows] == list(made.labels)
    for row in rows:
        ours, plain = (load_image(r.frames / row["file"]).astype(int) for r in (made, good))
        changed = np.abs(ours - plain).max(axis=2) > 6
        if not row["defect"]:
            assert not changed.any()
            continue
        x, y, w, h = (int(row[key]) for key in "xywh")
        inside = np.zeros_like(changed)
        inside[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2] = True
        assert not changed[~inside].any()


@pytest.mark.parametrize("kind", KINDS)
def test_replay_defect_moves_through_consecutive_frames(kind: str, tmp_path: Path) -> None:
    made = write_replay(tmp_path / "r", seed=1, kind=kind, frames=60, side=64)
    rows = list(csv.DictReader(made.truth.open(encoding="utf-8")))
    numbers = sorted({int(row["defect"]) for row in rows if row["defect"]})
    assert numbers == [1, 2]
    for number in numbers:
        seen = [row for row in rows if row["defect"] == str(number)]
        frames = [int(row["frame"]) for row in seen]
        assert frames == list(range(frames[0], frames[0] + len(frames)))
        assert len(frames) >= 6
        middles = [int(row["y"]) + int(row["h"]) / 2 for row in seen]
        assert all(np.diff(middles) < 0)
    assert made.labels[0] == made.labels[-1] == ""


def test_replay_on_a_photograph_lets_every_defect_cross_before_the_web_starts_anew(tmp_path: Path) -> None:
    made = write_replay(tmp_path / "r", seed=2, kind="gravel", frames=260, side=64)
    defects = [row["defect"] for row in csv.DictReader(made.truth.open(encoding="utf-8"))]
    counts = [defects.count(number) for number in sorted(set(defects) - {""}, key=int)]
    assert len(counts) >= 5
    assert min(counts) >= 6


def test_replay_defect_belongs_to_one_pass_of_the_web() -> None:
    scar = conveyor._Scar(380, 385, np.full((40, 40, 3), 9, np.int16), np.ones((40, 40), bool), "spot")
    view = np.zeros((40, 40, 3), np.uint8)
    assert scar.on(view, 370)[1].sum() == 30 * 40
    changed, mask = scar.on(view, 390)
    assert not mask.any()
    assert not changed.any()


def test_replay_defects_come_at_the_frames_asked_for(tmp_path: Path) -> None:
    made = write_replay(tmp_path / "r", seed=1, kind="metal", frames=60, defect_frames=[12, 40], side=64)
    assert all(made.labels[frame] for frame in (12, 40))


@pytest.mark.parametrize(
    ("kind", "defects", "says"),
    [
        ("metal", [12, 20], "16 frames apart"),
        ("metal", [2], "8 from both ends"),
        ("metal", [59], "8 from both ends"),
        ("metal", [40, 12], "in order"),
        ("metal", [], "there must be some"),
        ("brick", [26], "choose from"),
    ],
)
def test_replay_defects_that_would_be_cut_off_are_refused(
    kind: str, defects: list[int], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        write_replay(tmp_path / "r", seed=1, kind=kind, frames=60, defect_frames=defects, side=64)
    assert not (tmp_path / "r").exists()


def test_example_never_writes_over_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    for write in (write_default, write_replay):
        with pytest.raises(DataError, match="holds files already"):
            write(tmp_path, seed=0, kind="metal")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_example_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match="cannot be written"):
        write_default(tmp_path / "file" / "x", seed=0, kind="metal")


@pytest.mark.parametrize("wrong", [{"kind": "wood"}, {"train": 1}, {"test_good": -1}, {"side": 32}, {"train": 100_000}])
def test_example_settings_out_of_range_are_refused(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown kind|must be|beyond"):
        write_default(tmp_path / "x", **{"seed": 0, "kind": "metal", **wrong})
    assert not (tmp_path / "x").exists()
