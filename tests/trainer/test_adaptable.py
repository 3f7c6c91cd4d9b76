"""Heads that take in a few good images of another kind without training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge.errors import DataError
from edge.memory.rows import RowsPrecision
from tests.trainer.test_memory import SIDE, TINY, context, extract
from trainer.data.textures import Cloth, TextureWeb
from trainer.methods.base import Adaptable, Features
from trainer.methods.feddymem.model import FedDyMemHead, Generator, level_channels
from trainer.methods.memory.fit import MemoryConfig, MemoryMethod
from trainer.methods.memory.model import LEVELS, MemoryHead
from trainer.methods.pbas.model import PbasHead
from trainer.methods.registry import methods


def webs(stuff: Cloth, first: int, count: int) -> Features:
    web = TextureWeb("cloth", 3, SIDE, stuff)
    return extract([web.view((first + index) * 4 * SIDE, SIDE) for index in range(count)])


@pytest.fixture(scope="module")
def old() -> Features:
    return webs(Cloth(), 0, 10)


@pytest.fixture(scope="module")
def new() -> Features:
    return webs(Cloth(yarn=11.0, repeat=4, over=2, level=30.0), 0, 16)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def maps(head: torch.nn.Module, of: Features) -> torch.Tensor:
    with torch.inference_mode():
        return head(*(of.taps[name].float() for name in LEVELS))[0]


def some(of: Features, first: int, last: int) -> Features:
    return Features({name: tap[first:last] for name, tap in of.taps.items()}, 1, of.groups[first:last])


def fitted(old: Features, **changes: object) -> MemoryHead:
    config = MemoryConfig.model_validate({**TINY.model_dump(), **changes})
    return MemoryMethod.fit(context(old), config)


def fleet_head() -> FedDyMemHead:
    torch.manual_seed(0)
    generator = Generator(level_channels((24, 40, 112)), 16)
    torch.nn.init.normal_(generator.project.weight, std=0.1)
    torch.nn.init.zeros_(generator.project.bias)
    head = FedDyMemHead(generator, rows=30, fleet_rows=40, grid=(SIDE // 8, SIDE // 8), smoothing=0, background=0.0)
    return head.eval().requires_grad_(requires_grad=False)


def test_banks_adapt_and_learned_boundaries_do_not() -> None:
    assert isinstance(fleet_head(), Adaptable)
    assert issubclass(MemoryHead, Adaptable)
    assert not issubclass(PbasHead, Adaptable)
    assert {"memory", "feddymem", "pbas"} <= set(methods())


def test_memory_without_sites_comes_closer_everywhere(old: Features, new: Features) -> None:
    head = fitted(old, site_weight=0.0, background=0.0)
    before, state = maps(head, new), {name: tensor.clone() for name, tensor in head.state_dict().items()}
    adapted = head.adapted(some(new, 0, 2), seeded())
    after = maps(adapted, new)
    assert (after <= before + 1e-3).all()
    assert after[2:].mean() < 0.8 * before[2:].mean()
    assert (maps(adapted, old) <= maps(head, old) + 1e-3).all()
    assert all(torch.equal(state[name], tensor) for name, tensor in head.state_dict().items())
    rows = {name: len(getattr(head, f"bank_{name}")) for name in LEVELS}
    assert {name: len(getattr(adapted, f"bank_{name}")) for name in LEVELS} == {
        name: count + max(1, count // 4) for name, count in rows.items()
    }


def test_memory_brings_a_shifted_kind_back_to_the_scores_of_the_old_one(old: Features, new: Features) -> None:
    head = fitted(old)
    known = maps(head, webs(Cloth(), 50, 6)).mean()
    strange = maps(head, some(new, 8, 16)).mean()
    for count in (1, 5):
        back = maps(head.adapted(some(new, 0, count), seeded()), some(new, 8, 16)).mean()
        assert back - known < 0.5 * (strange - known)


def test_sites_are_centred_on_what_they_are_given(old: Features, new: Features) -> None:
    adapted = fitted(old).adapted(some(new, 0, 4), seeded())
    assert adapted.sites is not None
    given = some(new, 0, 4)
    taps = [given.taps[name].float() for name in LEVELS]
    assert float(adapted.sites(*taps).mean()) == pytest.approx(1.0, abs=1e-3)
    assert adapted.sites.residual(*taps).mean((0, 2, 3)).abs().max() < 1e-3


def test_memory_keeps_the_precision_of_its_rows(old: Features, new: Features) -> None:
    from edge.memory.rows import round_rows

    adapted = fitted(old, rows_precision=RowsPrecision.INT8).adapted(some(new, 0, 2), seeded())
    for name in LEVELS:
        rows = getattr(adapted, f"bank_{name}").numpy()
        np.testing.assert_allclose(round_rows(rows), rows, atol=1e-5)


@pytest.mark.parametrize("kind", ["memory", "feddymem"])
def test_adaptation_is_the_same_each_time_and_refuses_what_is_not_finite(
    old: Features, new: Features, kind: str
) -> None:
    head = fitted(old) if kind == "memory" else fleet_head()
    one, two = (head.adapted(some(new, 0, 3), seeded()).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    broken = Features({name: tap[:1].clone() for name, tap in new.taps.items()}, 1, new.groups[:1])
    broken.taps["s8"][0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        head.adapted(broken, seeded())


def test_fleet_memory_uses_the_room_for_the_fleet_and_keeps_what_was_there(old: Features, new: Features) -> None:
    head = fleet_head()
    with torch.inference_mode():
        rows = head.embed(*(old.taps[name].float() for name in LEVELS)).flatten(0, 1)
    head.set_banks(rows[:20])
    before = maps(head, new)
    adapted = head.adapted(some(new, 0, 2), seeded())
    assert torch.equal(adapted.bank_local, head.bank_local)
    assert adapted.bank_fleet.shape == head.bank_fleet.shape
    assert len(torch.unique(adapted.bank_fleet, dim=0)) == 40  # what repeated the local rows was room
    assert (maps(adapted, new) <= before + 1e-4).all()
    assert maps(adapted, new)[2:].mean() < 0.9 * before[2:].mean()
    for given, kept in ((rows[50:55], 5), (rows[50:90], 30)):
        head.set_banks(rows[:20], given)
        again = head.adapted(some(new, 0, 1), seeded())
        assert int((torch.cdist(given, again.bank_fleet, p=torch.inf).amin(1) == 0).sum()) == kept
