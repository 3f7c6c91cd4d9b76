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
from trainer.distill.fit import Lesson, Shares, _found_loss, cut_maps, fit_student
from trainer.distill.gallery import LEARNED, UNSEEN, Gallery
from trainer.distill.search import scaled, shapes
from trainer.distill.student import Student, StudentConfig
from trainer.distill.teachers import Taught
from trainer.methods.base import Features
from trainer.methods.memory.fit import MemoryMethod
from trainer.synthesis.families import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.distill.model import StudentHead

LARGE, SMALL = Preprocessing(height=96, width=96), Preprocessing(height=64, width=64)
CONFIG = StudentConfig(rows=6, width=16, steps=200, candidates=200, site_components=4)
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
    target = Taught(maps).target((6, 10))
    assert target.shape == (2, 6, 10)
    torch.testing.assert_close(target, torch.full((2, 6, 10), 2.0))


CHANNELS = {"s4": (4, 16), "s8": (6, 8), "s16": (8, 4)}  # channels and side of each tap of a 64-pixel tile


def features(count: int, seed: int, *, spot: bool = False) -> Features:
    """Noise taps of 64-pixel tiles; with a spot, something at one place that noise never shows."""
    generator = torch.Generator().manual_seed(seed)
    taps = {name: torch.randn(count, c, side, side, generator=generator) for name, (c, side) in CHANNELS.items()}
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
    return Lesson(
        features=both,
        good=12,
        masks=masks,
        target=masks * 5.0 + 0.3 * torch.linspace(-1, 1, 16) if taught else None,
        holdout=features(8, 2),
        spoiled=features(8, 3, spot=True),
    )


@pytest.fixture(scope="module", params=[True, False], ids=["taught", "control"])
def whole(request: pytest.FixtureRequest) -> tuple[Lesson, StudentHead]:
    """A student that ships all of its branch: noise and spots are told apart by any share."""
    given = lesson(taught=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_choose", lambda *_: Shares(*((1.0, 0.0) if request.param else (0.0, 1.0))))
        head, _ = fit_student(given, CONFIG, seed=0, device=CPU, progress=quiet)
    return given, head


def maps_of(head: StudentHead, given: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the banks' map and the whole map."""
    with torch.inference_mode():
        taps = [given.taps[name] for name in head.tap_names]
        return head.bank_map(head.levels(taps)), head(*taps)[0]


def test_branch_learns_the_teachers_map_or_the_masks(whole: tuple[Lesson, StudentHead]) -> None:
    given, head = whole
    bank, corrected = maps_of(head, given.features)
    if given.target is not None:
        error = float((corrected - given.target).abs().mean())
        assert error < 0.85 * float((bank - given.target).abs().mean())
    else:
        visible = (given.masks > 0.5).float()
        assert float(_found_loss(corrected, visible)) < 0.5 * float(_found_loss(bank, visible))


def test_student_without_its_branch_is_the_memory_detector_of_its_rows(whole: tuple[Lesson, StudentHead]) -> None:
    given, head = whole
    tensors = {name: value for name, value in head.state_dict().items() if not name.startswith("branch.")}
    offset, gain = tensors.pop("offset"), tensors.pop("gain")
    memory = MemoryMethod.build(CONFIG, tensors)
    taps = [given.holdout.taps[name] for name in head.tap_names]
    with torch.inference_mode():
        bank, _ = maps_of(head, given.holdout)
        plain, rows = memory(*taps)
        torch.testing.assert_close(bank, (plain - offset) * gain)
        torch.testing.assert_close(head(*taps)[1], rows)
    # Deviations of good parts that the banks have not seen.
    assert float(bank.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(bank.std()) == pytest.approx(1.0, abs=1e-3)


def test_student_comes_back_from_its_tensors_and_others_are_refused(whole: tuple[Lesson, StudentHead]) -> None:
    given, head = whole
    tensors = head.state_dict()
    for ours, theirs in zip(
        maps_of(head, given.holdout), maps_of(Student.build(CONFIG, tensors), given.holdout), strict=True
    ):
        assert torch.equal(ours, theirs)
    for lost in ("bank_s4", "whiten_s8.weight", "branch.leave.bias", "gain"):
        with pytest.raises(DataError, match="distil again"):
            Student.build(CONFIG, {name: value for name, value in tensors.items() if name != lost})


def test_student_that_no_share_helps_ships_its_banks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(lesson(taught=False), masks=torch.ones(20, 16, 16))  # what the branch learns is wrong
    given.masks[12:, 4:6, 4:6] = 0.0
    # A weak spot, so that a wrong correction costs something.
    spoiled = features(8, 3)
    spoiled.taps["s4"][:, :, 4:6, 4:6] += 1.5
    head, shares = fit_student(replace(given, spoiled=spoiled), CONFIG, seed=0, device=CPU, progress=quiet)
    assert shares == Shares(0.0, 0.0)
    bank, corrected = maps_of(head, given.holdout)
    assert torch.equal(bank, corrected)
    monkeypatch.setattr(fitting, "SHARES", (1.0,))
    forced, _ = fit_student(replace(given, spoiled=spoiled), CONFIG, seed=0, device=CPU, progress=quiet)
    assert not torch.equal(*maps_of(forced, given.holdout))


def test_student_same_seed_same_bits_another_seed_others() -> None:
    config, given = CONFIG.model_copy(update={"steps": 5}), lesson(taught=True)
    first, again, other = (
        fit_student(given, config, seed=seed, device=CPU, progress=quiet)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_student_banks_do_not_depend_on_what_is_held_out() -> None:
    config, given = CONFIG.model_copy(update={"steps": 5}), lesson(taught=True)
    moved = replace(given, holdout=features(8, 9), spoiled=features(8, 10, spot=True))
    first, second = (fit_student(one, config, seed=0, device=CPU, progress=quiet)[0] for one in (given, moved))
    for name in ("bank_s4", "bank_s8", "bank_s16", "scales", "sites.means", "whiten_s4.weight"):
        assert torch.equal(first.state_dict()[name], second.state_dict()[name]), name


def test_shapes_of_a_trunk_without_a_stride_16_tap_are_refused() -> None:
    base = Preprocessing(height=64, width=64)
    assert len(shapes(base, trunk="lite0", blocks=[6, 11], sizes=[64, 96], rows=[8])) == 4
    with pytest.raises(UsageError, match="--blocks 5: lite0 has no tap at stride 16"):
        shapes(base, trunk="lite0", blocks=[11, 5], sizes=[64], rows=[8])


def test_scaled_keeps_crop_proportions_and_tiles_or_says_what_does_not_fit() -> None:
    base = Preprocessing(height=128, width=256, tiles=Tiles(rows=1, cols=2, overlap=64))
    half = scaled(base, 64)
    assert (half.height, half.width, half.tiles.cols, half.tiles.overlap) == (64, 128, 2, 32)
    with pytest.raises(UsageError, match="overlap by 48"):
        scaled(base, 96)
    with pytest.raises(UsageError, match="--sizes 100"):
        scaled(base, 100)
