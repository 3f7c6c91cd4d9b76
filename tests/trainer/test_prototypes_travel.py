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
from deploy.parity import ParityRules
from edge.bundle import Preprocessing
from edge.errors import DataError, UsageError
from edge.federation.update import MemoryUpdate, Order, WireRows
from edge.federation.wire_rows import on_wire
from edge.inference.detector import Detector
from edge.inference.state import stored_state
from edge.memory.banks import Banks, packed_banks
from edge.memory.dynamic import DynamicMemory
from edge.memory.reduce import reduce_anchor
from edge.memory.search import anomaly_map
from tests.trainer.test_prototypes import CHANNELS, GRIDS, context, good, moved
from trainer import export as exporting
from trainer.data.conveyor import write_default
from trainer.data.generic import generic_canvases
from trainer.export import export_run
from trainer.fit import train
from trainer.methods.prototypes.fit import PrototypesConfig, PrototypesMethod, SetConfig
from trainer.methods.prototypes.model import Metric
from trainer.methods.prototypes.travel import PLACE, TravellingHead

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.methods.base import Features

SET = SetConfig(tap="s8", alpha=0.7, cells=4, copies=2)
PREPROCESSING = Preprocessing(height=64, width=64)
RULES = ParityRules(shift=4.0, flipped=0.2, auroc_drop=0.2, good_samples=32, defect_samples=32)


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


@pytest.mark.slow
def test_box_switches_to_merged_prototypes_in_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generic = generic_canvases(64)[::3]
    monkeypatch.setattr(exporting, "generic_canvases", lambda: generic)
    data = write_default(tmp_path / "web", seed=4, kind="metal", train=20, test_good=1, test_defective=1, side=96)
    run = train(
        method="prototypes", data=data, out=tmp_path / "run", device="cpu", preprocessing=PREPROCESSING,
        settings={"travels": True, "sets": '[{"tap": "s8", "alpha": 0.3, "cells": 8}]'}, progress=lambda *_: None,
    )  # fmt: skip
    bundle = export_run(run.path, tmp_path / "bundle", rules=RULES, progress=lambda *_: None)
    assert bundle.manifest.memory == run.head.memory_layout
    state = stored_state(bundle)
    assert state["bank_local"].shape == (128, 42)
    for engine, precision in bundle.calibrated():
        detector = Detector.open(bundle, engine=engine, precision=precision, threads=1)
        before = detector.map_of_canvas(run.holdout[0])
        # Each prototype a little nearer to all others: other maps, the same sizes.
        other = {name: rows + 0.3 * (rows.mean(0) - rows) for name, rows in state.items()}
        detector.switch_state(other, memory_version=1).result(60)
        assert not np.allclose(detector.map_of_canvas(run.holdout[0]), before, rtol=1e-3)
        detector.switch_state(state, memory_version=2).result(60)
        np.testing.assert_allclose(detector.map_of_canvas(run.holdout[0]), before, rtol=1e-4, atol=1e-5)
