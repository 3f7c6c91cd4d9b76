"""Reading sub-classes: Texture-AD's layout, and folders in MVTec layout by condition or over time."""

from __future__ import annotations

import csv
import os
from itertools import pairwise
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from edge.errors import DataError, UsageError
from trainer.data.subclasses import digests, material_hash, natural_key
from trainer.data.texture_ad import By, read_material, read_materials, read_view

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 24


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def spot(x: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:8, x : x + 3] = 255
    return mask


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(path.suffix.lower(), image)
    assert done
    path.write_bytes(data.tobytes())


def subclass(folder: Path, *, seed: int, train: bool = True) -> None:
    for i in range(3):
        if train:
            write(folder / f"train/good/{i}.png", picture(seed + i))
        write(folder / f"test/good/{i}.png", picture(seed + 10 + i))
        write(folder / f"test/scratch/{i}.png", picture(seed + 20 + i))
        write(folder / f"ground_truth/scratch/{i}_mask.png", spot(3 * i))


@pytest.fixture
def cloth(tmp_path: Path) -> Path:
    for name, seed in (("10", 100), ("2", 200), ("1", 300)):
        subclass(tmp_path / "Cloth" / name, seed=seed, train=name != "2")
    return tmp_path / "Cloth"


def test_released_layout_is_read_with_subclasses_in_natural_order(cloth: Path) -> None:
    (found,) = read_materials(cloth.parent)
    assert (found.name, found.ordered) == ("Cloth", False)
    assert [one.name for one in found.subclasses] == ["1", "2", "10"]
    assert [len(one.train) for one in found.subclasses] == [3, 0, 3]
    assert all(len(one.test) == 6 for one in found.subclasses)
    assert len({image.name for image in found.images}) == len(found.images)
    assert {image.group for image in found.subclasses[0].test}.isdisjoint(
        image.group for image in found.subclasses[1].test
    )
    assert read_materials(cloth)[0].subclasses[0].name == "1"
    assert [one.name for one in read_materials(cloth.parent, names=["cloth"])] == ["Cloth"]


def test_masks_are_paired_by_stem_in_any_order_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    for i in range(4):
        write(folder / f"train/good/{i}.png", picture(i))
    stems = ["b's cut", "A 2", "z", "10", "9", "x", "xA"]
    # Sorted as files, masks come in another order than images: x.PNG before xA.PNG, but xA.png before x_mask.png.
    for i, stem in enumerate(stems):
        write(folder / f"test/hole/{stem}.PNG", picture(50 + i))
        write(folder / f"ground_truth/hole/{stem}{'_mask' if i % 2 else ''}.png", spot(3 * i))
    found = read_material(tmp_path)
    shown = {image.name: image for image in found.subclasses[0].test}
    for i, stem in enumerate(stems):
        image = shown[f"1/test/hole/{stem}.PNG"]
        assert image.load_mask is not None
        np.testing.assert_array_equal(image.load_mask((SIDE, SIDE)), spot(3 * i) > 0)


@pytest.mark.parametrize("kind", ["16 bit", "palette", "three channels", "one"])
def test_every_value_above_0_is_a_defect(cloth: Path, kind: str) -> None:
    path, wanted = cloth / "1/ground_truth/scratch/0_mask.png", spot(2)
    if kind == "palette":
        from PIL import Image

        made = Image.fromarray((wanted > 0).astype(np.uint8), mode="P")
        made.putpalette([0, 0, 0, 128, 0, 0] + [0, 0, 0] * 254)
        made.save(path)
    else:
        as_written = {"16 bit": (wanted > 0).astype(np.uint16) * 3, "one": (wanted > 0).astype(np.uint8)}
        write(path, as_written.get(kind, np.dstack([wanted] * 3)))
    (image,) = [one for one in read_material(cloth).subclasses[0].test if one.name.endswith("scratch/0.png")]
    assert image.load_mask is not None
    np.testing.assert_array_equal(image.load_mask((SIDE, SIDE)), wanted > 0)


def test_missing_mask_is_an_error_with_its_path(cloth: Path) -> None:
    missing = cloth / "10/ground_truth/scratch/1_mask.png"
    missing.unlink()
    with pytest.raises(DataError, match=r"10/test/scratch/1\.png: its mask .*1_mask\.png .* is missing"):
        read_material(cloth)


def test_mask_without_an_image_is_an_error_with_its_path(cloth: Path) -> None:
    write(cloth / "1/ground_truth/scratch/7_mask.png", spot(1))
    with pytest.raises(DataError, match=r"1/ground_truth/scratch/7_mask\.png: a mask without an image"):
        read_material(cloth)


def test_mask_of_another_size_and_a_damaged_image_are_errors_with_their_paths(cloth: Path) -> None:
    write(cloth / "1/ground_truth/scratch/0.png", spot(0)[:-1])
    (cloth / "1/ground_truth/scratch/0_mask.png").unlink()
    damaged = cloth / "10/train/good/1.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(
        DataError, match=r"scratch/0\.png: the mask is 24x23 .*\n.*10/train/good/1\.png: not a readable"
    ):
        digests(read_material(cloth))


def test_defects_without_any_mask_count_for_image_figures(cloth: Path) -> None:
    for path in (cloth / "2/ground_truth/scratch").iterdir():
        path.unlink()
    (one,) = [one for one in read_material(cloth).subclasses if one.name == "2"]
    assert [image.load_mask is None for image in one.test if image.anomalous] == [True] * 3
    assert all(image.load_mask is not None for image in one.test if not image.anomalous)


def test_unknown_folders_are_noted(cloth: Path) -> None:
    (cloth / "notes").mkdir()
    (cloth / "1/depth").mkdir()
    write(cloth / "1/cover.png", picture(1))
    notes = "\n".join(read_material(cloth).notes)
    assert f"{cloth / 'notes'} ignored" in notes
    assert f"{cloth / '1/depth'} ignored" in notes
    assert f"1 images directly in {cloth / '1'} ignored" in notes


@pytest.mark.parametrize("inside", ["", "Cloth", "Cloth/1"])
def test_folders_without_subclasses_are_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DataError, match="holds no <sub-class>/test"):
        read_materials(tmp_path)


def test_unknown_names_are_refused(cloth: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--material wood: not in .* there are Cloth"):
        read_materials(cloth.parent, names=["wood"])
    with pytest.raises(UsageError, match="--by time"):
        read_materials(cloth, by=By.TIME)
    with pytest.raises(DataError, match="no such folder"):
        read_materials(tmp_path / "nowhere")


def test_hash_knows_content_and_not_place(cloth: Path, tmp_path: Path) -> None:
    found = read_material(cloth)
    first = material_hash(found, digests(found))
    other = tmp_path / "moved"
    cloth.rename(other)
    found = read_material(other)
    assert material_hash(found, digests(found)) == first
    write(other / "1/ground_truth/scratch/2_mask.png", spot(1))
    found = read_material(other)
    assert material_hash(found, digests(found)) != first


def view(root: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    """Write images and a meta.csv of (name, condition, group, extra)."""
    for i, (name, *_) in enumerate(rows):
        write(root / name, picture(i))
    with (root / "meta.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "condition", "group", "extra"), *rows])
    return root


def test_conditions_are_subclasses_and_groups_span_them(tmp_path: Path) -> None:
    rows = [
        (f"{split}/good/{light}{tile}.png", f"light{light}", f"{split}{tile}", "")
        for split in ("train", "test")
        for light in (2, 10)
        for tile in range(3)
    ]
    (found,) = read_materials(view(tmp_path / "tiles", rows))
    assert (found.name, found.ordered) == ("tiles", False)
    assert [one.name for one in found.subclasses] == ["light2", "light10"]
    assert {image.group for image in found.subclasses[0].train} == {image.group for image in found.subclasses[1].train}
    with pytest.raises(DataError, match="no condition"):
        read_view(view(tmp_path / "dark", [("train/good/0.png", "", "", "")]))


def test_time_makes_stretches_that_never_overlap(tmp_path: Path) -> None:
    days = list(range(10, 28))
    rows = [(f"train/good/{day}.png", "", "screw", f"x=1;time=202008{day}110014") for day in reversed(days)]
    rows += [(f"test/good/{day}.png", "", "screw", f"time=202008{day}115500") for day in days]
    found = read_view(view(tmp_path, rows), by=By.TIME, periods=4)
    assert found.ordered
    assert [one.name for one in found.subclasses] == [f"period {k}" for k in (1, 2, 3, 4)]
    spans = [
        sorted((image.name[-6:-4], image.split == "test") for image in (*one.train, *one.test))
        for one in found.subclasses
    ]
    assert all(earlier[-1] < later[0] for earlier, later in pairwise(spans))
    assert [len(span) for span in spans] == [9, 9, 9, 9]
    assert found.subclasses[0].train[0].group != found.subclasses[1].train[0].group


def test_time_that_is_missing_or_stands_still_is_refused(tmp_path: Path) -> None:
    rows = [(f"train/good/{i}.png", "", "", "time=20200828110014" if i else "later") for i in range(3)]
    with pytest.raises(DataError, match=r"0\.png: no time"):
        read_view(view(tmp_path / "a", rows), by=By.TIME)
    with pytest.raises(DataError, match="all good images are of one moment"):
        read_view(view(tmp_path / "b", rows[1:]), by=By.TIME)


def test_natural_order_is_by_number_and_total() -> None:
    names = ["exp10", "exp2", "10", "2", "002", "a", ""]
    assert sorted(names, key=natural_key) == ["", "002", "2", "10", "a", "exp2", "exp10"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_that_cannot_be_listed_is_named(cloth: Path) -> None:
    (cloth / "1").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be listed"):
            read_material(cloth)
    finally:
        (cloth / "1").chmod(0o755)
