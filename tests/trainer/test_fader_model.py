"""The parts of FADeR without training: masks, hints, gates, similarity, and the exported head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks import masks as ablation
from deploy.export import export_head
from edge.errors import DataError, UsageError
from trainer.methods.fader.base import Hint, mosaic
from trainer.methods.fader.bases import BaseKind, FeatureBase, ImageBase
from trainer.methods.fader.fit import FaderConfig, FaderMethod, empty_head
from trainer.methods.fader.gates import Gates, GateShape, attenuated
from trainer.methods.fader.model import FaderHead, initialise, without_gates
from trainer.methods.fader.similarity import GradientSimilarity, structural_dissimilarity
from trainer.methods.memory.fit import MemoryMethod

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 64
SHAPES = {"s1": (3, 64, 64), "s2": (16, 32, 32), "s4": (24, 16, 16), "s8": (40, 8, 8), "s16": (112, 4, 4)}
KINDS = list(BaseKind)


def make_head(kind: BaseKind, *, gates: bool = True, **changes: object) -> FaderHead:
    """Return a head with random weights whose threshold masks about half of the cells of ``random_taps``."""
    config = FaderConfig.model_validate({"base": kind, **changes})
    generator = torch.Generator().manual_seed(1)
    head = empty_head(config, SHAPES)
    initialise(head.base, generator)
    head.base.threshold.fill_(float(head.base.saliency(head.base.read(random_taps(head))).median()))
    if gates:
        head.gates = Gates(head.base.skip_channels, config.gate).initialise(generator)
    return head.eval().requires_grad_(requires_grad=False)


def random_taps(head: FaderHead, n: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *SHAPES[name], generator=generator) for name in head.base.tap_names)


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_mosaic_keeps_every_block_mean_and_is_constant_inside(channels: int, block: int, seed: int) -> None:
    feature = torch.randn(2, channels, 8, 12, generator=torch.Generator().manual_seed(seed))
    made = mosaic(feature, block)
    means = functional.avg_pool2d(feature, block)
    for dy in range(block):
        for dx in range(block):
            assert torch.equal(made[..., dy::block, dx::block], means)


@pytest.mark.parametrize("kind", KINDS)
def test_skips_hide_what_the_mask_covers_and_nothing_else(kind: BaseKind) -> None:
    head = make_head(kind, hint=Hint.BLANK)
    reading = head.base.read(random_taps(head))
    mask = torch.zeros(3, 1, 4, 4)
    mask[:, :, 1, 2] = 1
    for name, feature, skip in zip(head.base.skip_names, reading.features, head.base.skips(reading, mask), strict=True):
        cells = 16 // int(name[1:])
        covered = torch.zeros(feature.shape[-2:], dtype=torch.bool)
        covered[cells : 2 * cells, 2 * cells : 3 * cells] = True
        assert not skip[..., covered].any()
        assert torch.equal(skip[..., ~covered], feature[..., ~covered])


@pytest.mark.parametrize("kind", KINDS)
def test_skips_mosaic_does_not_depend_on_detail_inside_a_covered_block(kind: BaseKind) -> None:
    head = make_head(kind)
    reading = head.base.read(random_taps(head))
    everything = torch.ones(3, 1, 4, 4)
    changed = [feature.clone() for feature in reading.features]
    for feature, stride in zip(changed, head.base.strides, strict=True):
        block = 32 // stride
        feature[:, :, 0, 0] += 5
        feature[:, :, block - 1, block - 1] -= 5  # the same block: its mean stays
    first = head.base.skips(reading, everything)
    second = head.base.skips(reading._replace(features=tuple(changed)), everything)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_fixed_threshold_on_the_distance_from_the_normal_mean(kind: BaseKind) -> None:
    head = make_head(kind)
    reading = head.base.read(random_taps(head))
    mask = head.base.mask(reading)
    assert 0.3 < float(mask.mean()) < 0.7
    alone = head.base.mask(head.base.read([tap[1:2] for tap in random_taps(head)]))
    assert torch.equal(alone, mask[1:2])  # no other image of the batch has a say
    normal = head.base.deviation("s16")
    assert float(normal(normal.local(torch.zeros(1, *SHAPES["s16"])) + 0).square().sum()) == 0


@pytest.mark.parametrize("shape", list(GateShape))
@pytest.mark.parametrize("kind", KINDS)
def test_gates_forced_open_give_the_base_to_the_last_bit(kind: BaseKind, shape: GateShape) -> None:
    head = make_head(kind, gate=shape)
    assert head.gates is not None
    taps = random_taps(head)
    bare = without_gates(head).judge(taps)
    assert not torch.equal(head.judge(taps).anomaly_map, bare.anomaly_map)
    head.gates.force_open()
    opened = head.judge(taps)
    assert torch.equal(opened.anomaly_map, bare.anomaly_map)
    assert torch.equal(opened.mask, bare.mask)
    assert all(bool((values == 1).all()) for values in opened.gates)


@pytest.mark.parametrize("shape", list(GateShape))
@pytest.mark.parametrize("kind", KINDS)
def test_gates_have_less_than_ten_thousand_weights(kind: BaseKind, shape: GateShape) -> None:
    head = make_head(kind, gate=shape)
    assert head.gates is not None
    assert sum(weight.numel() for weight in head.gates.parameters()) < 10_000


def test_gates_start_almost_open_and_differ_from_place_to_place() -> None:
    head = make_head(BaseKind.FEATURES)
    for values in head.judge(random_taps(head)).gates:
        assert values.shape[1] == 1
        assert 0.95 < float(values.min()) < float(values.max()) < 1


def test_gate_shape_channel_has_a_value_for_every_channel() -> None:
    head = make_head(BaseKind.FEATURES, gate=GateShape.CHANNEL)
    assert [values.shape[1] for values in head.judge(random_taps(head)).gates] == [24, 40, 112]


def test_attenuated_multiplies_each_skip_by_its_gate() -> None:
    head = make_head(BaseKind.FEATURES)
    base, gates = head.base, head.gates
    assert gates is not None
    for gate in gates.levels:
        gate.get_submodule("attenuate").weight.zero_()
        gate.get_submodule("attenuate").bias.zero_()  # sigmoid(0): every gate is a half
    reading = base.read(random_taps(head))
    mask = base.mask(reading)
    found, _ = attenuated(base, gates, reading, mask)
    wanted = base.decode([skip * 0.5 for skip in base.skips(reading, mask)])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_exported_head_gives_the_same_bits_a_hundred_times_and_decodes_once(kind: BaseKind, tmp_path: Path) -> None:
    head = make_head(kind)
    path = tmp_path / "head.onnx"
    export_head(head, path, tap_shapes={name: SHAPES[name] for name in head.tap_names})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taps = random_taps(head, n=1)
    feed = {name: tap.numpy() for name, tap in zip(head.tap_names, taps, strict=True)}
    runs = [session.run(None, feed)[0].tobytes() for _ in range(100)]
    assert len(set(runs)) == 1
    expected = head(*taps)[0].numpy()
    assert np.abs(np.frombuffer(runs[0], np.float32) - expected.ravel()).max() <= 1e-4 * np.abs(expected).max()
    convolutions = [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    assert sum("decoder.stages" in name for name in convolutions) == 3 * len(head.base.skip_names)


def test_exported_head_has_no_top_k_and_no_shape_arithmetic(tmp_path: Path) -> None:
    head = make_head(BaseKind.FEATURES)
    path = tmp_path / "head.onnx"
    export_head(head, path, tap_shapes={name: SHAPES[name] for name in head.tap_names})
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert not ops & {"TopK", "NonZero", "Shape", "Sort", "Where"}
    assert "Greater" in ops


def test_similarity_of_equal_pictures_is_perfect_and_falls_with_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    gradient = GradientSimilarity()
    assert float(structural_dissimilarity(picture, picture)) == pytest.approx(0, abs=1e-5)
    assert float(gradient(picture, picture).abs().max()) < 1e-5
    noise = torch.randn(picture.shape, generator=generator)
    losses = [structural_dissimilarity(picture, picture + level * noise) for level in (0.05, 0.2, 0.8)]
    assert losses == sorted(losses)
    assert float(losses[-1]) > 0.3
    missed = gradient(picture, torch.zeros_like(picture))
    assert missed.shape == (2, 1, 32, 32)
    assert 0.5 < float(missed.mean()) <= 1


def test_similarity_ssim_agrees_with_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(1)
    first = torch.rand(1, 1, 40, 40, generator=generator) * 2 - 1
    second = (first + 0.2 * torch.randn(first.shape, generator=generator)).clamp(-1, 1)
    _, full = structural_similarity(
        first[0, 0].numpy(), second[0, 0].numpy(), data_range=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    inside = full[5:-5, 5:-5]
    assert float(structural_dissimilarity(first, second)) == pytest.approx(1 - float(inside.mean()), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_build_restores_a_head_and_refuses_other_weights(kind: BaseKind) -> None:
    config = FaderConfig(base=kind)
    head = make_head(kind)
    tensors = head.state_dict()
    built = FaderMethod.build(config, dict(tensors))
    taps = random_taps(head)
    assert torch.equal(built(*taps)[0], head(*taps)[0])
    with pytest.raises(DataError, match="train again"):
        FaderMethod.build(config, {name: tensor for name, tensor in tensors.items() if "gates" not in name})
    with pytest.raises(DataError, match="train again"):
        FaderMethod.build(config, {})
    with pytest.raises(DataError, match="train again"):
        FaderMethod.build(config.model_copy(update={"width": 96}), dict(tensors))


def test_build_takes_a_trunk_with_other_channels() -> None:
    shapes = {**SHAPES, "s4": (32, 16, 16), "s8": (48, 8, 8), "s16": (120, 4, 4)}
    head = empty_head(FaderConfig(gates=False), shapes)
    initialise(head.base, torch.Generator().manual_seed(0))
    built = FaderMethod.build(FaderConfig(gates=False), dict(head.state_dict()))
    taps = [torch.randn(2, *shapes[name], generator=torch.Generator().manual_seed(3)) for name in head.tap_names]
    assert built(*taps)[0].shape == (2, 16, 16)


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match="preset"):
        FaderMethod.config("best")
    with pytest.raises(UsageError, match="MemoryConfig"):
        FaderMethod.build(MemoryMethod.config("quick"), {})
    with pytest.raises(ValueError, match="mosaic"):
        FaderConfig(mosaic=24)


def test_bases_share_one_interface() -> None:
    for kind, cls in ((BaseKind.FEATURES, FeatureBase), (BaseKind.IMAGE, ImageBase)):
        base = make_head(kind).base
        assert isinstance(base, cls)
        assert set(base.skip_names) <= set(base.tap_names)
        assert base.skip_names[-1] == "s16"


@given(st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_covering_comes_within_half_a_cell_of_what_is_asked(coverage: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    share = np.where(rng.random((6, 6)) < 0.3, rng.random((6, 6)), 0.0)
    share[2, 3] = 0.7
    chosen = ablation.covering(share, coverage, rng)
    assert not chosen[share == 0].any()
    reached = share[chosen].sum() / share.sum()
    assert abs(reached - coverage) <= 0.5 * share.max() / share.sum() + 1e-9 or coverage == 1
    assert ablation.covering(share, 1.0, rng).sum() == (share > 0).sum()


def test_outcome_of_known_maps() -> None:
    defect = np.zeros((2, 4, 4), np.bool_)
    defect[:, 0, 0] = True
    normal = ~defect
    maps = np.ones((2, 4, 4), np.float32)
    maps[0, 0, 0], maps[1, 0, 0] = 3, 5
    maps[0, 3, 3] = 10
    sample = ablation.Sample(None, defect, normal, np.zeros((2, 1, 1)))  # type: ignore[arg-type]  # no taps needed
    found = ablation.outcome(maps, sample)
    assert found.contrast == pytest.approx((3 / (24 / 15) + 5) / 2)
    assert found.false_positives == pytest.approx(1 / 30)
