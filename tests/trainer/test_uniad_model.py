"""UniAD's network: what each site may see, that nothing can be copied, and its noise; in torch and in both engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from trainer.methods.uniad.model import (
    Attention,
    DecoderLayer,
    Features,
    Reconstructor,
    UniADHead,
    jitter,
    neighbour_mask,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

GRID = (6, 7)
SITES = GRID[0] * GRID[1]
CHANNELS = 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes: int | bool) -> Reconstructor:
    sizes = {"width": 16, "layers": 2, "heads": 4, "hidden": 32, "neighbours": 3} | changes
    network = Reconstructor(grid=GRID, channels=CHANNELS, **sizes)  # type: ignore[arg-type]
    network.initialise(generator())
    return network.eval()


def near(site: int, reach: int) -> list[int]:
    row, column = divmod(site, GRID[1])
    return [
        r * GRID[1] + c
        for r in range(max(0, row - reach), min(GRID[0], row + reach + 1))
        for c in range(max(0, column - reach), min(GRID[1], column + reach + 1))
    ]


@given(height=st.integers(1, 9), width=st.integers(1, 9), reach=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_site_sees_something_or_the_mask_is_refused(height: int, width: int, reach: int) -> None:
    side = 2 * reach + 1
    blind = (height - 1) // 2 <= reach >= height // 2 and (width - 1) // 2 <= reach >= width // 2
    if blind:
        with pytest.raises(DataError, match="see nothing"):
            neighbour_mask((height, width), side)
        return
    hidden = neighbour_mask((height, width), side) < 0
    assert hidden.diagonal().all()
    assert not hidden.all(1).any()
    assert torch.equal(hidden, hidden.T)


def test_hidden_square_of_the_paper_covers_a_fifth_of_all_pairs() -> None:
    hidden = neighbour_mask((14, 14), 7) < 0
    assert int(hidden[7 * 14 + 7].sum()) == 49
    assert int(hidden[0].sum()) == 16
    assert float(hidden.float().mean()) == pytest.approx(0.193, abs=5e-4)


@pytest.mark.parametrize("neighbours", [2, -1, 4])
def test_square_without_a_middle_is_refused(neighbours: int) -> None:
    with pytest.raises(DataError, match="odd side"):
        neighbour_mask(GRID, neighbours)


def test_grid_whose_middle_sees_nothing_is_refused_and_gives_no_nan() -> None:
    with pytest.raises(DataError, match="see nothing"):
        Reconstructor(grid=(7, 7), channels=8, width=16, layers=1, heads=2, hidden=8, neighbours=7)


def test_attention_gives_hidden_keys_a_weight_of_exactly_nothing() -> None:
    network = small()
    x = torch.randn(2, SITES, 16, generator=generator(1)) * 5
    for part in network.modules():
        if isinstance(part, Attention):
            weights = part.weights(x, x, network.mask)
            for site in range(SITES):
                assert torch.all(weights[:, :, site, near(site, 1)] == 0)
            assert torch.allclose(weights.sum(-1), torch.ones(()))


@pytest.mark.parametrize("site", [0, 10, 24, SITES - 1])
def test_one_masked_attention_does_not_depend_on_what_is_hidden(site: int) -> None:
    network = small()
    attention = next(part for part in network.modules() if isinstance(part, Attention))
    query = torch.randn(1, SITES, 16, generator=generator(2))
    keys = torch.randn(1, SITES, 16, generator=generator(3))
    other = keys.clone()
    other[:, near(site, 1)] = 100.0
    first, second = (attention(query, one, one, network.mask)[0, site] for one in (keys, other))
    assert torch.equal(first, second)
    outside = next(s for s in range(SITES) if s not in near(site, 1))
    other[:, outside] = 100.0
    assert not torch.equal(first, attention(query, other, other, network.mask)[0, site])


def test_nothing_of_the_image_reaches_the_output_but_as_values_of_attention() -> None:
    network = small()
    for part in network.decoder:
        assert isinstance(part, DecoderLayer)
        for attention in (part.memory_attention, part.before_attention):
            torch.nn.init.zeros_(attention.value.weight)
    a, b = (network(torch.randn(1, SITES, CHANNELS, generator=generator(seed))) for seed in (4, 5))
    assert torch.equal(a, b)
    plain = small(queries=False)
    for part in plain.decoder:
        torch.nn.init.zeros_(part.memory_attention.value.weight)
        torch.nn.init.zeros_(part.before_attention.value.weight)
    a, b = (plain(torch.randn(1, SITES, CHANNELS, generator=generator(seed))) for seed in (4, 5))
    assert not torch.equal(a, b), "the control copies along its residual path"


def test_every_decoder_layer_has_a_query_table_of_its_own() -> None:
    tables = [tensor for name, tensor in small(layers=3).state_dict().items() if name.endswith(".table")]
    assert [tuple(table.shape) for table in tables] == [(SITES, 16)] * 3
    assert not torch.equal(tables[0], tables[1])


def test_paper_size_has_exactly_as_many_parameters_as_the_original() -> None:
    network = Reconstructor(grid=(14, 14), channels=272, width=256, layers=4, heads=8, hidden=1024, neighbours=7)
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_717_392


def test_place_is_its_columns_half_then_its_rows() -> None:
    network = small()
    place = network.place().reshape(*GRID, 16)
    assert torch.equal(place[2, 3], torch.cat([network.columns[3], network.rows[2]]))


@pytest.mark.parametrize("scale", [4.0, 16.8])
def test_noise_is_in_proportion_to_each_token(scale: float) -> None:
    tokens = torch.randn(3, 500, 192, generator=generator(6)) * torch.rand(3, 500, 1, generator=generator(7)) * 9
    noise = jitter(tokens, scale, generator(8)) - tokens
    share = noise.square().mean(2).sqrt() / tokens.square().mean(2).sqrt()
    assert float(share.mean()) == pytest.approx(scale / 192**0.5, rel=0.02)
    assert float(share.std() / share.mean()) < 0.1
    assert torch.equal(jitter(tokens, 0.0, generator()), tokens)


def test_taps_are_sampled_with_aligned_corners() -> None:
    row = torch.arange(8.0).expand(1, 1, 8, 8)
    tokens = Features((4, 4))(row, torch.zeros(1, 2, 4, 4))
    assert tokens.shape == (1, 16, 3)
    assert tokens[0, :4, 0].tolist() == pytest.approx([0.0, 7 / 3, 14 / 3, 7.0])


def taps(n: int, channels: Sequence[int] = (4, 6, 6, 8), seed: int = 9) -> tuple[torch.Tensor, ...]:
    drawn = generator(seed)
    return tuple(
        torch.randn(n, count, GRID[0] * factor, GRID[1] * factor, generator=drawn)
        for count, factor in zip(channels, (8, 4, 2, 1), strict=True)
    )


def head() -> UniADHead:
    return (
        UniADHead(small(), torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.ones(GRID))
        .eval()
        .requires_grad_(requires_grad=False)
    )


def test_map_does_not_depend_on_what_else_is_in_the_batch() -> None:
    one, many = head(), taps(5)
    (together,) = one(*many)
    assert together.shape == (5, GRID[0] * 2, GRID[1] * 2)
    (alone,) = one(*(tap[3:4] for tap in many))
    assert torch.allclose(together[3:4], alone, atol=1e-5)
    assert torch.isfinite(together).all()


def test_flat_taps_give_a_finite_map() -> None:
    (found,) = head()(*(torch.zeros_like(tap) for tap in taps(1)))
    assert torch.isfinite(found).all()
