from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.errors import DataError
from trainer.data.folder import Sample
from trainer.evaluation.stream import GOOD_PER_DEFECT, arrange, write_stream


def sample(label: str, index: int, folder: Path = Path("/none")) -> Sample:
    path = folder / label / f"{index:03d}.png"
    return Sample(path, "test", label, label != "good", None, "", path.name)


def test_defects_stand_alone_between_good_parts() -> None:
    samples = [sample("good", i) for i in range(20)] + [sample("hole", i) for i in range(50)]

    labels = [chosen.label for chosen in arrange(samples, seed=0)]

    assert labels.count("good") == 20
    assert labels.count("hole") == 9
    gaps = "".join("h" if label == "hole" else "." for label in labels).split("h")
    assert min(map(len, gaps)) == GOOD_PER_DEFECT


def test_every_kind_is_shown_before_one_is_shown_twice() -> None:
    samples = [sample("good", i) for i in range(10)]
    samples += [sample(kind, i) for kind, n in (("a", 30), ("b", 1), ("c", 2)) for i in range(n)]

    labels = [chosen.label for chosen in arrange(samples, seed=1)]

    assert sorted(label for label in labels if label != "good") == ["a", "a", "b", "c"]


def test_no_image_is_shown_twice_and_the_seed_decides() -> None:
    samples = [sample("good", i) for i in range(9)] + [sample("hole", i) for i in range(3)]

    assert len(set(arrange(samples, seed=0))) == len(arrange(samples, seed=0)) == 12
    assert arrange(samples, seed=0) == arrange(samples, seed=0)
    assert arrange(samples, seed=0) != arrange(samples, seed=1)


def test_long_folders_are_cut_to_the_limit() -> None:
    samples = [sample("good", i) for i in range(300)] + [sample("hole", i) for i in range(300)]

    assert len(arrange(samples, seed=0, limit=60)) <= 60


@pytest.mark.parametrize(("good", "bad"), [(2, 5), (0, 5), (10, 0)])
def test_too_few_images_are_refused(good: int, bad: int) -> None:
    samples = [sample("good", i) for i in range(good)] + [sample("hole", i) for i in range(bad)]

    with pytest.raises(DataError, match=f"{good} good and {bad} defective"):
        arrange(samples, seed=0)


def test_written_stream_sorts_in_order_and_knows_its_defects(tmp_path: Path) -> None:
    samples = [sample("hole", 7, tmp_path), sample("good", 1, tmp_path), sample("crack", 0, tmp_path)]
    for index, one in enumerate(samples):
        one.path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(one.path), np.full((4, 4), index, np.uint8))

    stream = write_stream(samples, tmp_path / "stream")

    assert [int(cv2.imread(str(path))[0, 0, 0]) for path in sorted(stream.path.iterdir())] == [0, 1, 2]
    assert [(span.first, span.last, span.label) for span in stream.defects] == [(0, 0, "hole"), (2, 2, "crack")]
