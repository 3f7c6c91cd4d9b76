"""The prototype method: what its head computes, what training makes of good patches, its graph and its state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from deploy.export import export_head
from deploy.metrics import image_auroc
from deploy.state import state_entries, stored_state
from edge.errors import DataError, UsageError
from edge.memory.rows import RowsPrecision
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.memory.fit import MemoryConfig
from trainer.methods.prototypes.fit import PrototypesConfig, PrototypesMethod, SetConfig
from trainer.methods.prototypes.model import EMPTY, Metric, PrototypeHead, PrototypeSet, places

if TYPE_CHECKING:
    from pathlib import Path

GRIDS = {"s8": (8, 8), "s16": (4, 4)}
CHANNELS = {"s8": 6, "s16": 9}
BOTH = (SetConfig(tap="s8", alpha=0.0, cells=4, copies=2), SetConfig(tap="s16", alpha=0.3, cells=4, copies=2))
PLAIN = {"metric": Metric.COSINE, "pooled": False, "whitening": 0.0, "background": 0.0}


def layout(generator: torch.Generator, channels: int, side: int) -> torch.Tensor:
    """A product: its own feature in every quarter of the picture, [channels, side, side]."""
    kinds = torch.randn(2, 2, channels, generator=generator)
    return kinds.repeat_interleave(side // 2, 0).repeat_interleave(side // 2, 1).permute(2, 0, 1)


def good(count: int, seed: int, *, product: int = 0, noise: float = 0.2) -> Features:
    """Taps of good images of a product whose quarters differ."""
    fixed, varied = torch.Generator().manual_seed(900 + product), torch.Generator().manual_seed(seed)
    taps = {}
    for name, (side, _) in GRIDS.items():
        base = layout(fixed, CHANNELS[name], side)
        taps[name] = base + noise * torch.randn(count, CHANNELS[name], side, side, generator=varied)
    return Features(taps, 1, np.arange(count).astype(np.str_))


def context(features: Features, *, products: tuple[str, ...] = ()) -> FitContext:
    nothing = Validation(features, features, np.zeros((0, 64, 64), np.bool_))
    return FitContext(
        features=features,
        images=np.zeros((len(features), 64, 64, 3), np.uint8),
        extract=lambda _: features,
        validation=nothing,
        seed=3,
        device=torch.device("cpu"),
        progress=lambda *_: None,
        products=products,
    )


def settings(**changes: object) -> PrototypesConfig:
    return PrototypesConfig(**{"sets": BOTH, "steps": 40, "batch_rows": 256, **changes})


def fitted(**changes: object) -> PrototypeHead:
    return PrototypesMethod.fit(context(good(24, 1)), settings(**changes))


def maps(head: PrototypeHead, features: Features, *more: torch.Tensor) -> torch.Tensor:
    return head(*(features.taps[name] for name in head.tap_names), *more)[0]


def moved(features: Features) -> Features:
    """The same patches, quarters exchanged: no patch is strange but for its place."""
    taps = {}
    for name, tap in features.taps.items():
        half = tap.shape[3] // 2
        taps[name] = torch.cat([tap[..., half:], tap[..., :half]], 3)
    return replace(features, taps=taps)


def one_set(alpha: float, *, metric: Metric = Metric.COSINE, copies: int = 1, **more: object) -> PrototypeHead:
    single = PrototypeSet("s8", alpha, (2, 2), copies)
    return PrototypeHead([single], channels={"s8": 3}, grids={"s8": (2, 2)}, metric=metric, **more)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_map_is_the_least_cost_over_prototypes_in_features_and_place(metric: Metric, alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    head = one_set(alpha, metric=metric, copies=3)
    rows = torch.nn.functional.normalize(torch.randn(12, 3, generator=generator), dim=1)
    head.prototypes_0.copy_(rows)
    head.farthest_0.fill_(1.7)
    head.typical_0.fill_(0.3)
    tap = torch.randn(2, 3, 2, 2, generator=generator)
    if metric is Metric.SOFT:
        head.floor_s8.fill_(0.6)
    expected = torch.empty(2, 4)
    where = places((2, 2))
    for image in range(2):
        for site in range(4):
            patch = tap[image].flatten(1)[:, site]
            if metric is Metric.SOFT:
                patch = patch / (patch.square().sum() + 0.6**2).sqrt()
            if metric is Metric.COSINE:
                feature = 1 - torch.cosine_similarity(patch[None], rows)
            else:
                feature = (patch - rows).square().sum(1)
            apart = (where[site] - where.repeat(3, 1)).norm(dim=1) / 2**0.5
            least = ((1 - alpha) * feature / 1.7 + alpha * apart).min()
            expected[image, site] = (least if metric is Metric.COSINE else least.sqrt()) / 0.3
    torch.testing.assert_close(head(tap)[0], expected.unflatten(1, (2, 2)), rtol=1e-5, atol=1e-5)


def test_places_are_no_use_to_global_prototypes_and_all_to_local_ones() -> None:
    features = good(24, 1)
    config = PrototypesConfig(sets=BOTH[:1], steps=40, pooled=False, background=0.0)
    test = good(6, 2)
    anywhere = maps(PrototypesMethod.fit(context(features), config), test)
    shuffled = maps(PrototypesMethod.fit(context(features), config), moved(test))
    torch.testing.assert_close(anywhere.flatten(1).sort(1)[0], shuffled.flatten(1).sort(1)[0])
    local = config.model_copy(update={"sets": (BOTH[0].model_copy(update={"alpha": 0.7}),)})
    head = PrototypesMethod.fit(context(features), local)
    assert maps(head, moved(test)).mean() > 1.5 * maps(head, test).mean()


def test_extreme_patch_changes_no_other_score_and_no_other_image() -> None:
    head = fitted(pooled=False, background=0.0, metric=Metric.EUCLID)
    one = good(1, 5)
    strange = {name: tap.clone() for name, tap in one.taps.items()}
    strange["s16"][:, :, 3, 3] = 1e3
    before, after = maps(head, one), maps(head, replace(one, taps=strange))
    assert after[0, 7, 7] > 5 * before[0, 7, 7]
    assert torch.equal(before[:, :5, :5], after[:, :5, :5])
    together = {name: torch.cat([one.taps[name], strange[name], good(6, 6).taps[name]]) for name in GRIDS}
    torch.testing.assert_close(maps(head, replace(one, taps=together))[:1], before, rtol=1e-5, atol=1e-6)


def test_step_goes_the_given_share_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.full((9,), 3.0)
    monkeypatch.setattr(
        "trainer.methods.prototypes.training.barycentres", lambda plan, _: target.expand(plan.log.shape[1], 9)
    )
    single = PrototypesConfig(
        sets=(BOTH[1],),
        steps=7,
        follow=0.05,
        rows_precision=RowsPrecision.FLOAT32,
        metric=Metric.EUCLID,
        whitening=0.0,
        pooled=False,
    )
    start = PrototypesMethod.fit(context(good(24, 1)), single.model_copy(update={"follow": 1e-12})).prototypes_0
    found = PrototypesMethod.fit(context(good(24, 1)), single).prototypes_0
    torch.testing.assert_close(found, target + 0.95**7 * (start - target), rtol=1e-4, atol=1e-4)


def test_prototypes_lie_among_the_good_patches_and_all_patches_stand_behind_them() -> None:
    features = good(24, 1)
    head = PrototypesMethod.fit(context(features), settings(**{**PLAIN, "metric": Metric.EUCLID}))
    rows = features.taps["s16"].permute(0, 2, 3, 1).flatten(0, 2)
    assert (head.prototypes_1 >= rows.amin(0)).all()
    assert (head.prototypes_1 <= rows.amax(0)).all()
    assert head.mass_1.sum() == len(rows)
    # Balanced: no prototype takes all, as a plain nearest assignment from random starts would let it.
    assert (head.mass_1 > 0).float().mean() > 0.5
    fewer = PrototypesMethod.fit(context(features), settings(**{**PLAIN, "metric": Metric.EUCLID, "steps": 1}))
    assert head.typical_1 < fewer.typical_1


def test_copies_of_a_cell_stay_apart() -> None:
    head = fitted(metric=Metric.COSINE)
    first, second = head.prototypes_0.unflatten(0, (2, 16))
    assert (first * second).sum(1).mean() < 0.99


def test_empty_prototype_explains_nothing() -> None:
    head = one_set(0.0, copies=1)
    head.prototypes_0.copy_(torch.eye(3)[[0, 1, 2, 0]])
    tap = torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2)
    assert head(tap)[0].abs().max() < 1e-6
    head.mass_0[1] = 0.0
    assert [round(float(v)) for v in head(tap)[0].mean((1, 2))] == [0, 1, 0]
    head.mass_0.zero_()
    assert head(tap)[0].min() >= EMPTY


def test_same_seed_gives_the_same_head_and_it_comes_back_from_its_tensors() -> None:
    first, second = fitted(), fitted()
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    again = PrototypesMethod.build(settings(), first.state_dict())
    assert torch.equal(maps(again, good(3, 8)), maps(first, good(3, 8)))
    with pytest.raises(DataError, match="no prototype head"):
        PrototypesMethod.build(settings(), {})


def both_products() -> Features:
    parts = [good(16, 1), good(16, 2, product=1)]
    taps = {name: torch.cat([part.taps[name] for part in parts]) for name in GRIDS}
    owner = torch.arange(2).repeat_interleave(16)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    return Features({name: tap[order] for name, tap in taps.items()}, 1, np.arange(32).astype(np.str_), owner[order])


def test_each_product_has_prototypes_of_its_own_images() -> None:
    config = settings()
    head = PrototypesMethod.fit(context(both_products(), products=("a", "b")), config)
    assert head.takes_product
    assert head.product_state == head.state_names
    assert all(head.get_buffer(name).shape[0] == 2 for name in head.state_names)
    tests = good(8, 7), good(8, 8, product=1)
    for own, other in ((0, 1), (1, 0)):
        right = maps(head, tests[own], torch.full((8,), own))
        wrong = maps(head, tests[own], torch.full((8,), other))
        assert image_auroc(np.r_[np.zeros(8), np.ones(8)] > 0, torch.cat([right, wrong]).amax((1, 2)).numpy()) == 1
    again = PrototypesMethod.build(config, head.state_dict())
    mixed = replace(tests[0], taps={n: torch.cat([t.taps[n][:1] for t in tests]) for n in GRIDS})
    expected = torch.cat([maps(head, tests[0], torch.zeros(8, dtype=torch.int64))[:1],
                          maps(head, tests[1], torch.ones(8, dtype=torch.int64))[:1]])  # fmt: skip
    torch.testing.assert_close(maps(again, mixed, torch.tensor([0, 1])), expected, rtol=1e-5, atol=1e-5)


def test_product_can_be_added_to_the_state() -> None:
    head = PrototypesMethod.fit(context(both_products(), products=("a", "b")), settings())
    wider = {name: torch.cat([t, t[:1]]) if name in head.product_state else t for name, t in head.state_dict().items()}
    more = PrototypesMethod.build(settings(), wider)
    test = good(4, 9)
    expected = maps(head, test, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(maps(more, test, torch.full((4,), 2)), expected, rtol=1e-5, atol=1e-6)


def test_product_without_images_is_named() -> None:
    features = replace(good(8, 1), products=torch.zeros(8, dtype=torch.int64))
    with pytest.raises(DataError, match="product b has no training features"):
        PrototypesMethod.fit(context(features, products=("a", "b")), settings())


@pytest.mark.parametrize("metric", list(Metric))
def test_graph_is_products_constants_and_minima_and_judges_as_the_head(metric: Metric, tmp_path: Path) -> None:
    head = fitted(metric=metric)
    export_head(head, tmp_path / "head.onnx", tap_shapes={n: (CHANNELS[n], *GRIDS[n]) for n in GRIDS})
    graph = onnx.load(tmp_path / "head.onnx").graph
    ops = {node.op_type for node in graph.node}
    # No step of the transport is left: it would be exponentials and logarithms.
    assert ops.isdisjoint({"Exp", "Log", "ReduceLogSumExp", "ReduceSumExp", "Softmax", "LogSoftmax", "ArgMin", "Loop"})
    assert {"MatMul", "ReduceMin"} <= ops
    assert {tensor.name for tensor in graph.initializer} >= set(head.state_names)
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"), providers=["CPUExecutionProvider"])
    test = good(5, 4)
    found = session.run(None, {name: test.taps[name].numpy() for name in head.tap_names})[0]
    expected = maps(head, test).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_float16_prototypes_are_stored_in_half_the_bytes(tmp_path: Path) -> None:
    half, whole = fitted(), fitted(rows_precision=RowsPrecision.FLOAT32)
    stored = stored_state(half)
    assert {str(stored[f"prototypes_{i}"].dtype) for i in range(2)} == {"float16"}
    assert {e.name for e in state_entries(half) if e.stored is RowsPrecision.FLOAT16} == {
        "prototypes_0",
        "prototypes_1",
    }
    save_file(stored, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")["prototypes_0"].astype(np.float32)
    assert np.array_equal(read, half.prototypes_0.numpy())
    sizes = [sum(values.nbytes for name, values in stored_state(h).items() if "proto" in name) for h in (half, whole)]
    assert 2 * sizes[0] == sizes[1]
    assert (maps(half, good(4, 2)) - maps(whole, good(4, 2))).abs().max() < 0.02 * maps(whole, good(4, 2)).abs().max()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="tap s2: unknown"):
        SetConfig(tap="s2")
    with pytest.raises(UsageError, match="--preset slow"):
        PrototypesMethod.config("slow")
    with pytest.raises(UsageError, match="cannot use a MemoryConfig"):
        PrototypesMethod.fit(context(good(2, 1)), MemoryConfig())
    with pytest.raises(DataError, match="at least one set"):
        PrototypeHead([], channels={}, grids={})
    read = PrototypesConfig.model_validate({"sets": '[{"tap": "s16", "alpha": 0.7}]', "steps": "3"})
    assert (read.sets[0].alpha, read.steps) == (0.7, 3)


def test_features_that_are_not_finite_are_refused() -> None:
    broken = good(8, 1)
    broken.taps["s16"][3, 0, 0, 0] = torch.nan
    for whitening in (0.0, 0.3):
        with pytest.raises(DataError, match="not finite"):
            PrototypesMethod.fit(context(broken), settings(whitening=whitening))
