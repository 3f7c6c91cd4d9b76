"""Reading MVTec-style folders: what is found, what is refused, and what each message says."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.errors import DataError
from trainer.data.folder import check, content_hash, load_image, load_mask, read_folder

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "images"
COUNTS = {  # train good, test good, test defective, masks
    "bsdata/ball_screw": (403, 138, 167, 167),
    "crackforest/road": (238, 179, 106, 106),
    "deeppcb/pcb": (307, 123, 123, 123),
    "elpv/solar_mono": (240, 80, 120, 0),
    "lookout_samples/toy_alien": (38, 20, 60, 0),
    "magnetic_tile/magnetic_tile": (273, 132, 276, 276),
    "piped/paper": (384, 192, 576, 576),
}


def write(path: Path, image: np.ndarray | None = None, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3)).astype(np.uint8)
    assert cv2.imwrite(str(path), image)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train/good/b.png", "train/good/a.JPG", "train/good/c.tif", "test/good/a.png", "test/hole/a.png"):
        write(tmp_path / name)
    write(tmp_path / "ground_truth/hole/a_mask.png", np.eye(20, 30, dtype=np.uint8) * 255)
    (tmp_path / "train/good/Thumbs.db").write_bytes(b"no image")
    (tmp_path / "train/good/._b.png").write_bytes(b"no image")
    return tmp_path


def test_folder_lists_good_and_labelled_images_by_name(root: Path) -> None:
    images = read_folder(root)
    assert [sample.name for sample in images.train] == ["train/good/a.JPG", "train/good/b.png", "train/good/c.tif"]
    assert [(sample.name, sample.anomalous) for sample in images.test] == [
        ("test/good/a.png", False),
        ("test/hole/a.png", True),
    ]
    assert images.notes == ()
    assert len({sample.group for sample in images.train}) == 3


def test_folder_masks_under_both_names(root: Path) -> None:
    write(root / "test/hole/b.png")
    write(root / "ground_truth/hole/b.png", np.zeros((20, 30), np.uint8))
    defective = [sample for sample in read_folder(root).test if sample.anomalous]
    assert [sample.mask.name for sample in defective if sample.mask] == ["a_mask.png", "b.png"]
    assert load_mask(defective[0], (20, 30)).sum() == 20
    assert any("without a defective pixel: test/hole/b.png" in note for note in check(read_folder(root)).notes)


def test_folder_good_image_has_an_empty_mask(root: Path) -> None:
    assert not load_mask(read_folder(root).test[0], (20, 30)).any()


def test_folder_without_tests_serves_training_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "train/good/a.png")
    images = read_folder(tmp_path)
    assert images.test == ()
    assert "no test images" in images.notes[0]


def test_folder_without_masks_is_fine_and_says_so(root: Path) -> None:
    (root / "ground_truth/hole/a_mask.png").unlink()
    images = read_folder(root)
    assert "no masks" in images.notes[0]
    assert images.masked == ()
    with pytest.raises(DataError, match=r"a_mask\.png"):
        load_mask(images.test[1], (20, 30))


def test_folder_one_missing_mask_is_left_out_of_pixel_figures(root: Path) -> None:
    write(root / "test/hole/b.png")
    images = read_folder(root)
    assert "1 defective images without a mask" in images.notes[0]
    assert [sample.name for sample in images.masked] == ["test/good/a.png", "test/hole/a.png"]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda root: root / "gone", "no such folder"),
        (lambda root: (root / "empty").mkdir() or root / "empty", "folder is empty"),
        (lambda root: root.parent, "holds several data sets"),
        (lambda root: write(root / "flat/x.png").parent, "has images but no train/good"),
        (lambda root: write(root / "odd/train/bad/x.png").parents[2], "no images of good parts"),
        (lambda root: write(root / "ground_truth/hole/z_mask.png").parents[2], "a mask without an image"),
        (lambda root: write(root / "ground_truth/dent/a_mask.png").parents[2], "a mask without an image"),
        (lambda root: write(root / "ground_truth/hole/a.png").parents[2], "second mask"),
        (lambda root: write(root / "train/good/a.png").parents[2], "shares its stem"),
    ],
)
def test_folder_refuses_what_cannot_be_used(root: Path, prepare: object, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read_folder(prepare(root))
    assert str(root) in str(caught.value) or str(root.parent) in str(caught.value)


def meta(root: Path, *lines: str, header: str = "path,split,label,anomaly,condition,group") -> None:
    (root / "meta.csv").write_text("\n".join([header, *lines, ""]), encoding="utf-8-sig")


ROWS = (
    "train/good/a.JPG,train,good,0,day,g1",
    "train/good/b.png,train,good,0,day,g1",
    "train/good/c.tif,train,good,0,night,",
    "test/good/a.png,test,good,0,day,g2",
    "test\\hole\\a.png,test,hole,1,day,g2",
)


def test_meta_gives_groups_and_conditions_and_an_empty_group_is_the_image(root: Path) -> None:
    meta(root, *ROWS)
    images = read_folder(root)
    assert [sample.group for sample in images.train] == ["g1", "g1", "train/good/c.tif"]
    assert [sample.condition for sample in images.train] == ["day", "day", "night"]
    assert images.test[1].group == "g2"


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        ((*ROWS, "train/good/zz.png,train,good,0,,"), None, r"line 7: train/good/zz\.png does not exist"),
        (ROWS[1:], None, r"does not list train/good/a\.JPG"),
        ((*ROWS[:4], "test/hole/a.png,test,dent,1,,"), None, "label is 'dent'"),
        ((*ROWS[:4], "test/hole/a.png,test,hole,0,,"), None, "anomaly is '0'"),
        ((*ROWS, ROWS[0]), None, "listed twice"),
        ((*ROWS, ",train,good,0,,"), None, "path is empty"),
        (ROWS, "file,split,label,anomaly,condition,group", "no column 'path'"),
    ],
)
def test_meta_that_disagrees_with_the_files_is_refused(
    root: Path, rows: tuple[str, ...], header: str | None, says: str
) -> None:
    meta(root, *rows, **({"header": header} if header else {}))
    with pytest.raises(DataError, match=says):
        read_folder(root)


def test_meta_that_is_no_text_is_refused(root: Path) -> None:
    (root / "meta.csv").write_bytes(b"path\n\xff\xfe\x00train")
    with pytest.raises(DataError, match=r"meta\.csv: not a UTF-8"):
        read_folder(root)


def test_check_names_every_damaged_file_at_once(root: Path) -> None:
    (root / "train/good/b.png").write_bytes((root / "train/good/b.png").read_bytes()[:-30])
    write(root / "ground_truth/hole/a_mask.png", np.zeros((21, 30), np.uint8))
    seen = []
    with pytest.raises(DataError) as caught:
        check(read_folder(root), progress=lambda *step: seen.append(step))
    assert "b.png: not a readable image" in str(caught.value)
    assert "a_mask.png: the mask is 30x21 but its image is 30x20" in str(caught.value)
    assert seen[-1][1:] == (5, 5)


def test_check_allows_mixed_sizes_and_says_so(root: Path) -> None:
    write(root / "train/good/d.png", size=(40, 30))
    report = check(read_folder(root))
    assert report.sizes == {(20, 30): 5, (40, 30): 1}
    assert "2 sizes" in report.notes[0]


def test_content_hash_follows_bytes_and_names_not_order_or_place(root: Path, tmp_path_factory: object) -> None:
    before = read_folder(root).train
    digest = content_hash(before)
    assert content_hash(tuple(reversed(before))) == digest
    moved = root.rename(root.with_name("moved"))
    assert content_hash(read_folder(moved).train) == digest
    (moved / "train/good/b.png").rename(moved / "train/good/bb.png")
    assert content_hash(read_folder(moved).train) != digest
    (moved / "train/good/bb.png").rename(moved / "train/good/b.png")
    write(moved / "train/good/b.png", np.zeros((20, 30, 3), np.uint8))
    assert content_hash(read_folder(moved).train) != digest


@pytest.mark.shared_data
@pytest.mark.parametrize("name", COUNTS)
def test_folder_reads_every_evaluation_set(name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"EVALUATION IMAGES ABSENT: {SHARED} is not there, so no real data set was read")
    images = read_folder(SHARED / name)
    defective = [sample for sample in images.test if sample.anomalous]
    masks = sum(sample.mask is not None for sample in defective)
    assert (len(images.train), len(images.test) - len(defective), len(defective), masks) == COUNTS[name]
    for sample in (*images.train[:3], *images.test[:2], *images.test[-2:]):
        shape = load_image(sample.path).shape
        if sample.mask is not None:
            assert load_mask(sample, shape[:2]).any()
