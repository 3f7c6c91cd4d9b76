"""The fleet memory: its head against a slow reference and the box's numpy, its generator, loss and guard."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cdist

from deploy.embedding import embedding_ids
from deploy.export import export_head
from deploy.progress import no_progress
from deploy.quantize import quantize_head
from edge.bundle import Precision, Preprocessing
from edge.errors import DataError, UsageError
from edge.memory.search import anomaly_map
from trainer.methods.base import Features, FitContext, MethodConfig, Validation
from trainer.methods.feddymem import sources
from trainer.methods.feddymem.fit import FedDyMemConfig, FedDyMemMethod, recipe_of
from trainer.methods.feddymem.generator import (
    LEAST_RANK,
    Judged,
    Patches,
    Recipe,
    joined,
    project,
    raw_patches,
    train_generator,
)
from trainer.methods.feddymem.generic import GenericProduct, generic_products
from trainer.methods.feddymem.metric import MARGIN, SHARPNESS, effective_rank, metric_loss
from trainer.methods.feddymem.model import LEVELS, FedDyMemHead, Generator, level_channels, level_patches, repeated
from trainer.methods.feddymem.sources import covered, generator_of, generic_generator

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")
TAPS = (4, 5, 6)
CHANNELS = level_channels(TAPS)
GRID = (6, 8)
SHAPES = {"s4": (4, 12, 16), "s8": (5, 6, 8), "s16": (6, 3, 4)}
TINY = FedDyMemConfig(rows=20, fleet_rows=12, candidates=500, width=8)


def random_taps(n: int = 2, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *shape, generator=generator) for shape in SHAPES.values())


def random_head(seed: int = 0, smoothing: int = 0, background: float = 0.3) -> FedDyMemHead:
    head = FedDyMemHead(
        Generator(CHANNELS, 7), rows=9, fleet_rows=5, grid=GRID, smoothing=smoothing, background=background
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return head.eval().requires_grad_(requires_grad=False)


def features(n: int = 10, seed: int = 3) -> Features:
    taps = dict(zip(LEVELS, random_taps(n, seed), strict=True))
    return Features({name: tap.half() for name, tap in taps.items()}, 1, np.arange(n).astype(np.str_))


def context(of: Features, seed: int = 0) -> FitContext:
    nothing = replace(of, taps={name: tap[:0] for name, tap in of.taps.items()})
    validation = Validation(nothing, nothing, np.zeros((0, 48, 64), bool))
    images = np.zeros((0, 48, 64, 3), np.uint8)
    return FitContext(of, images, lambda tiles: features(len(tiles), 5), validation, seed, CPU, no_progress)


def three_products(*, held_out: bool, remembered: int, seen: int) -> Iterator[GenericProduct]:
    for number in range(1 if held_out else 2):
        rng = np.random.default_rng((number, int(held_out)))
        images = rng.integers(0, 256, (remembered + seen, 48, 64, 3)).astype(np.uint8)
        yield GenericProduct(str(number), images[:remembered], images[remembered:])


@pytest.fixture
def few_generic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LINEWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "generic_products", three_products)
    return tmp_path / "cache"


def extract(tiles: npt.NDArray[np.uint8]) -> Features:
    """Stand in for a trunk: means of pixels at three strides, some of them squared, in as many channels as TAPS."""
    image = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    taps = {}
    for name, width, stride in zip(LEVELS, TAPS, (4, 8, 16), strict=True):
        small = torch.nn.functional.avg_pool2d(image, stride)
        taps[name] = torch.cat([small, small * small, small.sqrt()], 1)[:, :width].half()
    return Features(taps, 1, np.arange(len(tiles)).astype(np.str_))


# The head


@pytest.mark.parametrize("smoothing", [0, 2])
def test_head_equals_its_definition(smoothing: int) -> None:
    head = random_head(smoothing=smoothing)
    with torch.inference_mode():
        found, embedding = head(*random_taps())
    rows = embedding.double().numpy()
    bank = torch.cat([head.bank_local, head.bank_fleet]).double().numpy()
    distance = cdist(rows.reshape(-1, 7), bank).min(1).reshape(2, *GRID)
    for _ in range(smoothing):
        padded = np.pad(distance, ((0, 0), (1, 1), (1, 1)))
        distance = sum(padded[:, y : y + GRID[0], x : x + GRID[1]] for y in range(3) for x in range(3)) / 9
    expected = distance - 0.3 * distance.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_equal_their_definition() -> None:
    head, (fine, middle, coarse) = random_head(), random_taps()
    cells = fine.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    coarse_mean = torch.nn.functional.avg_pool2d(coarse, 3, 1, 1)
    enlarged = torch.nn.functional.interpolate(coarse_mean, scale_factor=2.0, mode="bilinear", align_corners=False)
    parts = (torch.cat((cells.amax(4), cells.amin(4)), 1), middle, enlarged)
    generator, units = head.generator, []
    for part, centre, floor in zip(parts, generator.centre.split(CHANNELS), generator.floors, strict=True):
        away = part.double() - centre.double()[:, None, None]
        units.append(away / (away.square().sum(1, keepdim=True) + floor.double() ** 2).sqrt())
    weight, bias = generator.project.weight[:, :, 0, 0].double(), generator.project.bias.double()
    expected = torch.einsum("dc,nchw->nhwd", weight, torch.cat(units, 1)) + bias
    torch.testing.assert_close(head.embed(fine, middle, coarse), expected.flatten(1, 2).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0, 1])
def test_head_says_what_the_boxs_numpy_says(smoothing: int) -> None:
    head = random_head(smoothing=smoothing)
    with torch.inference_mode():
        found, embedding = head(*random_taps())
    for one, rows in zip(found, embedding, strict=True):
        same = anomaly_map(
            rows[None].numpy(), [head.bank_local.numpy(), head.bank_fleet.numpy()], head.memory_layout,
            Preprocessing.model_construct(height=48, width=64), 8,
        )  # fmt: skip
        assert np.abs(same - one.numpy()).max() <= 1e-3 * np.abs(same).max()


def test_banks_that_repeat_rows_change_no_distance_and_each_bank_counts() -> None:
    head, taps = random_head(), random_taps()
    rows = head.bank_local[:4].clone()
    head.set_banks(rows)
    with torch.inference_mode():
        alone, embedding = head(*taps)
        head.set_banks(rows, embedding[0, :5])
        helped = head(*taps)[0]
        head.set_banks(torch.cat([rows, embedding[0, :5]]), rows)
        elsewhere = head(*taps)[0]
    assert (helped[0] < alone[0] - 1e-3).any()
    torch.testing.assert_close(helped, elsewhere)
    distance = cdist(embedding[1].numpy(), rows.numpy()).min(1).reshape(GRID)
    np.testing.assert_allclose(alone[1], distance - 0.3 * distance.mean(), rtol=1e-3, atol=1e-3)


def test_set_banks_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="10 rows do not fit a bank of 9"):
        random_head().set_banks(torch.zeros(10, 7))
    with pytest.raises(ValueError, match="0 rows"):
        repeated(torch.zeros(0, 7), 4)


def test_an_image_does_not_depend_on_its_batch() -> None:
    head, taps = random_head(), random_taps(3)
    with torch.inference_mode():
        together, alone = head(*taps), head(*(tap[1:2] for tap in taps))
    torch.testing.assert_close(together[0][1:2], alone[0])
    torch.testing.assert_close(together[1][1:2], alone[1])


def test_a_spot_smaller_than_a_cell_reaches_the_row_undiminished() -> None:
    fine, middle, coarse = (torch.zeros(1, *shape) for shape in SHAPES.values())
    fine[0, 1, 5, 6], fine[0, 2, 5, 6] = 3.0, -2.0
    levels = level_patches(fine, middle, coarse)[0][0]
    assert (float(levels[1, 2, 3]), float(levels[4 + 2, 2, 3])) == (3.0, -2.0)
    assert float(levels.abs().sum()) == 5.0


def test_contrast_moves_a_row_less_than_another_surface_does() -> None:
    generator = random_head().generator
    with torch.no_grad():
        generator.floors.fill_(0.01)
        taps = random_taps()
        centres = generator.centre.split(CHANNELS)
        stronger = (taps[0] * 1.0, (taps[1] - centres[1][:, None, None]) * 1.5 + centres[1][:, None, None], taps[2])
        same, moved, other = (generator.joined(*t) for t in (taps, stronger, random_taps(seed=9)))
    assert float((same - moved).norm()) < 0.02 * float((same - other).norm())


def test_no_float_op_of_the_head_is_left_to_int8(tmp_path: Path) -> None:
    export_head(random_head(), tmp_path / "head.onnx", tap_shapes=SHAPES)
    feed = dict(zip(LEVELS, (tap.numpy() for tap in random_taps()), strict=True))
    named = {"state_names": FedDyMemHead.state_names}
    kept = quantize_head(tmp_path / "head.onnx", tmp_path / "i.onnx", [feed], float_ops=FedDyMemHead.float_ops, **named)
    assert kept == ()
    assert len(quantize_head(tmp_path / "head.onnx", tmp_path / "i.onnx", [feed], **named)) == 3


# The embedding's identity


def test_products_of_one_generator_share_an_embedding_id_and_others_do_not(few_generic: Path, tmp_path: Path) -> None:
    (tmp_path / "trunk").write_bytes(b"trunk")

    def identity(name: str, head: FedDyMemHead, side: int = 64) -> str:
        export_head(head, tmp_path / name, tap_shapes=SHAPES)
        return embedding_ids(
            {Precision.FLOAT32: tmp_path / "trunk"}, tmp_path / name, head.state_names,
            Preprocessing(height=side, width=64),
        )[Precision.FLOAT32]  # fmt: skip

    ways = {"rows": 30, "fleet_rows": 6, "background": 0.0, "smoothing": 1}
    first = FedDyMemMethod.fit(context(features(seed=3)), TINY)
    second = FedDyMemMethod.fit(context(features(seed=4), seed=7), TINY.model_copy(update=ways))
    other = FedDyMemMethod.fit(context(features(seed=3)), TINY.model_copy(update={"generator": "own"}))
    assert not torch.equal(first.bank_local[:5], second.bank_local[:5])
    ids = [identity(f"{i}.onnx", head) for i, head in enumerate((first, second, other))]
    assert ids[0] == ids[1] != ids[2]
    assert identity("p.onnx", first, side=96) != ids[0]
    assert few_generic.parent == tmp_path


# The loss and the guard


def test_metric_loss_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, bank, memory = (torch.rand(count, 3, generator=generator) for count in (20, 15, 4))
    radius = 0.45
    squared = np.sort(cdist(rows, bank) ** 2, 1)
    attract = np.maximum(0, squared[:, :3] - radius**2).mean()
    repel = np.maximum(0, radius**2 - squared[:, 3:6] - MARGIN).mean()
    assert min(attract, repel) > 0
    pull = (cdist(rows, memory) ** 2).min(1).mean() / 3
    found = metric_loss(rows, bank, torch.tensor(radius), pull=2.0, memory=memory)
    assert float(found) == pytest.approx((attract + repel) / SHARPNESS + 2 * pull, rel=1e-4)


def test_metric_loss_a_bank_of_few_rows_repels_with_what_there_is() -> None:
    rows = torch.rand(4, 3)
    assert torch.isfinite(metric_loss(rows, rows[:2], torch.tensor(0.1)))


def test_effective_rank_counts_the_directions_that_are_used() -> None:
    square = torch.eye(6) - 1 / 6
    assert effective_rank(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(5)
    assert effective_rank(square) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 4)) == 1.0
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)


def surfaces(count: int, seed: int) -> list[Patches]:
    """Products whose patches lie around a few centres of their own, in more directions than they need."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1.0, 0.3, sum(CHANNELS))
    found = []
    for _ in range(count):
        centres = torch.randn(40, sum(CHANNELS), generator=generator) * scale

        def drawn(n: int, centres: torch.Tensor = centres) -> torch.Tensor:
            chosen = centres[torch.randint(len(centres), (n,), generator=generator)]
            return chosen + 0.2 * scale * torch.randn(chosen.shape, generator=generator)

        found.append(Patches(drawn(100), drawn(200)))
    return found


def attraction(rows: torch.Tensor, bank: torch.Tensor, _radius: torch.Tensor, **_: object) -> torch.Tensor:
    return 1e3 * torch.cdist(rows, bank).square().amin(1).mean()


def test_pure_attraction_trips_the_guard_and_the_metric_loss_does_not() -> None:
    products, recipe = surfaces(3, seed=0), Recipe(width=8, steps=2000, rate=2e-3)
    fallen = train_generator(products, [], CHANNELS, recipe, seed=0, loss=attraction)
    assert fallen.figures["collapsed"] == 1.0
    assert 0 < fallen.figures["epoch"] < 2000 / 40
    rank = effective_rank(project(fallen.generator, joined(fallen.generator, products[0].seen)))
    assert rank >= 0.9 * LEAST_RANK * fallen.figures["rank_before"]
    held = train_generator(products, [], CHANNELS, replace(recipe, steps=200, rate=1e-3), seed=0)
    assert held.figures["collapsed"] == 0.0


def judged(seed: int) -> list[Judged]:
    (product,) = surfaces(1, seed)
    good, bad = product.seen[:192], product.seen[:192].clone()
    inside = np.zeros(384, np.bool_)
    inside[192::24] = True
    bad[::24] += 0.8
    return [Judged(product.remembered, torch.cat([good, bad]), np.arange(16) >= 8, inside)]


def test_training_keeps_the_best_epoch_by_validation() -> None:
    def noise(rows: torch.Tensor, _bank: torch.Tensor, _radius: torch.Tensor, **_: object) -> torch.Tensor:
        return (rows * torch.linspace(-1e3, 1e3, rows.shape[1])).mean()

    products = surfaces(2, seed=1)
    recipe = Recipe(width=8, steps=0)
    plain = train_generator(products, judged(5), CHANNELS, recipe, seed=0)
    spoiled = train_generator(products, judged(5), CHANNELS, replace(recipe, steps=80, rate=0.3), seed=0, loss=noise)
    assert spoiled.figures["epoch"] == 0.0
    assert spoiled.figures["score_after"] == spoiled.figures["score_before"] > 0.6
    assert torch.equal(spoiled.generator.project.weight, plain.generator.project.weight)


def test_training_the_same_seed_gives_the_same_bits() -> None:
    recipe = Recipe(width=6, steps=50, pull=0.5)
    first, again, other = (
        train_generator(surfaces(2, seed=1), [], CHANNELS, recipe, seed=seed).generator.project.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_refuses_more_channels_than_there_are() -> None:
    with pytest.raises(DataError, match="20 of 19 channels"):
        train_generator(surfaces(1, 0), [], CHANNELS, Recipe(width=20, steps=0), seed=0)


# Where a generator comes from


def test_generic_generator_is_made_once_whatever_the_run(few_generic: Path) -> None:
    calls = []

    def counted(tiles: npt.NDArray[np.uint8]) -> Features:
        calls.append(len(tiles))
        return extract(tiles)

    recipe = recipe_of(TINY)
    first = generic_generator(counted, recipe, trunk_id="t", progress=no_progress)
    made = len(calls)
    again = generic_generator(counted, recipe, trunk_id="t", progress=no_progress)
    assert (made, len(calls)) == (4, 4)
    assert first.figures == again.figures
    for name, value in first.generator.state_dict().items():
        assert torch.equal(value, again.generator.state_dict()[name])
    generic_generator(counted, recipe, trunk_id="another", progress=no_progress)
    generic_generator(counted, replace(recipe, width=7), trunk_id="t", progress=no_progress)
    generic_generator(counted, recipe, trunk_id="", progress=no_progress)
    assert len(calls) == 16
    assert len(list((few_generic / "generators").iterdir())) == 3


def test_generic_generator_a_damaged_cache_is_made_again(few_generic: Path) -> None:
    recipe = recipe_of(TINY)
    first = generic_generator(extract, recipe, trunk_id="t", progress=no_progress)
    (file,) = (few_generic / "generators").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-7], whole[:-3] + b"xyz"):
        file.write_bytes(damaged)
        again = generic_generator(extract, recipe, trunk_id="t", progress=no_progress)
        assert torch.equal(again.generator.project.weight, first.generator.project.weight)
        assert file.read_bytes() == whole


def test_generic_generator_an_unusable_cache_is_named(few_generic: Path) -> None:
    few_generic.write_bytes(b"a file")
    with pytest.raises(DataError, match="LINEWARD_CACHE"):
        generic_generator(extract, recipe_of(TINY), trunk_id="t", progress=no_progress)


@pytest.mark.usefixtures("few_generic")
def test_generic_generator_with_the_metric_loss_reports_its_choice() -> None:
    found = generic_generator(extract, Recipe(width=6, steps=45), trunk_id="t", progress=no_progress).figures
    assert set(found) == {"rank_before", "rank_after", "score_before", "score_after", "epoch", "collapsed"}
    assert found["score_after"] >= found["score_before"]


def test_generic_products_are_the_same_at_every_call_and_never_the_examples() -> None:
    first, again = (next(iter(generic_products(held_out=False, remembered=2, seen=1))) for _ in range(2))
    assert np.array_equal(first.remembered, again.remembered)
    assert first.remembered.shape == (2, 224, 224, 3)
    assert first.seen.shape == (1, 224, 224, 3)
    trained, held = ({p.name for p in generic_products(held_out=h, remembered=1, seen=1)} for h in (False, True))
    photographs = [{name for name in names if "." in name} for names in (trained, held)]
    assert photographs[0]
    assert not photographs[0] & photographs[1]
    assert not any(name.startswith(("brick", "grass", "gravel")) for name in trained | held)


def test_generator_of_another_run_is_taken_bit_for_bit(few_generic: Path, tmp_path: Path) -> None:
    own = TINY.model_copy(update={"generator": "own"})
    first = FedDyMemMethod.fit(context(features(seed=3)), own)
    run = tmp_path / "run"
    run.mkdir()
    save_file(first.state_dict(), run / "head.safetensors")
    second = FedDyMemMethod.fit(context(features(seed=4)), TINY.model_copy(update={"generator": str(run)}))
    for name, value in first.generator.state_dict().items():
        assert torch.equal(value, second.generator.state_dict()[name])
    with pytest.raises(DataError, match="holds no generator for taps of"):
        generator_of(run, (8, 5, 7))
    with pytest.raises(DataError, match="give generator=RUN"):
        generator_of(tmp_path / "none", CHANNELS)
    assert not few_generic.exists()


# Fitting


@pytest.mark.usefixtures("few_generic")
def test_fit_bank_holds_averages_of_the_products_rows_and_the_fleets_repeats_them() -> None:
    of = features()
    head = FedDyMemMethod.fit(context(of), TINY)
    assert head.bank_local.shape == (20, 8)
    assert head.bank_fleet.shape == (12, 8)
    assert torch.equal(head.bank_fleet, head.bank_local[:12])
    rows = project(head.generator, joined(head.generator, raw_patches(of)))
    assert float(torch.cdist(rows, head.bank_local).amin(1).mean()) < float(
        torch.cdist(rows, rows.mean(0)[None]).mean()
    )


@pytest.mark.usefixtures("few_generic")
def test_fit_fewer_patches_than_rows_fill_the_bank_by_repeating() -> None:
    head = FedDyMemMethod.fit(context(features(2)), TINY.model_copy(update={"rows": 200}))
    assert len(torch.unique(head.bank_local, dim=0)) <= 96
    assert torch.equal(head.bank_local[96:], head.bank_local[:104])


@pytest.mark.usefixtures("few_generic")
def test_fit_refuses_features_that_are_not_finite() -> None:
    of = features()
    of.taps["s8"][3, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        FedDyMemMethod.fit(context(of), TINY)


@pytest.mark.usefixtures("few_generic")
def test_build_gives_the_same_head_and_refuses_foreign_tensors() -> None:
    head = FedDyMemMethod.fit(context(features()), TINY)
    tensors = head.state_dict()
    again = FedDyMemMethod.build(TINY, tensors)
    assert again.memory_layout == head.memory_layout
    for first, second in zip(head(*random_taps()), again(*random_taps()), strict=True):
        assert torch.equal(first, second)
    for missing in ("bank_local", "grid", "generator.project.weight"):
        with pytest.raises(DataError, match="train again"):
            FedDyMemMethod.build(TINY, {name: value for name, value in tensors.items() if name != missing})


def test_another_methods_settings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"FedDyMemMethod\.config"):
        FedDyMemMethod.fit(context(features()), MethodConfig())


def test_a_pull_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="set metric_steps"):
        FedDyMemConfig(pull=1.0)
    assert recipe_of(FedDyMemConfig(pull=1.0, metric_steps=9)) == Recipe(width=96, steps=9, pull=1.0)


def test_covered_counts_patches_that_are_at_least_half_hidden() -> None:
    masks = np.zeros((2, 16, 24), np.bool_)
    masks[1, :4, 8:16] = True
    masks[1, 8:11, :8] = True
    assert covered(masks).tolist() == [*[False] * 6, False, True, False, False, False, False]
