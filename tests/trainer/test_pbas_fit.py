"""Training of PBAS on photographs of textures: what each of its parts is for, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import roc_auc_score

from edge.errors import DataError, UsageError
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.methods.base import Features, FitContext, Head, MethodConfig, Validation
from trainer.methods.pbas.boundary import Direction, nearest_centre
from trainer.methods.pbas.fit import PbasConfig, PbasMethod, _losses, initial_centres, patch_rows, train
from trainer.methods.pbas.model import TAP_NAMES, PbasHead, PbasNetwork

SIDE = 128
CELLS = SIDE // 8
CPU = torch.device("cpu")
BRIEF = PbasConfig(
    steps=72,
    batch_rows=1024,
    k=0.25,
    standardise=False,
    centre_weight=0.05,
    projector_rate=1e-3,
    discriminator_rate=2e-3,
)  # pinned: these tests are of the method's parts, not of its defaults


def as_features(images: list[npt.NDArray[np.uint8]], tiles: int = 1) -> Features:
    trunk = lite0_trunk().eval()
    with torch.inference_mode():
        taps = dict(zip(trunk.tap_names, trunk(torch.from_numpy(np.stack(images))), strict=True))
    groups = np.array([f"image{i}" for i in range(len(images) // tiles)])
    return Features({name: taps[name].half() for name in TAP_NAMES}, tiles, groups)


def crops(photograph: str, rows: slice, count: int, rng: np.random.Generator) -> list[npt.NDArray[np.uint8]]:
    from skimage import data

    image = getattr(data, photograph)()[rows]
    corners = [(rng.integers(image.shape[0] - SIDE + 1), rng.integers(image.shape[1] - SIDE + 1)) for _ in range(count)]
    return [np.repeat(image[y : y + SIDE, x : x + SIDE, None], 3, axis=2) for y, x in corners]


@dataclass(frozen=True)
class Texture:
    """Good crops of the upper part of a photograph, and of the lower part with a foreign patch pasted in."""

    train: Features
    good: Features
    defective: Features
    cells: npt.NDArray[np.bool_]


@lru_cache(maxsize=3)
def texture(photograph: str) -> Texture:
    rng = np.random.default_rng(7)
    good = crops(photograph, slice(320, 512), 12, rng)
    foreign = crops("gravel" if photograph != "gravel" else "grass", slice(0, 512), 12, rng)
    defective, cells = [], np.zeros((12, CELLS, CELLS), bool)
    for index, (image, other) in enumerate(zip(good, foreign, strict=True)):
        y, x = rng.integers(2, CELLS - 5, size=2)
        cells[index, y : y + 3, x : x + 3] = True
        spot = np.repeat(np.repeat(cells[index], 8, 0), 8, 1)[..., None]
        defective.append(np.where(spot, other, image))
    return Texture(
        as_features(crops(photograph, slice(0, 320), 24, rng)), as_features(good), as_features(defective), cells
    )


def context(features: Features, seed: int = 0, steps: list[tuple[str, int, int]] | None = None) -> FitContext:
    nothing = replace(features, taps={name: tap[:0] for name, tap in features.taps.items()})
    calls = [] if steps is None else steps
    return FitContext(
        features=features,
        images=np.zeros((0, SIDE, SIDE, 3), np.uint8),
        extract=lambda _tiles: nothing,
        validation=Validation(nothing, nothing, np.zeros((0, SIDE, SIDE), bool)),
        seed=seed,
        device=CPU,
        progress=lambda *call: calls.append(call),
    )


def maps(head: Head, features: Features) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.concatenate([head(*taps)[0].numpy() for taps in features.batches(TAP_NAMES, 8, device=CPU)])


def pixel_auroc(config: PbasConfig, photograph: str = "brick", seed: int = 0) -> float:
    data = texture(photograph)
    head = PbasMethod.fit(context(data.train, seed), config)
    return float(roc_auc_score(data.cells.ravel(), maps(head, data.defective).ravel()))


@lru_cache(maxsize=1)
def brief_auroc() -> float:
    return pixel_auroc(BRIEF)


def test_fit_finds_foreign_patches() -> None:
    data = texture("brick")
    head = PbasMethod.fit(context(data.train), BRIEF)
    good, defective = maps(head, data.good), maps(head, data.defective)
    scores = np.concatenate([good, defective]).max((1, 2))
    assert roc_auc_score(np.repeat([0, 1], 12), scores) > 0.9
    assert roc_auc_score(data.cells.ravel(), defective.ravel()) > 0.9
    assert not head.training


def test_fit_same_seed_gives_the_same_bits() -> None:
    data = texture("brick")
    config = BRIEF.model_copy(update={"steps": 5})
    first, again, other = (PbasMethod.fit(context(data.train, seed), config).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["from_s8.weight"], other["from_s8.weight"])


def test_fit_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    PbasMethod.fit(context(texture("brick").train), BRIEF.model_copy(update={"steps": 2}))
    assert torch.equal(torch.rand(3), expected)


def test_direction_outward_beats_random() -> None:
    random = pixel_auroc(BRIEF.model_copy(update={"direction": Direction.RANDOM}))
    assert brief_auroc() >= random + 0.05


def test_centre_loss_shrinks_the_radius_and_its_absence_lets_it_grow() -> None:
    data = texture("brick")
    held = train(context(data.train), BRIEF).radii
    free = train(context(data.train), BRIEF.model_copy(update={"centre_weight": 0.0})).radii
    epochs = np.array(held).reshape(6, -1).mean(1)
    assert (np.diff(epochs) < 0).all()
    assert np.mean(free[-12:]) > np.mean(free[:12])


def test_k_too_small_collapses_and_large_k_is_a_plateau() -> None:
    small, large = (pixel_auroc(BRIEF.model_copy(update={"k": k})) for k in (0.01, 0.5))
    assert small < brief_auroc() - 0.05
    assert abs(large - brief_auroc()) < 0.05


def shifted_tiles() -> Features:
    """One tile and its copies moved by one cell at a time: a part that never lies quite still."""
    generator = torch.Generator().manual_seed(5)
    s8, s16 = torch.randn(1, 40, 16, 16, generator=generator), torch.randn(1, 112, 8, 8, generator=generator)
    moves = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    return Features(
        taps={
            "s8": torch.cat([s8.roll((2 * dy, 2 * dx), (2, 3)) for dy, dx in moves]),
            "s16": torch.cat([s16.roll((dy, dx), (2, 3)) for dy, dx in moves]),
        },
        tiles_per_image=1,
        groups=np.array([str(move) for move in moves]),
    )


def test_centre_alignment_follows_a_moved_part() -> None:
    features = shifted_tiles()
    distance = {}
    for alignment in (True, False):
        config = PbasConfig(alignment=alignment, batch_tiles=1)
        network = PbasNetwork(torch.Generator().manual_seed(0))
        centres = initial_centres(network, features, config, generator=torch.Generator().manual_seed(1), device=CPU)
        assert centres.shape == (16 * 16, 152)
        with torch.no_grad():
            rows = network.projector(patch_rows(next(features.batches(TAP_NAMES, 25, device=CPU))))
        distance[alignment] = (rows - centres[nearest_centre(rows, centres)]).norm(dim=1).mean()
    assert distance[True] < 0.9 * distance[False]


@pytest.mark.parametrize("refinement", [True, False])
def test_refinement_alone_lets_the_classification_move_the_projector(*, refinement: bool) -> None:
    config = PbasConfig(refinement=refinement)
    generator = torch.Generator().manual_seed(0)
    network = PbasNetwork(generator)
    rows, centres = torch.randn(64, 152, generator=generator), torch.randn(16, 152, generator=generator)
    _losses(network, rows, centres, config, generator)[1].backward()
    assert (network.projector.linear.weight.grad is not None) == refinement
    assert network.discriminator.hidden.weight.grad is not None


def test_centres_are_what_they_were_before_the_first_step() -> None:
    features = texture("brick").train
    brief, longer = (train(context(features), BRIEF.model_copy(update={"steps": s})) for s in (1, 8))
    assert torch.equal(brief.centres, longer.centres)


def test_scores_need_no_centres() -> None:
    data = texture("brick")
    fitted = train(context(data.train), BRIEF.model_copy(update={"steps": 3}))
    head = PbasHead.fold(fitted.network, 0.0)
    with torch.inference_mode():
        reference = torch.cat([fitted.network(*t) for t in data.good.batches(TAP_NAMES, 8, device=CPU)]).numpy()
    fitted.centres.fill_(float("nan"))
    np.testing.assert_allclose(maps(head, data.good), reference, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("images", [1, 4])
def test_fit_few_images_work(images: int) -> None:
    data = texture("brick")
    few = replace(data.train, taps={name: tap[:images] for name, tap in data.train.taps.items()})
    head = PbasMethod.fit(context(few), BRIEF.model_copy(update={"steps": 40}))
    defective = maps(head, data.defective)
    assert np.isfinite(defective).all()
    # One image of 40 steps is a thin lesson: better than chance is what can be asked of it.
    assert roc_auc_score(data.cells.ravel(), defective.ravel()) > (0.7 if images > 1 else 0.55)


def test_fit_tiles_of_one_image_share_a_grid() -> None:
    data = texture("brick")
    tiled = Features(data.train.taps, tiles_per_image=4, groups=data.train.groups[:6])
    fitted = train(context(tiled), BRIEF.model_copy(update={"steps": 2}))
    assert fitted.centres.shape == (CELLS * CELLS, 152)


def test_fit_a_channel_that_never_varies_stays_finite() -> None:
    data = texture("brick")
    flat = {name: tap.clone() for name, tap in data.train.taps.items()}
    flat["s8"][:, 3] = 2.5
    head = PbasMethod.fit(context(replace(data.train, taps=flat)), BRIEF.model_copy(update={"steps": 5}))
    assert np.isfinite(maps(head, data.defective)).all()


def test_fit_progress_counts_to_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    PbasMethod.fit(context(texture("brick").train, steps=calls), BRIEF.model_copy(update={"steps": 4}))
    assert [call[1:] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fit_features_that_are_not_finite_are_refused(value: float) -> None:
    data = texture("brick")
    broken = {name: tap.clone() for name, tap in data.train.taps.items()}
    broken["s16"][3, 5, 2, 2] = value
    with pytest.raises(DataError, match="not finite"):
        PbasMethod.fit(context(replace(data.train, taps=broken)), BRIEF)


def test_fit_no_features_are_refused() -> None:
    data = texture("brick")
    empty = replace(data.train, taps={name: tap[:0] for name, tap in data.train.taps.items()})
    with pytest.raises(DataError, match="at least one good image"):
        PbasMethod.fit(context(empty), BRIEF)


def test_fit_divergence_names_the_cure() -> None:
    config = BRIEF.model_copy(update={"projector_rate": 1e30, "discriminator_rate": 1e30})
    with pytest.raises(UsageError, match="lower projector_rate"):
        PbasMethod.fit(context(texture("brick").train), config)


def test_config_presets_differ_and_unknown_ones_are_refused() -> None:
    quick, full = PbasMethod.config("quick"), PbasMethod.config("full")
    assert full.batch_rows > quick.batch_rows
    assert PbasConfig.model_validate(quick.model_dump(mode="json")) == quick
    with pytest.raises(UsageError, match="preset"):
        PbasMethod.config("fast")


def test_fit_a_foreign_config_is_refused() -> None:
    with pytest.raises(UsageError, match="MethodConfig"):
        PbasMethod.fit(context(texture("brick").train), MethodConfig())


@pytest.mark.slow
@pytest.mark.parametrize("photograph", ["brick", "gravel"])
def test_direction_outward_beats_random_on_most_seeds(photograph: str) -> None:
    random = BRIEF.model_copy(update={"direction": Direction.RANDOM})
    wins = [pixel_auroc(BRIEF, photograph, s) >= pixel_auroc(random, photograph, s) + 0.05 for s in range(3)]
    assert sum(wins) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_centre_loss_holds_the_radius_on_every_seed(seed: int) -> None:
    data = texture("gravel")
    held = np.array(train(context(data.train, seed), BRIEF).radii).reshape(6, -1).mean(1)
    free = train(context(data.train, seed), BRIEF.model_copy(update={"centre_weight": 0.0})).radii
    assert (np.diff(held) < 0).all()
    assert np.mean(free[-12:]) > np.mean(free[:12])
