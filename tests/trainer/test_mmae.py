"""MMAE-ECG: what is hidden from whom, what the network may not see, and what the exported graph says and costs."""

import ast
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.counting import multiply_accumulates, parameters
from deploy.export import export_head
from deploy.progress import no_progress
from edge.bundle import Engine, Precision
from edge.errors import DataError, UsageError
from edge.inference.engines import open_graph
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.mmae_ecg.fit import MmaeConfig, MmaeMethod, autoencoder, scales, varied
from trainer.methods.mmae_ecg.masks import Masks, Scales, fixed_masks, random_masks
from trainer.methods.mmae_ecg.model import (
    SIGNAL,
    Autoencoder,
    MmaeHead,
    Space,
    flat,
    hidden_errors,
    normalised,
    waves,
)

TINY = Scales(12, 6)
FLOOR = torch.full((2, 1), 0.05)


pytestmark = pytest.mark.usefixtures("one_thread")


def _network(tiny: Scales = TINY, *, channels: int = 2, length: int = 6, seed: int = 0) -> Autoencoder:
    network = Autoencoder(
        channels=channels, samples=tiny.segments * length, scales=tiny, width=16, depth=1, heads=2, ratio=2
    )
    network.initialise(torch.Generator().manual_seed(seed))
    return network


def _head(space: Space = Space.RAW, passes: int = 4, seed: int = 0, **options) -> MmaeHead:
    masks = fixed_masks(TINY, passes, seed)
    return MmaeHead(_network(**options), masks, floor=FLOOR, space=space, cell=2).eval()


def _signal(rows: int = 3, channels: int = 2, samples: int = 72, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, 1, channels, samples, generator=torch.Generator().manual_seed(seed))


sizes = st.tuples(st.integers(4, 60), st.integers(2, 60), st.floats(0.2, 0.8)).filter(
    lambda one: one[1] <= one[0] and 0 < int(one[2] * one[0] + 0.5) < one[0] and 0 < int(one[2] * one[1] + 0.5) < one[1]
)


@given(sizes, st.integers(1, 13), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_fixed_masks_hide_exactly_the_share_and_every_segment_in_each_group_of_passes(size, passes, seed, couple):
    tiny = Scales(*size)
    masks = fixed_masks(tiny, passes, seed, couple=couple)
    assert masks.global_hidden.shape == (passes, tiny.hidden_global)
    assert masks.local_hidden.shape == (passes, tiny.hidden_local)
    for row in range(passes):
        seen, hidden = set(masks.global_visible[row].tolist()), set(masks.global_hidden[row].tolist())
        assert seen | hidden == set(range(tiny.segments))
        assert not seen & hidden
        start = int(masks.starts[row, 0])
        run = set(masks.local_visible[row].tolist()) | set(masks.local_hidden[row].tolist())
        assert run == set(range(start, start + tiny.local))
        if couple:
            assert set(masks.local_hidden[row].tolist()) <= hidden
    for first in range(0, passes - tiny.covering + 1, tiny.covering):
        if couple and tiny.covering * tiny.hidden_local > tiny.local:
            continue  # runs that must hide one segment twice leave fewer to go round
        assert set(masks.global_hidden[first : first + tiny.covering].flatten().tolist()) == set(range(tiny.segments))


def test_complementary_masks_hide_each_segment_in_every_pair_at_one_half():
    masks = fixed_masks(Scales(100, 20), 12, 7)
    for first in range(0, 12, 2):
        assert torch.equal(masks.global_hidden[first : first + 2].flatten().sort().values, torch.arange(100))
    assert int(masks.counts(100).min()) >= 6
    assert masks.starts[:, 0].tolist() == [round(h * 80 / 11) for h in range(12)]


def test_fixed_masks_are_those_of_their_seed():
    one, same, other = (fixed_masks(TINY, 5, seed) for seed in (3, 3, 4))
    assert torch.equal(one.global_hidden, same.global_hidden)
    assert torch.equal(one.local_hidden, same.local_hidden)
    assert not torch.equal(one.global_hidden, other.global_hidden)


@given(st.integers(0, 999), st.booleans())
@settings(max_examples=25, deadline=None)
def test_random_masks_hide_exact_numbers_and_runs_that_lie_inside(seed, couple):
    masks = random_masks(TINY, 9, torch.Generator().manual_seed(seed), couple=couple)
    assert masks.global_hidden.shape == (9, 6)
    assert masks.local_hidden.shape == (9, 3)
    together = torch.cat([masks.global_hidden, masks.global_visible], 1).sort(1).values
    assert torch.equal(together, torch.arange(12).expand(9, 12))
    run = torch.cat([masks.local_hidden, masks.local_visible], 1).sort(1).values
    assert torch.equal(run, masks.starts + torch.arange(6))
    assert int(run.max()) < 12
    if couple:
        hidden = [set(row.tolist()) for row in masks.global_hidden]
        assert all(set(row.tolist()) <= of for row, of in zip(masks.local_hidden, hidden, strict=True))


def test_scales_are_hidden_apart_unless_coupled():
    masks = random_masks(TINY, 200, torch.Generator().manual_seed(0))
    free = [
        set(row.tolist()) - set(of.tolist()) for row, of in zip(masks.local_hidden, masks.global_hidden, strict=True)
    ]
    assert np.mean([len(one) / 3 for one in free]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("wrong", [(4, 5, 0.5), (12, 1, 0.5), (12, 6, 0.99), (12, 6, 0.01)])
def test_scales_that_hide_all_or_nothing_are_refused(wrong):
    with pytest.raises(UsageError):
        Scales(*wrong)


def test_normalisation_leaves_shape_and_size_and_keeps_flat_segments_small():
    segments = torch.randn(3, 5, 2, 40, generator=torch.Generator().manual_seed(1)) * 3 + 7
    found, variance = normalised(segments, 1e-2)
    assert found.mean(-1).abs().max() < 1e-5
    assert (found.square().mean(-1) - 1).abs().max() < 1e-3
    torch.testing.assert_close(found * variance.sqrt() + segments.mean(-1, keepdim=True), segments)
    flat = 7 + 1e-4 * torch.randn(1, 1, 1, 40, generator=torch.Generator().manual_seed(2))
    assert normalised(flat, 1e-2)[0].abs().max() < 0.05


def test_what_is_hidden_at_both_scales_changes_nothing_that_is_rebuilt():
    network, masks = _network(), random_masks(TINY, 4, torch.Generator().manual_seed(3), couple=True)
    segments = network.cut(_signal(4)[:, 0])
    changed = segments.clone()
    for row in range(4):
        # Of the coupled masks, whatever the run hides the window hides too.
        changed[row, masks.local_hidden[row]] += 50.0
    with torch.no_grad():
        torch.testing.assert_close(network(segments, masks), network(changed, masks))
        changed[:, masks.global_visible[0, :1]] += 50.0
        assert not torch.allclose(network(segments, masks), network(changed, masks))


def test_visible_segments_add_exactly_nothing_to_the_scores():
    head, signal = _head(passes=1), _signal()
    hidden = set(head.masks.global_hidden.flatten().tolist()) | set(head.masks.local_hidden.flatten().tolist())
    with torch.no_grad():
        raw, shape = head.point_scores(signal)
    for found in (raw, shape):
        per_segment = found.unflatten(2, (12, 3)).abs().amax((0, 1, 3))
        assert {index for index in range(12) if per_segment[index] == 0.0} == set(range(12)) - hidden


def test_scores_are_means_over_the_passes_that_hid_a_segment():
    head, signal = _head(passes=4), _signal(2)
    network, masks = head.network, head.masks
    segments = network.cut(signal[:, 0])
    total, count = torch.zeros(2, 12, 2, 6), torch.zeros(12)
    with torch.no_grad():
        for one in range(4):
            single = Masks.of(*(getattr(masks, name)[[one, one]] for name in Masks.__slots__[:4]))
            error = (
                network(segments, single)
                - torch.cat(
                    [
                        normalised(segments, FLOOR)[0][:, part[one]]
                        for part in (masks.global_hidden, masks.local_hidden)
                    ],
                    1,
                )
            ).square()
            for slot, segment in enumerate([*masks.global_hidden[one].tolist(), *masks.local_hidden[one].tolist()]):
                total[:, segment] += error[:, slot]
                count[segment] += 1
        expected = (total / count.clamp_min(1)[:, None, None]).unflatten(3, (3, 2)).mean(4)
        raw, shape = head.point_scores(signal)
        torch.testing.assert_close(shape, expected.transpose(1, 2).flatten(2))
        variance = normalised(segments, FLOOR)[1]
        torch.testing.assert_close(raw, (expected * variance).transpose(1, 2).flatten(2))
        whole = total.mean((2, 3)).sum(1) / count.sum()
        torch.testing.assert_close(head.sample_scores(signal)[1], whole)


def test_both_spaces_together_have_the_place_of_the_raw_and_the_level_of_the_normalised():
    signal = _signal()
    with torch.no_grad():
        raw, shape, both = (_head(space)(signal)[0] for space in (Space.RAW, Space.NORMALISED, Space.BOTH))
    torch.testing.assert_close(both.mean((1, 2)), shape.mean((1, 2)))
    torch.testing.assert_close(both / both.amax((1, 2), keepdim=True), raw / raw.amax((1, 2), keepdim=True))
    assert both.shape == (3, 2, 36)


def test_training_loss_is_of_hidden_entries_alone():
    network, masks = _network(), random_masks(TINY, 4, torch.Generator().manual_seed(3))
    segments = network.cut(_signal(4)[:, 0])
    exact = torch.cat(
        [
            normalised(segments, FLOOR)[0][torch.arange(4)[:, None], part]
            for part in (masks.global_hidden, masks.local_hidden)
        ],
        1,
    )
    assert sum(map(float, hidden_errors(exact, segments, masks, FLOOR))) == 0.0
    exact[:, 6:] += 1.0
    of_window, of_run = hidden_errors(exact, segments, masks, FLOOR)
    assert (float(of_window), float(of_run)) == (0.0, pytest.approx(1.0, abs=1e-5))


@given(st.integers(4, 100), st.integers(1, 40), st.data())
@settings(max_examples=40, deadline=None)
def test_how_alike_two_first_positions_are_depends_on_their_distance_alone(count, half, data):
    table = waves(count, 2 * half)
    distance = data.draw(st.integers(0, count - 1))
    alike = (table[: count - distance] * table[distance:]).sum(1)
    torch.testing.assert_close(alike, alike[:1].expand(len(alike)), atol=1e-3, rtol=0)
    assert float(alike[0]) <= half + 1e-3
    assert waves(count, 2 * half + 1).shape == (count, 2 * half + 1)


def test_smoothing_spreads_a_peak_and_keeps_the_level():
    smooth = MmaeHead(_network(), fixed_masks(TINY, 4, 0), floor=FLOOR, space=Space.RAW, cell=2, smooth=0.5)
    cells = torch.zeros(1, 2, 36)
    cells[0, 1, 18] = 1.0
    found = smooth.smoothed(cells)
    assert float(found.sum()) == pytest.approx(1.0, rel=1e-5)
    assert int(found[0, 1].argmax()) == 18
    assert 0.2 < float(found[0, 1, 18]) < 0.4
    assert float(found[0, 0].abs().max()) == 0
    torch.testing.assert_close(smooth.smoothed(torch.ones(2, 2, 36)), torch.ones(2, 2, 36))
    assert _head().smoothed(cells) is cells


def test_a_floor_is_of_each_channel_and_of_the_segments_that_are_there_most():
    quiet = 0.01 * torch.randn(50, 10, 2, 8, generator=torch.Generator().manual_seed(0))
    quiet[:, :, 1] *= 20
    quiet[:, :3] *= 100
    assert flat(quiet).flatten().tolist() == pytest.approx([0.01, 0.2], rel=0.3)
    assert float(flat(torch.zeros(2, 3, 1, 4))) > 0


def test_the_graph_of_a_window_of_twelve_leads_and_ten_seconds_is_within_its_budget(tmp_path):
    config = MmaeConfig()
    network = autoencoder(config, channels=12, samples=4800)
    network.initialise(torch.Generator().manual_seed(0))
    head = MmaeHead(
        network,
        fixed_masks(network.scales, config.passes, 0),
        floor=torch.full((12, 1), 0.05),
        space=Space.BOTH,
        cell=16,
    ).eval()
    path = tmp_path / "head.onnx"
    export_head(head, path, tap_shapes={SIGNAL: (1, 12, 4800)})
    assert (network.scales.segments, config.passes) == (100, 12)
    assert sum(one.numel() for one in network.parameters()) == 404_352
    assert parameters(path) <= 417_000
    cost = multiply_accumulates(path, {SIGNAL: (1, 1, 12, 4800)})
    assert 300e6 < cost <= 385e6
    assert multiply_accumulates(path, {SIGNAL: (2, 1, 12, 4800)}) == 2 * cost


def test_counting_agrees_with_hand_and_names_what_is_unknown(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval()
    path = tmp_path / "m.onnx"
    torch.onnx.export(module, (torch.zeros(4, 7),), path, dynamo=True, input_names=["x"], verbose=False)  # fmt: skip
    assert multiply_accumulates(path, {"x": (4, 7)}) == 4 * (7 * 5 + 5 * 3)
    assert parameters(path) == 7 * 5 + 5 + 5 * 3 + 3
    with pytest.raises(DataError, match="x has no shape"):
        multiply_accumulates(path, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.onnx"
    export_head(_head(Space.BOTH), path, tap_shapes={SIGNAL: (1, 2, 72)})
    return path


@pytest.mark.parametrize("engine", [Engine.ONNXRUNTIME, Engine.OPENVINO])
def test_both_engines_say_what_torch_says(exported, engine):
    head, signal = _head(Space.BOTH), _signal()
    with torch.no_grad():
        expected = head(signal)[0].numpy()
    session = open_graph(
        exported, engine=engine, precision=Precision.FLOAT32, threads=1, input_shapes={SIGNAL: (1, *signal.shape[1:])}
    )
    for row in range(len(signal)):
        found = np.array(session.run({SIGNAL: signal[row : row + 1].numpy()})["anomaly_map"])
        np.testing.assert_allclose(found[0], expected[row], rtol=1e-4, atol=1e-5 * expected.max())


def test_masks_are_constants_of_the_graph(exported):
    graph = onnx.load(exported).graph
    assert [value.name for value in graph.input] == [SIGNAL]
    assert not {node.op_type for node in graph.node} & {"TopK", "RandomUniform", "If", "Loop", "NonZero"}


def _context(windows: torch.Tensor, seed: int = 0) -> FitContext:
    of = Features({SIGNAL: windows[:, None]}, 1, np.array([str(i) for i in range(len(windows))]))
    return FitContext(
        features=of,
        images=windows.numpy(),
        extract=lambda values: Features({SIGNAL: torch.from_numpy(values)[:, None]}, 1, of.groups),
        validation=Validation(good=of, defective=of, masks=np.zeros(windows.shape, bool)),
        seed=seed,
        device=torch.device("cpu"),
        progress=no_progress,
    )


def _waves(count: int = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(96) / 12 + torch.rand(count, 1, 1, generator=generator)
    return torch.cat([torch.sin(2 * torch.pi * place), torch.cos(2 * torch.pi * place)], 1)


QUICK = {"segments": 8, "local": 4, "width": 16, "depth": 1, "heads": 2, "steps": 120, "batch": 16, "passes": 4}


def test_learning_waves_brings_the_loss_below_chance_and_a_broken_wave_stands_out():
    config = MmaeConfig.model_validate({**QUICK, "rate": 5e-3})
    head = MmaeMethod.fit(_context(_waves()), config)
    signal = _waves(5, seed=9)[:, None]
    with torch.no_grad():
        broken = signal.clone()
        broken[:, :, 0, 40:52] = -broken[:, :, 0, 40:52]
        assert (head.sample_scores(broken)[1] > head.sample_scores(signal)[1]).all()
    again = MmaeMethod.build(config, head.state_dict())
    with torch.no_grad():
        assert torch.equal(again(signal)[0], head(signal)[0])


def test_one_seed_gives_one_detector():
    config = MmaeConfig.model_validate({**QUICK, "steps": 8, "loss_gate": 1e3})
    one, same, other = (MmaeMethod.fit(_context(_waves(20), seed), config) for seed in (0, 0, 1))
    signal = _waves(5, seed=9)[:, None]
    with torch.no_grad():
        assert torch.equal(one(signal)[0], same(signal)[0])
        assert not torch.equal(one(signal)[0], other(signal)[0])


def test_a_training_that_learned_nothing_is_refused():
    noise = torch.randn(30, 2, 96, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="raise --set steps"):
        MmaeMethod.fit(_context(noise), MmaeConfig.model_validate({**QUICK, "steps": 5}))


def test_segments_follow_from_the_window():
    assert scales(MmaeConfig(), 4800) == Scales(100, 20)
    assert scales(MmaeConfig(), 720) == Scales(45, 9)
    with pytest.raises(DataError, match="equal segments"):
        scales(MmaeConfig(), 73)
    with pytest.raises(DataError, match="equal segments"):
        autoencoder(MmaeConfig(segments=7), channels=1, samples=720)


def test_foreign_tensors_are_refused():
    with pytest.raises(DataError, match="train again"):
        MmaeMethod.build(MmaeConfig(), {"weight": torch.zeros(2)})


def test_nothing_here_looks_for_beats():
    finders = {
        "heartpy",
        "neurokit2",
        "biosppy",
        "wfdb.processing",
        "scipy.signal",
        "find_peaks",
        "xqrs",
        "ecgdetectors",
    }
    root = Path(__file__).parents[2] / "trainer"
    for path in (*(root / "methods" / "mmae_ecg").glob("*.py"), *(root / "signals").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or "", *(alias.name for alias in node.names)]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.attr]
                if isinstance(node, ast.Attribute)
                else []
            )
            allowed = {"scipy.signal"} if path.name == "ptbxl.py" else set()  # filters, no peaks
            assert not set(names) & (finders - allowed), f"{path.name} imports {names}"


def test_training_windows_are_varied_within_what_is_asked_and_not_at_all_without() -> None:
    windows = torch.sin(torch.linspace(0, 12, 120)).repeat(6, 2, 1)
    plain = MmaeConfig(stretch=0, shift=0, gain=0, noise=0)

    assert varied(windows, plain, torch.Generator().manual_seed(0)) is windows
    louder = varied(windows, plain.model_copy(update={"gain": 0.2}), torch.Generator().manual_seed(0))
    ratio = louder[:, :, 10] / windows[:, :, 10]
    assert ((ratio > 0.8) & (ratio < 1.2)).all()
    assert ratio.std() > 0.02
    moved = varied(windows, plain.model_copy(update={"shift": 0.05}), torch.Generator().manual_seed(0))
    # Both channels of a window move together, by 6 samples of 120 at most.
    assert torch.equal(moved[:, 0], moved[:, 1])
    for one in moved[:, 0]:
        errors = [float((one[10:-10] - windows[0, 0].roll(-by)[10:-10]).abs().max()) for by in range(-6, 7)]
        assert min(errors) < 0.06
    assert not torch.equal(moved, windows)
    slower = varied(windows, plain.model_copy(update={"stretch": 0.3}), torch.Generator().manual_seed(0))
    assert torch.allclose(slower[:, :, 59:61].mean(2), windows[:, :, 59:61].mean(2), atol=0.02)
    assert not torch.allclose(slower, windows, atol=0.1)
