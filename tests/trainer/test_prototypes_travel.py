"""Prototypes that travel: rows with their places, which what a box and an aggregator do to memories is done to."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch

from deploy.aggregator.aggregate import AggregateSettings, aggregate
from deploy.export import export_head
from edge.bundle import Preprocessing
from edge.errors import DataError, UsageError
from edge.federation.update import MemoryUpdate, Order, WireRows
from edge.federation.wire_rows import on_wire
from edge.memory.banks import Banks, packed_banks
from edge.memory.dynamic import DynamicMemory
from edge.memory.reduce import reduce_anchor
from edge.memory.search import anomaly_map
from tests.trainer.test_prototypes import CHANNELS, GRIDS, context, good, moved
from trainer.methods.prototypes.fit import PrototypesConfig, PrototypesMethod, SetConfig
from trainer.methods.prototypes.model import Metric
from trainer.methods.prototypes.travel import PLACE, TravellingHead

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.methods.base import Features

SET = SetConfig(tap="s8", alpha=0.7, cells=4, copies=2)
PREPROCESSING = Preprocessing(height=64, width=64)


def settings(**changes: object) -> PrototypesConfig:
    return PrototypesConfig(
        **{
            "sets": (SET,),
            "steps": 30,
            "batch_rows": 256,
            "follow": 0.05,
            "metric": Metric.EUCLID,
            "travels": True,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def head() -> TravellingHead:
    found = PrototypesMethod.fit(context(good(24, 1)), settings())
    assert isinstance(found, TravellingHead)
    return found


def judged(head: TravellingHead, features: Features) -> tuple[np.ndarray, np.ndarray]:
    maps, rows = head(features.taps["s8"])
    return maps.numpy(), rows.numpy()


def banks_of(head: TravellingHead) -> dict[str, np.ndarray]:
    return {name: head.get_buffer(name).numpy() for name in head.state_names}


def as_layout_says(head: TravellingHead, rows: np.ndarray, banks: Banks) -> np.ndarray:
    found = [anomaly_map(one[None], banks.rows, head.memory_layout, PREPROCESSING, head.map_stride) for one in rows]
    return np.stack(found)


def test_box_computes_the_map_of_the_graph_from_rows_and_banks(head: TravellingHead) -> None:
    maps, rows = judged(head, good(5, 2))
    assert rows.shape == (5, 64, CHANNELS["s8"] + PLACE)
    banks = packed_banks(banks_of(head), head.memory_layout)
    assert banks.fleet is None
    np.testing.assert_allclose(as_layout_says(head, rows, banks), maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", list(Metric))
def test_cost_is_that_of_features_and_places_squared(metric: Metric) -> None:
    head = PrototypesMethod.fit(context(good(24, 1)), settings(metric=metric, background=0.0))
    assert isinstance(head, TravellingHead)
    test = good(3, 2)
    features, (maps, rows) = head.features.rows("s8", test.taps["s8"]), judged(head, test)
    bank = head.bank_local
    # Take the weights out again and compare feature by feature, place by place.
    share = float(((1 - SET.alpha) / head.farthest).sqrt())
    where = bank[:, -PLACE:] / (SET.alpha / 2) ** 0.5
    feature = torch.cdist(features, (bank[:, :-PLACE] / share)[None].expand(3, -1, -1)).square()
    apart = torch.cdist(head.where, where).square()
    cost = (1 - SET.alpha) * feature / head.farthest + SET.alpha * apart / 2
    np.testing.assert_allclose(maps, cost.amin(2).sqrt().unflatten(1, (8, 8)).numpy(), rtol=2e-3, atol=2e-3)
    assert rows.dtype == np.float32
    assert where.min() > -0.01
    assert where.max() < 1.01


def test_patches_at_wrong_places_are_seen(head: TravellingHead) -> None:
    test = good(6, 2)
    assert judged(head, moved(test))[0].max((1, 2)).min() > 1.5 * judged(head, test)[0].max((1, 2)).max()


def fed(head: TravellingHead, features: Features) -> DynamicMemory:
    memory = DynamicMemory.begin(head.bank_local.numpy())
    for frame in judged(head, features)[1]:
        memory.feed(frame)
    return memory


def sent(head: TravellingHead, box: str, memory: DynamicMemory) -> MemoryUpdate:
    """The update that a box ships, as its learner makes it."""
    reduced = reduce_anchor(memory.bank, 64, min_frames=3)
    return MemoryUpdate(
        fleet="f", box=box, product="p", subclass="", embedding_id="0" * 64, round=1, order=Order.ANCHOR,
        rows=on_wire(reduced.rows, WireRows.FLOAT16), support=reduced.support, frames=reduced.frames,
        n_frames=memory.feeds, mean=memory.mean, std=memory.std, base_version=0,
        created=datetime.now(timezone.utc), nonce=(box * 32)[:32].replace("/", "0"),
    )  # fmt: skip


def test_what_two_boxes_saw_comes_back_as_prototypes_of_both(head: TravellingHead) -> None:
    """One box sees the product as it is, the other another layout; the fleet's prototypes know both."""
    first, second = fed(head, good(40, 3)), fed(head, moved(good(40, 4)))
    merged = aggregate(
        [sent(head, "a/1", first), sent(head, "b/2", second)], settings=AggregateSettings(rows=32), seed=1
    )
    assert merged.mass.sum() == pytest.approx(1, abs=1e-4)
    test, strange = good(8, 5), moved(good(8, 6))
    before = judged(head, strange)[0].max((1, 2))
    state = Banks.with_fleet(first.bank.rows, merged.rows, 32).fill(banks_of(head), head.memory_layout)
    switched = PrototypesMethod.build(settings(), head.state_dict() | {n: torch.tensor(v) for n, v in state.items()})
    assert isinstance(switched, TravellingHead)
    after, home = (judged(switched, features)[0].max((1, 2)) for features in (strange, test))
    known = judged(head, test)[0].max((1, 2)).mean()
    # Half of what made it strange is gone, with as many rows for two layouts as there were for one.
    assert after.max() < before.min()
    assert after.mean() - known < 0.6 * (before.mean() - known)
    assert home.max() < after.min()


def test_graph_gives_the_map_and_the_rows(head: TravellingHead, tmp_path: Path) -> None:
    path = tmp_path / "head.onnx"
    export_head(head, path, tap_shapes={"s8": (CHANNELS["s8"], *GRIDS["s8"])})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    test = good(3, 4)
    found = session.run(None, {"s8": test.taps["s8"].numpy()})
    for got, expected in zip(found, judged(head, test), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_head_comes_back_from_its_tensors(head: TravellingHead) -> None:
    again = PrototypesMethod.build(settings(), head.state_dict())
    assert np.array_equal(judged(again, good(2, 9))[0], judged(head, good(2, 9))[0])
    with pytest.raises(DataError, match="no prototype head"):
        PrototypesMethod.build(settings(), {"bank_local": head.bank_local})


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(ValueError, match="2 sets cannot travel"):
        settings(sets=(SET, SET))
    with pytest.raises(UsageError, match="several products do not travel"):
        PrototypesMethod.fit(context(good(8, 1), products=("a", "b")), settings())
