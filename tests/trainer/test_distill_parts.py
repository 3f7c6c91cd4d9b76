"""The parts of distillation: pictures at several sizes, teachers' maps on a grid, banks and branch on small taps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edge.bundle import Preprocessing, Tiles
from edge.errors import DataError, UsageError
from edge.inference.preprocessing import join_maps
from trainer.data.conveyor import write_default
from trainer.data.folder import read_folder
from trainer.distill import fit as fitting
from trainer.distill.fit import Lesson, _ridge, cut_maps, fit_student
from trainer.distill.gallery import LEARNED, UNSEEN, Gallery
from trainer.distill.model import StudentHead
from trainer.distill.search import scaled
from trainer.distill.student import Student, StudentConfig
from trainer.distill.teachers import Taught
from trainer.methods.base import Features
from trainer.synthesis.families import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

LARGE, SMALL = Preprocessing(height=96, width=96), Preprocessing(height=64, width=64)
CONFIG = StudentConfig(rows=6, width=8, steps=30, candidates=200, embedding="own")
CPU = torch.device("cpu")


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


def make_gallery(folder: Path, seed: int = 3) -> Gallery:
    samples = read_folder(folder).train
    return Gallery(samples[:8], samples[8:], LARGE, seed=seed, relit=5, defects=12, progress=quiet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("web")
    return write_default(where, seed=1, kind="cloth", train=12, test_good=1, test_defective=1, side=96)


def test_gallery_learns_and_judges_on_different_kinds_that_are_all_there() -> None:
    assert not set(LEARNED) & set(UNSEEN)
    assert {*LEARNED, *UNSEEN} == set(FAMILIES)


def test_gallery_defects_change_only_their_mask_and_are_the_same_at_every_size(folder: Path) -> None:
    gallery = make_gallery(folder)
    large, small = gallery.at(LARGE), gallery.at(SMALL)
    assert large.lesson().shape == (8 + 5 + 12, 96, 96, 3)
    base = large.good[np.arange(12) % 8]
    for before, after, mask in zip(base, large.defective, gallery.masks, strict=True):
        assert (before != after).any()
        assert np.array_equal(before[~mask], after[~mask])
    shares = gallery.lesson_masks((16, 16))
    assert shares[:13].max() == 0
    for index, (before, after) in enumerate(zip(small.good[np.arange(12) % 8], small.defective, strict=True)):
        changed = np.abs(after.astype(int) - before).sum(2).reshape(16, 4, 16, 4).max((1, 3))
        # A cell that the defect does not come near is as it was.
        assert changed[(shares[13 + index] == 0).numpy()].max(initial=0) == 0
    assert len(small.spoiled) == len(gallery.spoiled_masks) == len(small.holdout) * gallery.repeats


def test_gallery_same_seed_same_pictures_another_seed_others(folder: Path) -> None:
    first, again, other = make_gallery(folder), make_gallery(folder), make_gallery(folder, seed=4)
    assert np.array_equal(first.at(SMALL).lesson(), again.at(SMALL).lesson())
    assert np.array_equal(first.at(SMALL).spoiled, again.at(SMALL).spoiled)
    assert not np.array_equal(first.at(SMALL).defective, other.at(SMALL).defective)


@pytest.mark.parametrize(("rows", "cols", "overlap"), [(1, 1, 0), (2, 3, 0), (2, 2, 32)])
def test_cut_maps_joined_again_are_the_maps(rows: int, cols: int, overlap: int) -> None:
    preprocessing = Preprocessing(height=64, width=96, tiles=Tiles(rows=rows, cols=cols, overlap=overlap))
    height, width = preprocessing.canvas_height // 4, preprocessing.canvas_width // 4
    maps = torch.rand((2, height, width), generator=torch.Generator().manual_seed(0))
    cut = cut_maps(maps, rows, cols, (64, 96), overlap).numpy()
    joined = [join_maps(cut[i : i + rows * cols], preprocessing, 4) for i in (0, rows * cols)]
    np.testing.assert_allclose(np.stack(joined), maps.numpy(), atol=1e-6)


def test_taught_target_is_the_mean_of_the_teachers_on_the_students_grid() -> None:
    maps = (np.full((2, 8, 8), 3.0, np.float32), np.full((2, 12, 12), 1.0, np.float32))
    target = Taught(maps, {}, np.empty(0, np.int64)).target((6, 10))
    assert target.shape == (2, 6, 10)
    torch.testing.assert_close(target, torch.full((2, 6, 10), 2.0))


def test_ridge_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=generator) + 2.0
    matrix, shift = torch.randn(5, 3, generator=generator), torch.tensor([1.0, -2.0, 0.5])
    weight, offset = _ridge(x, x @ matrix + shift)
    torch.testing.assert_close(weight, matrix, rtol=0.03, atol=0.03)
    torch.testing.assert_close(offset, shift, rtol=0.03, atol=0.03)


def features(count: int, seed: int, *, spot: bool = False) -> Features:
    """Noise taps of 64-pixel tiles; with a spot, something at one place that noise never shows."""
    generator = torch.Generator().manual_seed(seed)
    taps = {n: torch.randn(count, c, 64 // s, 64 // s, generator=generator) for n, c, s in (("s4", 4, 4), ("s8", 6, 8))}
    if spot:
        taps["s4"][:, :, 4:6, 4:6] += 3.0
        taps["s8"][:, :, 2:3, 2:3] += 3.0
    return Features(taps, 1, np.arange(count).astype(np.str_))


def lesson(*, taught: bool) -> Lesson:
    good, bad = features(12, 0), features(8, 1, spot=True)
    both = Features(
        {name: torch.cat([good.taps[name], bad.taps[name]]) for name in good.taps}, 1, np.arange(20).astype(np.str_)
    )
    masks = torch.zeros(20, 16, 16)
    masks[12:, 4:6, 4:6] = 1.0
    target = masks * 5.0 + 0.3 * torch.linspace(-1, 1, 16)
    told = Taught((target.numpy(),), {"s4": torch.randn(6, 5, 24, 24), "s8": torch.randn(6, 7, 12, 12)}, np.arange(6))
    return Lesson(
        features=both,
        good=12,
        masks=masks,
        target=target if taught else None,
        taught=told if taught else None,
        holdout=features(8, 2),
        spoiled=features(8, 3, spot=True),
    )


def fitted(
    config: StudentConfig = CONFIG, *, taught: bool = True, seed: int = 0, given: Lesson | None = None
) -> StudentHead:
    head, _ = fit_student(given or lesson(taught=taught), config, seed=seed, device=CPU, progress=quiet)
    assert isinstance(head, StudentHead)
    return head


def test_student_comes_nearer_to_its_teachers_map_than_its_banks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Noise and spots are told apart by any share; here the teacher's whole correction is looked at.
    monkeypatch.setattr(fitting, "SOFT_SHARES", (1.0,))
    monkeypatch.setattr(fitting, "HARD_SHARES", (0.0,))
    given = lesson(taught=True)
    assert given.target is not None
    head = fitted(CONFIG.model_copy(update={"steps": 150, "hard": 0.0}), given=given)
    with torch.no_grad():
        levels = head.levels([given.features.taps[name] for name in head.tap_names])
        bank, correction = head.bank_map(levels), head.branch_map(levels)
    assert float((bank + correction - given.target).abs().mean()) < 0.8 * float((bank - given.target).abs().mean())


def test_student_without_a_teacher_ships_nothing_of_the_untaught_output() -> None:
    _, shares = fit_student(lesson(taught=False), CONFIG, seed=0, device=CPU, progress=quiet)
    assert (shares.soft, shares.embedding) == (0.0, "own")


def test_student_same_seed_same_bits_another_seed_others() -> None:
    first, again, other = (fitted(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_student_banks_do_not_depend_on_what_is_held_out() -> None:
    given = lesson(taught=True)
    moved = replace(given, holdout=features(8, 9), spoiled=features(8, 10, spot=True))
    first, second = fitted(given=given), fitted(given=moved)
    for name in ("bank_s4", "bank_s8", "scales", "offset", "gain", "embed_s4.weight"):
        assert torch.equal(first.state_dict()[name], second.state_dict()[name]), name


def test_student_in_the_teachers_embedding_has_its_channels_and_comes_back() -> None:
    config = CONFIG.model_copy(update={"embedding": "teacher"})
    head = fitted(config)
    assert [tuple(head.get_buffer(name).shape) for name in head.state_names] == [(3, 5), (6, 7)]
    rebuilt = Student.build(config, head.state_dict())
    taps = [features(2, 5).taps[name] for name in ("s4", "s8")]
    with torch.inference_mode():
        for ours, theirs in zip(head(*taps), rebuilt(*taps), strict=True):
            assert torch.equal(ours, theirs)
        assert head(*taps)[1].shape == (2, 64, 12)


@pytest.mark.parametrize("lost", ["bank_s4", "embed_s8.weight", "branch.leave.bias"])
def test_student_build_tensors_that_are_no_students_are_refused(lost: str) -> None:
    tensors = {name: value for name, value in fitted().state_dict().items() if name != lost}
    with pytest.raises(DataError, match="distil again"):
        Student.build(CONFIG, tensors)


def test_scaled_keeps_crop_proportions_and_tiles_or_says_what_does_not_fit() -> None:
    base = Preprocessing(height=128, width=256, tiles=Tiles(rows=1, cols=2, overlap=64))
    half = scaled(base, 64)
    assert (half.height, half.width, half.tiles.cols, half.tiles.overlap) == (64, 128, 2, 32)
    with pytest.raises(UsageError, match="overlap by 48"):
        scaled(base, 96)
    with pytest.raises(UsageError, match="--sizes 100"):
        scaled(base, 100)
