"""How a memory's bank is reduced and rounded: settings of the fit, and what they change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from edge.memory.rows import RowsPrecision, encode_rows, round_rows
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.memory.fit import MemoryConfig, MemoryMethod
from trainer.methods.memory.model import LEVELS, MemoryHead
from trainer.methods.memory.reduce import Reduction

CPU = torch.device("cpu")
SIDES = {"s4": (24, 16), "s8": (40, 8), "s16": (112, 4)}

PRECISIONS = (RowsPrecision.FLOAT32, RowsPrecision.INT8)
"""What a bank may be stored in; float16 is for what is no bank of a memory."""


def features(seed: int, count: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    kinds = {name: torch.randn(12, width, generator=generator) for name, (width, _) in SIDES.items()}
    taps = {}
    for name, (width, side) in SIDES.items():
        kind = torch.randint(12, (count, side, side), generator=generator)
        noise = 0.2 * torch.randn(count, side, side, width, generator=generator)
        taps[name] = (kinds[name][kind] + noise).permute(0, 3, 1, 2).half()
    return Features(taps, 1, np.array([str(i) for i in range(count)]))


def fit(config: MemoryConfig, seed: int = 0) -> MemoryHead:
    train = features(1, 10)
    nothing = Features({name: tap[:0] for name, tap in train.taps.items()}, 1, np.array([], np.str_))
    validation = Validation(nothing, nothing, np.zeros((0, 64, 64), bool))
    context = FitContext(
        features=train,
        validation=validation,
        seed=seed,
        device=CPU,
        progress=lambda *_call: None,
        images=np.zeros((10, 64, 64, 3), np.uint8),
        extract=lambda _tiles: nothing,
    )
    return MemoryMethod.fit(context, config)


def maps(head: MemoryHead) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([head(*taps)[0] for taps in features(2, 6).batches(LEVELS, 8, device=CPU)])


def patches(head: MemoryHead, name: str) -> torch.Tensor:
    with torch.inference_mode():
        white = head.whitened(name, features(1, 10).taps[name].float())
    return white.permute(0, 2, 3, 1).flatten(0, 2)


def mean_squared(head: MemoryHead, name: str) -> float:
    return float(
        torch.cdist(patches(head, name).double(), head.get_buffer(f"bank_{name}").double()).min(1)[0].square().mean()
    )


def test_a_coreset_holds_patches_as_they_are() -> None:
    head = fit(MemoryConfig(rows=40, reduction=Reduction.CORESET))
    for name in LEVELS:
        away = torch.cdist(head.get_buffer(f"bank_{name}"), patches(head, name)).min(1)[0]
        assert float(away.max()) < 1e-2  # a matrix product in another order


@pytest.mark.parametrize("name", LEVELS)
def test_kmeans_is_nearer_to_good_patches_than_weighted_and_weighted_than_coreset(name: str) -> None:
    lost = {kind: mean_squared(fit(MemoryConfig(rows=40, reduction=kind)), name) for kind in Reduction}
    assert lost[Reduction.KMEANS] < lost[Reduction.WEIGHTED] < lost[Reduction.CORESET]


@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_seed_gives_the_same_bits(reduction: Reduction, precision: RowsPrecision) -> None:
    config = MemoryConfig(rows=40, reduction=reduction, rows_precision=precision)
    first, again, other = (fit(config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["bank_s8"], other["bank_s8"])


def test_int8_rows_are_on_their_grid_and_hardly_move_the_map() -> None:
    plain, rounded = (fit(MemoryConfig(rows=60, rows_precision=kind)) for kind in PRECISIONS)
    assert plain.int8_state == ()
    assert rounded.int8_state == rounded.state_names
    for name in rounded.int8_state:
        bank = rounded.get_buffer(name).numpy()
        assert np.array_equal(round_rows(bank), bank)
        assert sum(part.nbytes for part in encode_rows(bank)) < 0.3 * bank.nbytes
        assert not np.array_equal(bank, plain.get_buffer(name).numpy())
    torch.testing.assert_close(maps(rounded), maps(plain), rtol=0.03, atol=0.03)


def test_int8_rows_differ_from_float32_in_their_rounding_only() -> None:
    plain, rounded = (fit(MemoryConfig(rows=60, rows_precision=kind)).state_dict() for kind in PRECISIONS)
    for name, tensor in plain.items():
        expected = round_rows(tensor.numpy()) if name.startswith("bank_") else tensor.numpy()
        assert np.array_equal(rounded[name].numpy(), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_build_knows_what_the_rows_are_stored_in(precision: RowsPrecision) -> None:
    config = MemoryConfig(rows=40, rows_precision=precision)
    head = fit(config)
    again = MemoryMethod.build(MemoryConfig.model_validate(config.model_dump(mode="json")), head.state_dict())
    assert again.int8_state == head.int8_state
    assert torch.equal(maps(again), maps(head))


def test_settings_of_earlier_runs_are_the_defaults() -> None:
    config = MemoryConfig.model_validate({"rows": 1000, "candidates": 30_000})
    assert (config.reduction, config.rows_precision) == (Reduction.WEIGHTED, RowsPrecision.FLOAT32)
    with pytest.raises(ValidationError, match="reduction"):
        MemoryConfig.model_validate({"reduction": "random"})
