"""Adapted-MoE: its head against a slow reference, its limits, its graph in two engines, what fitting keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from deploy.export import export_head
from deploy.progress import no_progress
from deploy.quantize import quantize_head
from edge.bundle import Precision
from edge.errors import DataError, UsageError
from edge.inference.engines import available_engines, open_graph
from edge.inference.sessions import ANOMALY_MAP, EMBEDDING, ROUTE
from trainer.methods.adapted_moe.adapt import DEVIATION_FLOOR, LARGEST_RATIO, Adapt, Moments, unit
from trainer.methods.adapted_moe.fit import AdaptedMoEConfig, AdaptedMoEMethod, ExpertKind, subclass_labels
from trainer.methods.adapted_moe.model import LEAK, TAP_NAMES, AdaptedMoEHead, patches
from trainer.methods.adapted_moe.routing import floors
from trainer.methods.base import Adaptable, Features, FitContext, MethodConfig, Validation

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
CHANNELS = (5, 7)
D = sum(CHANNELS)
SHAPES = {"s8": (5, 8, 10), "s16": (7, 4, 5)}
NAMES = ("dark", "light", "red")
EXPERTS: dict[str, dict[str, tuple[int, ...]]] = {
    "bank": {"bank": (9, D), "bank_scale": ()},
    "discriminator": {"hidden_weight": (D, 6), "hidden_bias": (6,), "logit_weight": (6,)},
}
SMALL = AdaptedMoEConfig(rows=20, candidates=300, steps=10, expert_steps=10, expert_rows=64, hidden=8)
KINDS = sorted(EXPERTS)


def random_taps(n: int = 3, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *shape, generator=generator) for shape in SHAPES.values())


def random_head(kind: str = "bank", seed: int = 0, trim: float = 0.05) -> AdaptedMoEHead:
    head = AdaptedMoEHead(channels=CHANNELS, experts=EXPERTS[kind], subclasses=NAMES, trim=trim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            if name not in {"names", "tta_mode"}:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        for name in ("expert_std", "tta_std", "bank_scale"):
            if name in head.state_names:
                head.get_buffer(name).abs_().add_(0.1)
    return head.eval().requires_grad_(requires_grad=False)


def features(n: int = 24, seed: int = 3) -> Features:
    """Three sub-classes, a third of the images each, that differ in their means."""
    centres, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    taps = {}
    for name, shape in SHAPES.items():
        means = torch.randn(3, shape[0], 1, 1, generator=centres)
        taps[name] = means.repeat_interleave(n // 3, 0) + torch.randn(n, *shape, generator=generator) * 0.5
    return Features(taps, 1, np.arange(n).astype(np.str_))


def context(of: Features | None = None, seed: int = 0, **changed: Any) -> FitContext:
    of = features() if of is None else of
    labels = np.repeat(np.array(NAMES), len(of) // 3)
    validation = Validation(features(12, 3), features(6, 5), np.zeros((6, 64, 80), bool))
    images = np.zeros((len(of), 64, 80, 3), np.uint8)
    made = FitContext(
        of, images, lambda tiles: first(features(24, 4), len(tiles)), validation, seed, CPU, no_progress,
        subclasses=labels,
    )  # fmt: skip
    return replace(made, **changed)


def first(of: Features, count: int) -> Features:
    return Features({name: tap[:count] for name, tap in of.taps.items()}, 1, of.groups[:count])


def run(head: AdaptedMoEHead, taps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return head(*taps)


def judged_slowly(head: AdaptedMoEHead, taps: tuple[torch.Tensor, ...]) -> npt.NDArray[np.float64]:
    """The map by its definition, in float64, image by image."""
    state = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}
    x = patches(*(tap.double() for tap in taps)).numpy()
    pooled = head.router.pooled(*(tap.double() for tap in taps)).numpy()
    weight = np.concatenate([state["project.from_s8.weight"], state["project.from_s16.weight"]], 1)[:, :, 0, 0]
    own, scale = state["tta_mode"]
    found = []
    for image, mean_patch in zip(x, pooled, strict=True):
        point = state["router.embed.weight"] @ mean_patch + state["router.embed.bias"]
        e = int(np.argmin(((point - state["route_centre"]) ** 2).sum(1)))
        rows = image.reshape(D, -1).T @ weight.T + state["project.from_s8.bias"]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        away = ((rows - rows.mean(0)) ** 2 / rows.var(0)).sum(1)
        kept = rows[np.argsort(away)[: len(rows) - int(head.moments.trim * len(rows))]]
        m = own * kept.mean(0) + (1 - own) * state["tta_mean"][e]
        s = own * kept.std(0) + (1 - own) * state["tta_std"][e]
        ratio = 1 + scale * (np.clip(state["expert_std"][e] / s, 0.5, 2.0) - 1)
        g = (rows - m) * ratio + state["expert_mean"][e]
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        if "bank" in state:
            scores = cdist(g, state["bank"][e]).min(1) / state["bank_scale"][e]
        else:
            hidden = g @ state["hidden_weight"][e] + state["hidden_bias"][e]
            scores = -(np.where(hidden > 0, hidden, LEAK * hidden) @ state["logit_weight"][e])
        found.append(scores.reshape(image.shape[1:]))
    return np.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [(1.0, 1.0), (0.0, 0.0), (0.3, 0.6)])
def test_head_equals_its_definition(kind: str, mode: tuple[float, float]) -> None:
    head, taps = random_head(kind), random_taps(8)
    head.set_adaptation(own=mode[0], scale=mode[1])
    anomaly_map, rows, route = run(head, taps)
    assert len(route.argmax(1).unique()) > 1
    assert anomaly_map.shape == (8, 8, 10)
    assert rows.shape == (8, 80, D)
    assert route.shape == (8, 3)
    np.testing.assert_allclose(anomaly_map.numpy(), judged_slowly(head, taps), atol=2e-5)


def test_route_below_the_floor_says_unknown_and_changes_no_choice() -> None:
    head, taps = random_head(), random_taps(8)
    head.route_floor.zero_()
    before, _, close = run(head, taps)
    # A floor above the best expert alone would make another one look nearer, were it asked.
    best = close.max(1).values
    head.route_floor.copy_(torch.tensor([float(best.max()) + 1.0, -1e3, -1e3]))
    after, _, route = run(head, taps)
    assert torch.equal(before, after)
    assert torch.equal(route.argmax(1), close.argmax(1))
    assert torch.equal(route.max(1).values < 0, close.argmax(1) == 0)
    head.route_floor.fill_(float(best.median()))
    assert ((run(head, taps)[2].max(1).values < 0) == (best < best.median())).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_chosen_expert_judges_and_from_rows_as_they_are(kind: str) -> None:
    """Routing is hard: neither the runner-up nor its moments may touch a score."""
    head, taps = random_head(kind), random_taps(8)
    before, rows, route = run(head, taps)
    chosen = route.argmax(1)
    for expert in range(3):
        other = random_head(kind)
        for name in other.state_names:
            if (name.startswith(("expert_", "tta_m", "tta_s")) and name != "tta_mode") or name in EXPERTS[kind]:
                other.get_buffer(name)[expert] += 0.7
        after, same_rows, _ = run(other, taps)
        assert torch.equal(rows, same_rows)
        changed = (before != after).flatten(1).any(1)
        assert torch.equal(changed, chosen == expert)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_image_has_finite_scores(kind: str, value: float) -> None:
    head = random_head(kind)
    flat = tuple(torch.full((2, *shape), value) for shape in SHAPES.values())
    assert all(torch.isfinite(part).all() for part in run(head, flat))


def test_constant_rows_keep_all_patches_and_a_deviation() -> None:
    mean, std = Moments(0.05)(torch.full((2, 40, 4), 0.5))
    assert torch.equal(mean, torch.full((2, 4), 0.5))
    assert (std == DEVIATION_FLOOR).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_judged_alike_alone_and_among_others(kind: str) -> None:
    head, taps = random_head(kind), random_taps(8)
    together = run(head, taps)
    for index in range(8):
        alone = run(head, tuple(tap[index : index + 1] for tap in taps))
        for part, whole in zip(alone, together, strict=True):
            assert (part[0] - whole[index]).abs().max() <= 1e-5


def test_moments_given_by_a_box_are_used_instead_of_the_images_own() -> None:
    head, taps = random_head(), random_taps(1)
    own, rows, route = run(head, taps)
    mean, std = head.moments(rows)
    expert = int(route.argmax())
    head.tta_mean[expert], head.tta_std[expert] = mean[0], std[0]
    head.set_adaptation(own=0.0, scale=1.0)
    assert (run(head, taps)[0] - own).abs().max() <= 1e-5
    head.tta_mean[expert] += 0.2
    assert (run(head, taps)[0] - own).abs().max() > 1e-3


def test_training_moments_leave_rows_as_they_are() -> None:
    head, taps = random_head(), random_taps(4)
    head.tta_mean.copy_(head.expert_mean)
    head.tta_std.copy_(head.expert_std)
    rows = run(head, taps)[1]
    chosen = torch.tensor([0, 1, 2, 0])
    for scale in (0.0, 1.0):
        head.set_adaptation(own=0.0, scale=scale)
        assert (head.shown(rows, chosen, head.present(rows, chosen)) - rows).abs().max() <= 1e-6


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6), st.floats(0, 1))
def test_no_deviation_is_stretched_beyond_the_limit(now: float, trained: float, share: float) -> None:
    rows = unit(torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(1)))
    zero = torch.zeros(1, 4)
    parts = {"now": (zero, zero + now), "trained": (zero, zero + trained), "scale_share": torch.tensor([share])}
    # About zero moments one ratio for all dimensions only turns rows by nothing; a shifted mean shows it.
    parts["trained"] = (zero + 0.1, zero + trained)
    moved = Adapt()(rows, **parts)
    candidates = [unit(rows * ratio + 0.1) for ratio in np.linspace(1 / LARGEST_RATIO, LARGEST_RATIO, 400)]
    assert torch.isfinite(moved).all()
    assert min(float((moved - one).abs().max()) for one in candidates) < 0.02


def test_a_small_defect_hardly_moves_moments_and_a_large_one_by_less_than_untrimmed() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = unit(torch.randn(1, 400, D, generator=generator) + 2)
    marred = rows.clone()
    marred[:, :18] = unit(torch.randn(1, 18, D, generator=generator) - 3)  # 4.5 % of the patches
    moved = [float((Moments(trim)(marred)[0] - Moments(trim)(rows)[0]).norm()) for trim in (0.05, 0.0)]
    assert moved[0] < 0.2 * moved[1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(0, 2**31), st.floats(0.0, 0.5))
def test_moments_are_those_of_some_of_the_rows(count: int, seed: int, trim: float) -> None:
    rows = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
    mean, std = Moments(trim)(rows)
    assert torch.isfinite(mean).all()
    assert (std > 0).all()
    assert (mean <= rows.amax(1) + 1e-5).all()
    assert (mean >= rows.amin(1) - 1e-5).all()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the exported graph of each kind's random head; exporting takes longer than what is asked of it."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {kind: folder / f"{kind}.onnx" for kind in KINDS}
    for kind, path in made.items():
        export_head(random_head(kind), path, tap_shapes=SHAPES)
    return made


@pytest.mark.parametrize("engine", available_engines())
@pytest.mark.parametrize("kind", KINDS)
def test_engines_judge_and_route_as_torch_does(kind: str, engine: Any, graphs: dict[str, Path]) -> None:
    head = random_head(kind)
    for count in (1, 5):
        taps = random_taps(count, seed=count)
        feed = {name: tap.numpy() for name, tap in zip(TAP_NAMES, taps, strict=True)}
        graph = open_graph(
            graphs[kind], engine=engine, precision=Precision.FLOAT32, threads=1,
            input_shapes={name: tap.shape for name, tap in feed.items()},
        )  # fmt: skip
        found = graph.run(feed)
        for name, expected in zip((ANOMALY_MAP, EMBEDDING, ROUTE), run(head, taps), strict=True):
            assert np.abs(found[name] - expected.numpy()).max() <= 1e-3
        assert np.array_equal(found[ROUTE].argmax(1), run(head, taps)[2].argmax(1).numpy())


@pytest.mark.parametrize("engine", available_engines())
@pytest.mark.parametrize("kind", KINDS)
def test_a_box_gives_other_moments_to_the_same_graph(kind: str, engine: Any, graphs: dict[str, Path]) -> None:
    head, taps = random_head(kind), random_taps(4)
    before = run(head, taps)[0].numpy()
    head.set_adaptation(own=0.25, scale=0.5)
    head.tta_mean += 0.1
    state = {name: head.get_buffer(name).numpy() for name in head.state_names}
    feed = {name: tap.numpy() for name, tap in zip(TAP_NAMES, taps, strict=True)}
    graph = open_graph(
        graphs[kind], engine=engine, precision=Precision.FLOAT32, threads=1, state=state,
        input_shapes={name: tap.shape for name, tap in feed.items()},
    )  # fmt: skip
    found = graph.run(feed)[ANOMALY_MAP]
    assert np.abs(found - run(head, taps)[0].numpy()).max() <= 1e-3
    assert np.abs(found - before).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_head_stays_in_float_under_int8(kind: str, graphs: dict[str, Path], tmp_path: Path) -> None:
    feed = dict(zip(TAP_NAMES, (tap.numpy() for tap in random_taps()), strict=True))
    names = quantize_head(
        graphs[kind], tmp_path / "int8.onnx", [feed], state_names=random_head(kind).state_names,
        float_ops=AdaptedMoEHead.float_ops,
    )  # fmt: skip
    assert names == ()
    assert (tmp_path / "int8.onnx").stat().st_size == graphs[kind].stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_fit_and_build_give_the_same_head(kind: str) -> None:
    config = SMALL.model_copy(update={"experts": ExpertKind(kind)})
    head = AdaptedMoEMethod.fit(context(), config)
    again = AdaptedMoEMethod.fit(context(), config)
    built = AdaptedMoEMethod.build(config, head.state_dict())
    assert head.subclasses == NAMES
    taps = tuple(features().taps.values())
    for one, two, three in zip(run(head, taps), run(again, taps), run(built, taps), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    labels = torch.arange(3).repeat_interleave(8)
    assert torch.equal(run(head, taps)[2].argmax(1), labels)


def test_fit_learns_nothing_from_defects() -> None:
    one = AdaptedMoEMethod.fit(context(), SMALL)
    plain = context()
    other = replace(plain, validation=replace(plain.validation, defective=features(6, 99)))
    two = AdaptedMoEMethod.fit(other, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_fit_adapts_what_it_was_trained_on_to_itself() -> None:
    head = AdaptedMoEMethod.fit(context(), SMALL)
    taps = tuple(tap[:8] for tap in features().taps.values())
    mean, std = head.moments(run(head, taps)[1])
    assert torch.allclose(head.expert_mean[0], mean.mean(0), atol=1e-5)
    assert torch.allclose(head.expert_std[0], std.square().mean(0).sqrt(), atol=1e-5)
    assert torch.equal(head.tta_mean, head.expert_mean)


def test_one_sub_class_needs_no_labels() -> None:
    head = AdaptedMoEMethod.fit(context(subclasses=None), SMALL)
    assert head.subclasses == ("",)
    assert (run(head, tuple(features().taps.values()))[2] >= 0).float().mean() > 0.9


def test_labels_of_tiles_are_those_of_their_images() -> None:
    tiled = replace(features(), tiles_per_image=2)
    names, labels = subclass_labels(context(tiled, subclasses=np.array(["b", "a"] * 6)))
    assert names == ("a", "b")
    assert labels.tolist() == [1, 0] * 6


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a"] * 23 + ["b"], "sub-class 'b' has 1 training image.*at least 2"),
        (["a"] * 23, "23 sub-class labels for 24 training images"),
        (["a\nb"] * 24, "line break"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        AdaptedMoEMethod.fit(context(subclasses=np.array(labels)), SMALL)


def test_features_and_tensors_that_cannot_be_used_are_refused() -> None:
    broken = features()
    broken.taps["s8"][0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        AdaptedMoEMethod.fit(context(broken), SMALL)
    with pytest.raises(DataError, match="no training features"):
        AdaptedMoEMethod.fit(context(first(features(), 0), subclasses=np.array([], np.str_)), SMALL)
    head = AdaptedMoEMethod.fit(context(), SMALL)
    with pytest.raises(DataError, match="no Adapted-MoE head"):
        AdaptedMoEMethod.build(SMALL.model_copy(update={"rows": 21}), head.state_dict())
    with pytest.raises(DataError, match="no Adapted-MoE head"):
        AdaptedMoEMethod.build(SMALL, {})
    with pytest.raises(DataError, match="multiples of 16"):
        patches(torch.zeros(1, 5, 9, 10), torch.zeros(1, 7, 4, 5))
    with pytest.raises(UsageError, match="--preset tiny"):
        AdaptedMoEMethod.config("tiny")
    with pytest.raises(UsageError, match="cannot use a MethodConfig"):
        AdaptedMoEMethod.fit(context(), MethodConfig())


def test_training_that_diverges_is_refused() -> None:
    for changed in ({"router_rate": 1e30}, {"experts": ExpertKind.DISCRIMINATOR, "expert_rate": 1e30}):
        with pytest.raises(UsageError, match=r"lower (router|expert)_rate"):
            AdaptedMoEMethod.fit(context(), SMALL.model_copy(update=changed))


def test_a_few_good_images_of_another_kind_widen_the_nearest_expert_alone() -> None:
    head = AdaptedMoEMethod.fit(context(), SMALL)
    assert isinstance(head, Adaptable)
    own = features()
    strange = Features({name: tap + 0.8 for name, tap in first(own, 4).taps.items()}, 1, own.groups[:4])
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    adapted = head.adapted(strange, torch.Generator().manual_seed(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())
    taps = tuple(strange.taps.values())
    old, _, route = run(head, taps)
    new = run(adapted, taps)[0]
    assert (new <= old + 1e-5).all()
    assert float(new.mean()) < float(old.mean())
    expert = int(route.mean(0).argmax())
    for other in {0, 1, 2} - {expert}:
        assert torch.isin(adapted.get_buffer("bank")[other], head.get_buffer("bank")[other]).all()
    seen = tuple(own.taps.values())
    judged = torch.arange(3).repeat_interleave(8) != expert
    assert torch.allclose(run(adapted, seen)[0][judged], run(head, seen)[0][judged], atol=1e-6)
    with pytest.raises(DataError, match="not finite"):
        head.adapted(
            Features({n: t * torch.nan for n, t in strange.taps.items()}, 1, strange.groups), torch.Generator()
        )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(60, 300), st.sampled_from([0.02, 0.05, 0.2]))
def test_floors_refuse_no_more_of_the_unseen_than_asked(seed: int, count: int, refusal: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    known = -torch.rand(40, 2, generator=generator)
    unseen = -2 * torch.rand(count, 2, generator=generator)
    labels = known.argmax(1)
    labels[:2] = torch.tensor([0, 1])
    found = floors(known, labels, [unseen, known[:0]], refusal=refusal)
    best, chosen = unseen.max(1)
    assert int((best < found[chosen]).sum()) <= refusal * (count + 1)


def test_floors_of_few_images_lie_below_all_of_them() -> None:
    known = torch.tensor([[-1.0], [-2.0], [-3.0]])
    found = floors(known, torch.zeros(3, dtype=torch.int64), [], refusal=0.02)
    assert float(found) < -3.5
