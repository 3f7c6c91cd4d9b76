"""Generated assembled parts: seeded, exactly labelled, strange in their places alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from edge.errors import DataError
from trainer.data.assembled import COMPONENTS, Assembly, Fault, part_seed, write_assembled
from trainer.data.folder import load_image, load_mask, read_folder

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 96


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    return Assembly.draw(3)


def test_same_seed_gives_the_same_picture_and_another_one_another(assembly: Assembly) -> None:
    first, again, other = (assembly.part(seed, side=SIDE) for seed in (1, 1, 2))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert Assembly.draw(3) == assembly
    assert Assembly.draw(4).nominal != assembly.nominal
    assert (first.image.shape, first.image.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert not first.mask.any()


def test_good_parts_have_every_component_within_its_slack() -> None:
    assembly = Assembly.draw(3, slack=0.03)
    for seed in range(20):
        found = assembly.part(seed, side=64).components
        assert [one.kind for one in found] == list(COMPONENTS)
        off = [(a.x - b.x, a.y - b.y) for a, b in zip(found, assembly.nominal, strict=True)]
        assert np.abs(off).max() <= 0.03
    assert len({part.components for part in (assembly.part(seed, side=64) for seed in range(5))}) == 5


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("seed", range(6))
def test_mask_is_what_differs_from_the_good_part(assembly: Assembly, fault: Fault, seed: int) -> None:
    good, faulty = assembly.part(seed, side=SIDE), assembly.part(seed, fault, side=SIDE)
    change = np.abs(good.image.astype(int) - faulty.image.astype(int)).max(2)
    # Shadows are soft: beyond a few pixels around the mask nothing changed at all.
    near = cv2.dilate(faulty.mask.astype(np.uint8), np.ones((13, 13), np.uint8)) > 0
    assert change[~near].max() == 0
    assert change[faulty.mask].mean() > 20
    assert 0.002 < faulty.mask.mean() < 0.12


def test_faults_are_what_they_are_called(assembly: Assembly) -> None:
    for seed in range(8):
        good = assembly.part(seed, side=64).components
        of = {fault: assembly.part(seed, fault, side=64).components for fault in Fault}
        assert of[Fault.SCRATCH] == good
        assert len(of[Fault.MISSING]) == len(good) - 1
        assert set(of[Fault.MISSING]) < set(good)
        assert set(of[Fault.EXTRA]) > set(good)
        (added,) = set(of[Fault.EXTRA]) - set(good)
        assert added.kind in COMPONENTS
        (gone,), (come,) = set(good) - set(of[Fault.MOVED]), set(of[Fault.MOVED]) - set(good)
        assert gone.kind == come.kind
        assert np.hypot(gone.x - come.x, gone.y - come.y) > 0.1
        exchanged = [one for one in of[Fault.SWAPPED] if one not in good]
        assert len(exchanged) == 2
        places = {(one.x, one.y) for one in good}
        assert {(one.x, one.y) for one in exchanged} <= places
        assert sorted(one.kind for one in of[Fault.SWAPPED]) == sorted(COMPONENTS)


def test_folder_is_read_back_with_its_masks(tmp_path: Path) -> None:
    folder = write_assembled(tmp_path / "plate", seed=2, train=4, test_good=2, test_each=2, side=64)
    found = read_folder(folder)
    assert len(found.train) == 4
    assert len(found.test) == 2 + 2 * len(Fault)
    assert {sample.label for sample in found.test} == {"good", *(fault.value for fault in Fault)}
    for sample in found.masked:
        if sample.anomalous:
            assert load_mask(sample, load_image(sample.path).shape[:2]).any()
    pictures = [load_image(sample.path).tobytes() for sample in (*found.train, *found.test)]
    assert len(set(pictures)) == len(pictures)
    with pytest.raises(DataError, match="holds files already"):
        write_assembled(folder)


def test_seeds_of_products_do_not_meet() -> None:
    assert part_seed(1, 999_999) < part_seed(2, 0)


def test_values_out_of_range_are_refused(assembly: Assembly) -> None:
    with pytest.raises(ValueError, match="slack"):
        Assembly.draw(1, slack=0.2)
    with pytest.raises(ValueError, match="side 32"):
        assembly.part(1, side=32)
