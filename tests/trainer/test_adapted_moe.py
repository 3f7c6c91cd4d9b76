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
from trainer.methods.adapted_moe.adapt import DEVIATION_FLOOR, LARGEST_RATIO, Adapt, Moments, Trust
from trainer.methods.adapted_moe.fit import (
    Adaptation,
    AdaptedMoEConfig,
    AdaptedMoEMethod,
    ExpertKind,
    subclass_labels,
)
from trainer.methods.adapted_moe.model import LEAK, TAP_NAMES, AdaptedMoEHead, patches
from trainer.methods.adapted_moe.routing import floors
from trainer.methods.base import Adaptable, Features, FitContext, MethodConfig, Validation
from trainer.methods.memory.fit import MemoryConfig, MemoryMethod
from trainer.methods.memory.model import level_patches
from trainer.methods.patches import enlarge

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainer.methods.memory.model import MemoryHead

CPU = torch.device("cpu")
CHANNELS = (4, 5, 7)
D, ROWS, KEPT = sum(CHANNELS), 10, 6
SHAPES = {"s4": (4, 16, 20), "s8": (5, 8, 10), "s16": (7, 4, 5)}
NAMES = ("dark", "light", "red")
GENERAL = len(NAMES)
EXPERTS: dict[str, dict[str, tuple[int, ...]]] = {
    "bank": {
        **{f"whiten_{name}": (shape[0], shape[0]) for name, shape in SHAPES.items()},
        **{f"offset_{name}": shape[:1] for name, shape in SHAPES.items()},
        **{f"bank_{name}": (ROWS, shape[0]) for name, shape in SHAPES.items()},
        "level_scale": (3,),
        "site_project": (KEPT, D),
        "site_offset": (KEPT,),
        "site_mean": (KEPT, 8, 10),
        "site_scale": (16, 20),
    },
    "discriminator": {"hidden_weight": (D, 6), "hidden_bias": (6,), "logit_weight": (6,)},
}
POSITIVE = ("expert_std", "tta_std", "tta_usual", "level_scale", "site_scale")
SMALL = AdaptedMoEConfig(
    rows=20, candidates=300, steps=10, expert_steps=10, expert_rows=64, hidden=8, site_components=KEPT
)
KINDS = sorted(EXPERTS)
BOTH = ("bank", pytest.param("discriminator", marks=pytest.mark.slow))
"""Kinds to export; all but the expert is the same in both."""


def random_taps(n: int = 3, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *shape, generator=generator) for shape in SHAPES.values())


def random_head(kind: str = "bank", seed: int = 0, trim: float = 0.05) -> AdaptedMoEHead:
    """Return a head of random numbers, three sub-classes and floors that some of :func:`random_taps` lie below."""
    head = AdaptedMoEHead(
        channels=CHANNELS, experts=EXPERTS[kind], subclasses=NAMES, trim=trim, background=0.3, site_weight=0.7
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            if name not in {"names", "tta_mode"}:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        for name in POSITIVE:
            if name in head.state_names:
                head.get_buffer(name).abs_().add_(0.1)
        # Three of the images lie at the centres, and some of the others below the floor.
        head.route_centre.copy_(head.router.embed(head.router.pooled(*random_taps(8)[1:]))[:GENERAL])
        head.route_floor.fill_(float(head.closeness(*random_taps(8)).amax(1).quantile(0.3)))
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


def experts_of(head: AdaptedMoEHead, taps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return head.chosen(head.closeness(*taps))


def run_memory(head: MemoryHead, taps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return head(*taps)[0]


def judged_slowly(head: AdaptedMoEHead, taps: tuple[torch.Tensor, ...]) -> npt.NDArray[np.float64]:
    """The map by its definition, in float64, image by image."""
    state = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}
    found = []
    for index in range(len(taps[0])):
        image = [tap[index].double() for tap in taps]
        pooled = head.router.pooled(*(tap[None] for tap in image[1:])).numpy()[0]
        point = state["router.embed.weight"] @ pooled + state["router.embed.bias"]
        away = ((point - state["route_centre"]) ** 2).mean(1)
        e = int(np.argmin(away))
        if -away[e] < state["route_floor"][e]:
            e = GENERAL
        shown = adapted_slowly(head, [tap.numpy() for tap in image], {n: v[e] for n, v in state.items() if len(v) == 4})
        own = {name: state[name][e] for name in head.expert_state}
        found.append((bank_slowly if head.banks else discriminator_slowly)(head, shown, own))
    return np.stack(found)


def adapted_slowly(
    head: AdaptedMoEHead, image: list[npt.NDArray[np.float64]], state: dict[str, npt.NDArray[np.float64]]
) -> list[torch.Tensor]:
    means, stds = [], []
    for tap in image:
        sites = tap.reshape(len(tap), -1)
        away = ((sites - sites.mean(1, keepdims=True)) ** 2 / sites.var(1, keepdims=True)).sum(0)
        kept = sites[:, np.argsort(away)[: len(away) - int(head.moments.trim * len(away))]]
        means.append(kept.mean(1))
        stds.append(kept.std(1))
    mean, std = np.concatenate(means), np.concatenate(stds)
    shift = (((mean - state["tta_mean"]) / state["tta_std"]) ** 2).mean()
    share = state["tta_mode"][0] * max(0.0, 1 - state["tta_usual"] ** 2 / shift)
    m = share * mean + (1 - share) * state["tta_mean"]
    ratio = np.clip(state["expert_std"] / (share * std + (1 - share) * state["tta_std"]), 0.5, 2.0)
    ratio = 1 + state["tta_mode"][1] * (ratio - 1)
    moved, start = [], 0
    for tap in image:
        part = slice(start, start + len(tap))
        columns = [one[part, None, None] for one in (m, ratio, state["expert_mean"])]
        moved.append(torch.from_numpy((tap - columns[0]) * columns[1] + columns[2])[None])
        start = part.stop
    return moved


def bank_slowly(
    head: AdaptedMoEHead, shown: list[torch.Tensor], own: dict[str, npt.NDArray[np.float64]]
) -> npt.NDArray[np.float64]:
    total, columns, start = np.zeros((16, 20)), [], 0
    for level, (name, tap) in enumerate(zip(TAP_NAMES, shown, strict=True)):
        rows = level_patches(name, tap)[0].flatten(1).T.numpy() @ own[f"whiten_{name}"] + own[f"offset_{name}"]
        distance = cdist(rows, own[f"bank_{name}"]).min(1).reshape(tap.shape[2:]) * own["level_scale"][level]
        total += enlarge(torch.from_numpy(distance)[None, None], 2**level)[0, 0].numpy()
        weights = own["site_project"][:, start : start + tap.shape[1]]
        columns.append(torch.from_numpy(np.einsum("kc,chw->khw", weights, tap[0].numpy()))[None])
        start += tap.shape[1]
    coarse = columns[1] + enlarge(columns[2], 2) - torch.from_numpy(own["site_mean"])
    residual = (columns[0] + enlarge(coarse, 2))[0].numpy() + own["site_offset"][:, None, None]
    total += 0.7 * np.linalg.norm(residual, axis=0) / own["site_scale"]
    return total - 0.3 * total.mean()


def discriminator_slowly(
    head: AdaptedMoEHead, shown: list[torch.Tensor], own: dict[str, npt.NDArray[np.float64]]
) -> npt.NDArray[np.float64]:
    rows = head.project.double()(*shown)[0].numpy()
    head.project.float()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    hidden = rows @ own["hidden_weight"] + own["hidden_bias"]
    scores = -(np.where(hidden > 0, hidden, LEAK * hidden) @ own["logit_weight"])
    return enlarge(torch.from_numpy(scores.reshape(8, 10))[None, None], 2)[0, 0].numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [(1.0, 1.0), (0.0, 0.0), (0.3, 0.6)])
def test_head_equals_its_definition(kind: str, mode: tuple[float, float]) -> None:
    head, taps = random_head(kind), random_taps(8)
    head.set_adaptation(own=mode[0], scale=mode[1])
    anomaly_map, rows, route = run(head, taps)
    experts = experts_of(head, taps)
    assert GENERAL in experts
    assert len(experts.unique()) == GENERAL + 1
    assert anomaly_map.shape == (8, 16, 20)
    assert rows.shape == (8, 80, D)
    assert route.shape == (8, 3)
    np.testing.assert_allclose(anomaly_map.numpy(), judged_slowly(head, taps), atol=5e-5)


def test_route_below_the_floor_says_unknown_and_calls_the_general_expert() -> None:
    head, taps = random_head(), random_taps(8)
    head.route_floor.fill_(-1e3)
    before, _, close = run(head, taps)
    nearest, best = close.argmax(1), close.max(1).values - 1e3
    assert torch.equal(experts_of(head, taps), nearest)
    # A floor above the best expert alone would make another one look nearer, were it asked.
    head.route_floor[0] = float(best.max()) + 1.0
    after, _, route = run(head, taps)
    refused = nearest == 0
    assert torch.equal(route.argmax(1), nearest)
    assert torch.equal(route.max(1).values < 0, refused)
    assert torch.equal((before != after).flatten(1).any(1), refused)
    assert torch.equal(experts_of(head, taps), torch.where(refused, GENERAL, nearest))
    head.route_floor.fill_(float(best.median()))
    assert ((run(head, taps)[2].max(1).values < 0) == (best < best.median())).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_chosen_expert_judges_and_the_rows_are_nobodys(kind: str) -> None:
    """Routing is hard: neither the runner-up nor its moments may touch a score."""
    head, taps = random_head(kind), random_taps(8)
    before, rows, _ = run(head, taps)
    chosen = experts_of(head, taps)
    for expert in range(GENERAL + 1):
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


def test_constant_taps_keep_all_sites_and_a_deviation() -> None:
    mean, std = Moments(0.05)(torch.full((2, 4, 5, 8), 0.5))
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
    head.tta_usual.zero_()
    own = run(head, taps)[0]
    mean, std = head.measured(taps)
    expert = int(experts_of(head, taps))
    head.tta_mean[expert], head.tta_std[expert] = mean[0], std[0]
    head.set_adaptation(own=0.0, scale=1.0)
    assert (run(head, taps)[0] - own).abs().max() <= 1e-4
    head.tta_mean[expert] += 0.2
    assert (run(head, taps)[0] - own).abs().max() > 1e-3


def test_training_moments_leave_taps_as_they_are() -> None:
    head, taps = random_head(), random_taps(4)
    head.tta_mean.copy_(head.expert_mean)
    head.tta_std.copy_(head.expert_std)
    chosen = torch.tensor([0, 1, 2, GENERAL])
    for scale in (0.0, 1.0):
        head.set_adaptation(own=0.0, scale=scale)
        for shown, tap in zip(head.shown(taps, chosen, head.present(taps, chosen)), taps, strict=True):
            assert (shown - tap).abs().max() <= 1e-6


def test_an_image_within_what_training_shows_is_not_adapted_and_one_far_outside_is() -> None:
    head, taps = random_head(), random_taps(4)
    chosen = torch.zeros(4, dtype=torch.int64)
    mean, std = head.measured(taps)
    head.tta_mean[0], head.tta_std[0] = mean.mean(0), std.mean(0)
    head.tta_usual[0] = 1e3
    near = head.present(taps, chosen)
    assert torch.equal(near[0], head.tta_mean[0].expand(4, -1))
    assert torch.equal(near[1], head.tta_std[0].expand(4, -1))
    head.tta_usual[0] = 1e-3
    far = head.present(taps, chosen)
    assert (far[0] - mean).abs().max() < 1e-3


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 10), st.integers(0, 2**31))
def test_trust_grows_from_none_at_the_usual_shift_to_all(nearer: float, more: float, usual: float, seed: int) -> None:
    way = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
    way = way / way.square().mean().sqrt()
    zero, one = torch.zeros(1, 6), torch.ones(1, 6)
    shares = [float(Trust()(way * far, zero, one, torch.tensor([usual]))) for far in (nearer, nearer + more)]
    assert 0 <= shares[0] <= shares[1] <= 1
    if nearer <= usual * 0.999 and usual > 1e-3:
        assert shares[0] == 0
    assert float(Trust()(way * nearer, zero, one, torch.zeros(1))) == 1


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-9, 1e6), st.floats(1e-9, 1e6), st.floats(0, 1))
def test_no_deviation_is_stretched_beyond_the_limit(now: float, trained: float, share: float) -> None:
    tap = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(1, 4)
    moved = Adapt()(tap, now=(zero, zero + now), trained=(zero, zero + trained), scale_share=torch.tensor([[share]]))
    ratio = moved / tap
    assert torch.isfinite(moved).all()
    assert float(ratio.min()) >= 1 / LARGEST_RATIO - 1e-5
    assert float(ratio.max()) <= LARGEST_RATIO + 1e-5


def test_a_small_defect_hardly_moves_moments_and_a_large_one_by_less_than_untrimmed() -> None:
    generator = torch.Generator().manual_seed(2)
    tap = torch.randn(1, D, 20, 20, generator=generator) + 2
    marred = tap.clone()
    marred[:, :, 3, :18] = torch.randn(1, D, 18, generator=generator) - 3  # 4.5 % of the sites
    moved = [float((Moments(trim)(marred)[0] - Moments(trim)(tap)[0]).norm()) for trim in (0.05, 0.0)]
    assert moved[0] < 0.2 * moved[1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(0, 2**31), st.floats(0.0, 0.5))
def test_moments_are_those_of_some_of_the_sites(count: int, seed: int, trim: float) -> None:
    tap = torch.randn(2, 3, 1, count, generator=torch.Generator().manual_seed(seed))
    mean, std = Moments(trim)(tap)
    assert torch.isfinite(mean).all()
    assert (std > 0).all()
    assert (mean <= tap.amax((2, 3)) + 1e-5).all()
    assert (mean >= tap.amin((2, 3)) - 1e-5).all()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what exports a kind's random head, once; exporting takes longer than what is asked of it."""
    made: dict[str, Path] = {}

    def export(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("graph") / "head.onnx"
            export_head(random_head(kind), made[kind], tap_shapes=SHAPES)
        return made[kind]

    return export


@pytest.mark.parametrize("engine", available_engines())
@pytest.mark.parametrize("kind", BOTH)
def test_engines_judge_and_route_as_torch_does(kind: str, engine: Any, exported: Callable[[str], Path]) -> None:
    head = random_head(kind)
    for count in (1, 5):
        taps = random_taps(count, seed=count)
        feed = {name: tap.numpy() for name, tap in zip(TAP_NAMES, taps, strict=True)}
        graph = open_graph(
            exported(kind), engine=engine, precision=Precision.FLOAT32, threads=1,
            input_shapes={name: tap.shape for name, tap in feed.items()},
        )  # fmt: skip
        found = graph.run(feed)
        for name, expected in zip((ANOMALY_MAP, EMBEDDING, ROUTE), run(head, taps), strict=True):
            assert np.abs(found[name] - expected.numpy()).max() <= 1e-3
        assert np.array_equal(found[ROUTE].argmax(1), run(head, taps)[2].argmax(1).numpy())


@pytest.mark.parametrize("engine", available_engines())
@pytest.mark.parametrize("kind", BOTH)
def test_a_box_gives_other_moments_to_the_same_graph(kind: str, engine: Any, exported: Callable[[str], Path]) -> None:
    head, taps = random_head(kind), random_taps(4)
    before = run(head, taps)[0].numpy()
    head.set_adaptation(own=0.25, scale=0.5)
    head.tta_mean += 0.1
    state = {name: head.get_buffer(name).numpy() for name in head.state_names}
    feed = {name: tap.numpy() for name, tap in zip(TAP_NAMES, taps, strict=True)}
    graph = open_graph(
        exported(kind), engine=engine, precision=Precision.FLOAT32, threads=1, state=state,
        input_shapes={name: tap.shape for name, tap in feed.items()},
    )  # fmt: skip
    found = graph.run(feed)[ANOMALY_MAP]
    assert np.abs(found - run(head, taps)[0].numpy()).max() <= 1e-3
    assert np.abs(found - before).max() > 1e-2


@pytest.mark.parametrize("kind", BOTH)
def test_head_stays_in_float_under_int8(kind: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    feed = dict(zip(TAP_NAMES, (tap.numpy() for tap in random_taps()), strict=True))
    names = quantize_head(
        exported(kind), tmp_path / "int8.onnx", [feed], state_names=random_head(kind).state_names,
        float_ops=AdaptedMoEHead.float_ops,
    )  # fmt: skip
    assert names == ()
    assert (tmp_path / "int8.onnx").stat().st_size == exported(kind).stat().st_size


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
    taps = tuple(features().taps.values())
    for expert, part in ((0, slice(0, 8)), (GENERAL, slice(None))):
        mean, std = (one[part] for one in head.measured(taps))
        assert torch.allclose(head.expert_mean[expert], mean.mean(0), atol=1e-5)
        assert torch.allclose(head.expert_std[expert], std.square().mean(0).sqrt(), atol=1e-5)
        # What one image lies away from all others of its sub-class.
        others = (mean.sum(0) - mean) / (len(mean) - 1)
        usual = (((mean - others) / head.expert_std[expert]) ** 2).mean().sqrt()
        assert float(head.tta_usual[expert]) == pytest.approx(float(usual) if expert != GENERAL else 0.0, rel=1e-3)
    assert torch.equal(head.tta_mean, head.expert_mean)
    assert torch.equal(head.tta_mode, torch.tensor([[1.0, 0.0]] * 3 + [[1.0, 1.0]]))


@pytest.mark.parametrize("adaptation", [Adaptation.NONE, Adaptation.MEAN])
def test_experts_are_memories_of_their_sub_class_and_the_general_one_of_all_adapted(adaptation: Adaptation) -> None:
    """The same map as the memory method's of what the expert is shown."""
    config = SMALL.model_copy(update={"adaptation": adaptation})
    head = AdaptedMoEMethod.fit(context(), config)
    taps = tuple(features().taps.values())
    for expert, part in ((1, slice(8, 16)), (GENERAL, slice(None))):
        mine = tuple(tap[part] for tap in taps)
        chosen = torch.full((len(mine[0]),), expert)
        seen = head.shown(mine, chosen, head.present(mine, chosen))
        if adaptation is Adaptation.NONE:
            assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(seen, mine, strict=True))
        learned = seen if expert == GENERAL else mine
        shown = Features(
            {name: tap.half() for name, tap in zip(TAP_NAMES, learned, strict=True)}, 1, np.arange(24).astype(np.str_)
        )
        memory = MemoryMethod.fit(
            replace(context(), features=shown),
            MemoryConfig(
                rows=config.rows, candidates=config.candidates, site_components=KEPT, background=config.background
            ),
        )
        assert (head.judge(mine, chosen) - run_memory(memory, seen)).abs().max() < 1e-2


def test_banks_of_fewer_patches_than_rows_repeat_them() -> None:
    head = AdaptedMoEMethod.fit(context(), SMALL.model_copy(update={"rows": 200}))
    found = head.get_buffer("bank_s16")
    assert found.shape == (GENERAL + 1, 200, 7)
    assert len(found[0].unique(dim=0)) <= 8 * 4 * 5


def test_sites_can_be_left_out() -> None:
    config = SMALL.model_copy(update={"site_weight": 0.0})
    head = AdaptedMoEMethod.fit(context(), config)
    assert not any(name.startswith("site_") for name in head.state_dict())
    taps = tuple(features().taps.values())
    assert torch.equal(run(head, taps)[0], run(AdaptedMoEMethod.build(config, head.state_dict()), taps)[0])


def test_one_sub_class_needs_no_labels() -> None:
    head = AdaptedMoEMethod.fit(context(subclasses=None), SMALL)
    assert head.subclasses == ("",)
    assert head.experts == 1
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
    incomplete = {name: tensor for name, tensor in head.state_dict().items() if name != "bank_s8"}
    with pytest.raises(DataError, match="no Adapted-MoE head"):
        AdaptedMoEMethod.build(SMALL, incomplete)
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
    # Taking the map's own mean off would raise some cells where all distances fall.
    head = AdaptedMoEMethod.fit(context(), SMALL.model_copy(update={"background": 0.0}))
    assert isinstance(head, Adaptable)
    own = features()
    strange = Features({name: tap + 0.8 for name, tap in first(own, 4).taps.items()}, 1, own.groups[:4])
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    adapted = head.adapted(strange, torch.Generator().manual_seed(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())
    taps = tuple(strange.taps.values())
    old, new = run(head, taps)[0], run(adapted, taps)[0]
    assert (new <= old + 1e-5).all()
    assert float(new.mean()) < float(old.mean())
    expert = int(experts_of(head, taps).mode().values)
    for name in ("bank_s4", "bank_s8", "bank_s16"):
        for other in {0, 1, 2, GENERAL} - {expert}:
            assert torch.isin(adapted.get_buffer(name)[other], head.get_buffer(name)[other]).all()
    seen = tuple(own.taps.values())
    judged = experts_of(head, seen) != expert
    assert judged.sum() >= 16
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
