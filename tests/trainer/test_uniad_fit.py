"""Fitting UniAD: what its settings switch off, how often products are seen, and that nothing else decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy.progress import no_progress
from edge.errors import DataError, UsageError
from trainer.fit import configured
from trainer.methods.base import Features as Taps
from trainer.methods.base import FitContext, Validation
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.uniad.fit import (
    PLACE_PRIOR,
    UniADConfig,
    UniADMethod,
    orders,
    place_level,
    shares,
    standardisation,
)
from trainer.methods.uniad.model import Features, Sampling

GRID = (4, 5)
CHANNELS = {"s2": 3, "s4": 4, "s8": 5, "s16": 6}
SMALL = {"width": 16, "layers": 1, "heads": 2, "hidden": 16, "steps": 3, "batch_tiles": 4}


def taps(n: int, seed: int = 0) -> Taps:
    drawn = torch.Generator().manual_seed(seed)
    found = {
        name: torch.randn(n, count, GRID[0] * factor, GRID[1] * factor, generator=drawn).half()
        for (name, count), factor in zip(CHANNELS.items(), (8, 4, 2, 1), strict=True)
    }
    return Taps(found, 1, np.arange(n).astype(np.str_))


def context(features: Taps, seed: int = 0) -> FitContext:
    def never(_: object) -> Taps:
        raise AssertionError("uniad sees no further images")

    return FitContext(
        features=features,
        images=np.zeros((len(features), 1, 1, 3), np.uint8),
        extract=never,
        validation=Validation(features, features, np.zeros((len(features), 1, 1), np.bool_)),
        seed=seed,
        device=torch.device("cpu"),
        progress=no_progress,
    )


def settings(**changes: object) -> UniADConfig:
    config = configured(UniADMethod.config("quick"), "uniad", {**SMALL, **changes})
    assert isinstance(config, UniADConfig)
    return config


def test_hidden_square_noise_and_queries_can_be_switched_off_from_the_command_line() -> None:
    usual = UniADMethod.fit(context(taps(6)), settings())
    assert (usual.reconstructor.mask < 0).any()
    off = UniADMethod.fit(context(taps(6)), settings(neighbours="0", jitter="0", queries="false"))
    assert not off.reconstructor.mask.any()
    assert all(layer.table is None for layer in off.reconstructor.decoder)
    tensors = off.state_dict()
    again = UniADMethod.build(settings(neighbours="0", jitter="0", queries="false"), tensors)
    one = [tap.float() for tap in taps(2, seed=1).taps.values()]
    assert torch.equal(off(*one)[0], again(*one)[0])


@pytest.mark.parametrize("sampling", list(Sampling))
def test_a_fitted_head_comes_back_with_its_sampling(sampling: Sampling) -> None:
    config = settings(sampling=sampling.value)
    head = UniADMethod.fit(context(taps(6)), config)
    again = UniADMethod.build(config, head.state_dict())
    one = [tap.float() for tap in taps(2, seed=1).taps.values()]
    assert torch.equal(head(*one)[0], again(*one)[0])
    other = next(each for each in Sampling if each is not sampling)
    assert not torch.equal(head(*one)[0], UniADMethod.build(settings(sampling=other), head.state_dict())(*one)[0])


def test_mean_sampling_sees_what_lies_between_the_samples() -> None:
    maps = [torch.zeros(1, 1, GRID[0] * factor, GRID[1] * factor) for factor in (8, 4, 2, 1)]
    maps[0][..., 11, 13] = 64.0
    assert Features(GRID, Sampling.MEAN)(*maps)[0, :, 0].tolist() == [0.0] * 6 + [1.0] + [0.0] * 13
    assert not Features(GRID, Sampling.ALIGNED)(*maps).any()


def test_nothing_but_the_runs_seed_decides() -> None:
    heads = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        heads.append(UniADMethod.fit(context(taps(6)), settings(dropout=0.5)).state_dict())
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(noise))
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    other = UniADMethod.fit(context(taps(6), seed=1), settings(dropout=0.5)).state_dict()
    assert any(not torch.equal(heads[0][name], other[name]) for name in other)


def test_standardised_tokens_have_mean_0_and_deviation_1_and_a_constant_channel_its_units() -> None:
    tokens = torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(0)) * 7 + 3
    tokens[..., 2] = 4.0
    mean, scale = standardisation(tokens.half())
    found = ((tokens.half().float() - mean) * scale).flatten(0, 1)
    assert found.mean(0).abs().max() < 1e-4
    kept = [channel for channel in range(6) if channel != 2]
    assert torch.allclose(found[:, kept].std(0, correction=0), torch.ones(5), atol=1e-3)
    assert scale[2] == 1


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), balance=st.floats(0, 1), seed=st.integers(0, 2**32 - 1)
)
def test_products_are_drawn_in_proportion_to_a_power_of_their_tiles(
    counts: list[int], balance: float, seed: int
) -> None:
    products = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    drawn = shares(products, len(products), balance)
    assert float(drawn.mean()) == pytest.approx(1)
    totals = np.bincount(products, weights=drawn)
    wanted = np.array(counts, float) ** (1 - balance)
    assert totals / totals.sum() == pytest.approx(wanted / wanted.sum())
    # One pass: no tile is more than one time off its share.
    order = orders(drawn, len(drawn) * (len(drawn) + 1), torch.Generator().manual_seed(seed))
    times = torch.bincount(next(order), minlength=len(drawn))
    assert ((times - drawn).abs() < 1).all()


def test_one_product_shows_every_tile_once_a_pass() -> None:
    order = orders(shares(None, 7, 1.0), 7, torch.Generator().manual_seed(3))
    for _ in range(3):
        assert sorted(next(order).tolist()) == list(range(7))


class Nothing(torch.nn.Module):
    """Rebuilds everything as 0."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tokens)


def test_level_of_a_place_is_the_mean_distance_of_good_tokens_drawn_to_the_mean_of_all() -> None:
    tokens = torch.zeros(4, 2, 1)
    tokens[:, 0], tokens[:, 1] = 1.0, 3.0
    level = place_level(Nothing(), lambda rows: tokens[rows], torch.ones(4).double())
    wanted = torch.tensor([4 * 1.0 + PLACE_PRIOR * 2.0, 4 * 3.0 + PLACE_PRIOR * 2.0]) / (4 + PLACE_PRIOR) / 2
    assert torch.allclose(level, wanted)
    counted = torch.tensor([4.0, 0.0, 0.0, 0.0]).double()
    tokens[1:, 0] = 50.0  # of no share
    assert torch.allclose(place_level(Nothing(), lambda rows: tokens[rows], counted), wanted)


def test_map_is_divided_by_the_level_of_its_place_unless_that_is_off() -> None:
    head = UniADMethod.fit(context(taps(6)), settings())
    assert float(head.level.mean()) == pytest.approx(1)
    assert head.level.std() > 0
    one = [tap.float() for tap in taps(2, seed=1).taps.values()]
    before = head(*one)[0]
    head.level *= 2
    assert torch.allclose(head(*one)[0], before / 2)
    assert torch.equal(UniADMethod.fit(context(taps(6)), settings(places="false")).level, torch.ones(GRID))


def test_training_that_diverges_is_refused_with_its_step() -> None:
    with pytest.raises(UsageError, match=r"diverged at step \d+; lower --set rate"):
        UniADMethod.fit(context(taps(6)), settings(rate=1e30, steps=20))


def test_features_that_are_not_finite_and_none_at_all_are_refused() -> None:
    broken = taps(6)
    broken.taps["s8"][3, 2, 1, 1] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        UniADMethod.fit(context(broken), settings())
    with pytest.raises(DataError, match="no training features"):
        UniADMethod.fit(context(taps(0)), settings())


def test_settings_of_another_method_and_an_unknown_preset_are_refused() -> None:
    with pytest.raises(UsageError, match="uniad cannot use a MemoryConfig"):
        UniADMethod.fit(context(taps(6)), MemoryMethod.config("quick"))
    with pytest.raises(UsageError, match="--preset huge"):
        UniADMethod.config("huge")


def test_tensors_of_another_head_are_refused() -> None:
    with pytest.raises(DataError, match="no UniAD head"):
        UniADMethod.build(settings(), {"bank": torch.zeros(3)})


def test_full_preset_is_the_papers_size() -> None:
    full = UniADMethod.config("full")
    assert (full.width, full.layers, full.heads, full.hidden) == (256, 4, 8, 1024)
