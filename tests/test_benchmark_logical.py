"""The comparison on assembled parts: its figures come from the maps that methods give, and its goals from them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import logical
from trainer.data.assembled import Fault
from trainer.methods.registry import methods

TINY = logical.Size(side=64, train=8, held=6, good=4, each=2, steps=2)


@pytest.fixture(scope="module")
def plates() -> logical.Plates:
    return logical.make_plates(0, 0.02, TINY, ("s4", "s8", "s16"))


def test_methods_are_judged_on_every_fault(plates: logical.Plates) -> None:
    chosen = logical.candidates(["prototypes"], "quick", TINY)
    assert set(chosen) == {"prototypes", logical.PAPER}
    row = logical.judged(*chosen["prototypes"], plates)
    faults = {fault.value for fault in Fault}
    assert set(row.image) == set(row.pixel) == set(row.aupro) == faults
    assert all(0 <= value <= 1 for figures in (row.image, row.pixel, row.aupro) for value in figures.values())
    assert 0 < row.state < row.whole


def test_products_are_none_that_settings_were_tried_on(plates: logical.Plates) -> None:
    assert plates.masks.shape == (2 * len(Fault), 64, 64)
    assert plates.masks.any((1, 2)).all()
    assert list(plates.kinds[::2]) == [fault.value for fault in Fault]


def test_goals_follow_from_the_figures() -> None:
    def row(value: float) -> logical.Row:
        every = dict.fromkeys((fault.value for fault in Fault), value)
        return logical.Row(every, every, every, 1, 2, 0.1)

    rows = {"prototypes": [row(0.9), row(0.8)], "memory": [row(0.7), row(0.7)]}
    (goal,) = logical.method_goals(rows)
    assert goal.value == pytest.approx(0.15)
    assert goal.met
    assert logical.method_goals({"memory": [row(0.5)]}) == []
    places = [{a: {f.value: (0.5 + a / 2, 0.5) for f in Fault} for a in logical.ALPHAS}]
    gain, high, loss = logical.place_goals(places)
    assert (gain.value, high.value) == (pytest.approx(0.15), pytest.approx(0.85))
    assert (gain.met, high.met) == (True, False)
    assert loss.value == pytest.approx(-0.15)
    assert np.isfinite([gain.limit, high.limit, loss.limit]).all()


def test_memory_has_a_row_without_sites() -> None:
    chosen = logical.candidates(["memory"], "quick", logical.Size())
    assert chosen[logical.NO_SITES][1].model_dump()["site_weight"] == 0
    assert set(logical.candidates(list(methods()), "quick", logical.Size())) > set(methods())
