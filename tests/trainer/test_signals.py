"""Signals: recordings and windows, generated ones, training, export and evaluation of whole detectors."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.export import export_fixed_trunk
from deploy.metrics import image_auroc
from deploy.parity import ParityRules
from deploy.progress import no_progress
from edge.bundle import Engine, Modality, Precision, SignalLayout
from edge.cli import main
from edge.errors import DataError, UsageError
from edge.inference.engines import open_graph
from edge.inference.signals import lost_cells
from trainer.data.signals import Bearing, EcgLike
from trainer.methods.mmae_ecg.model import SIGNAL
from trainer.signals.baselines import PcaMethod, amplitude, pca, peak_to_peak
from trainer.signals.beats import labels_of_beats
from trainer.signals.defects import copies, make_defects
from trainer.signals.evaluate import evaluate_signal
from trainer.signals.export import export_signal_run
from trainer.signals.figures import point_auroc, window_auroc
from trainer.signals.fit import layout_for, split_windows, train
from trainer.signals.reading import read_recordings, training_part, write_recording
from trainer.signals.reading import test_part as labelled_part
from trainer.signals.recording import Recording, around, cut_windows, one_kind
from trainer.signals.runs import SignalRun
from trainer.signals.trunk import SignalTrunk, band_kernel, in_band

pytestmark = pytest.mark.usefixtures("one_thread")


def _recording(samples, **labels) -> Recording:
    values = np.asarray(samples, np.float32)
    return Recording("r", values, 100.0, tuple("abcdefgh"[: len(values)]), "V", **labels)


def test_windows_are_good_anomalous_or_left_out():
    labels = np.zeros(100, bool)
    labels[38:46] = True
    usable = np.ones(100, bool)
    usable[95] = False
    found = cut_windows([_recording(np.arange(200).reshape(2, 100), anomalous=labels, usable=usable, least=4)], 20, 20)
    # 20..39 holds two labelled samples of at least four: neither; 80..99 holds one that is not usable.
    assert found.names.tolist() == ["r@0", "r@40", "r@60"]
    assert found.anomalous.tolist() == [False, True, False]
    assert found.values[1, 1, 0] == 140
    assert found.points[1].sum() == 6


@given(st.integers(2, 30), st.integers(1, 30), st.integers(30, 120))
@settings(max_examples=40, deadline=None)
def test_every_sample_of_a_window_is_the_recordings_own(window, hop, length):
    found = cut_windows([_recording(np.arange(length)[None])], window, hop)
    assert len(found) == (length - window) // hop + 1
    for name, values in zip(found.names, found.values, strict=True):
        begin = int(name.partition("@")[2])
        assert values[0].tolist() == list(range(begin, begin + window))


def test_lost_samples_lie_between_their_neighbours_and_many_leave_the_window_out():
    values = np.tile(np.arange(40.0), (2, 1))
    values[0, 5:7], values[1, 25:] = np.nan, np.nan
    found = cut_windows([_recording(values)], 20, 20)
    assert found.names.tolist() == ["r@0"]
    np.testing.assert_allclose(found.values[0], np.tile(np.arange(20.0), (2, 1)))


@given(st.lists(st.integers(0, 49), max_size=6), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_around_is_what_is_near(places, reach):
    expected = [any(abs(at - place) <= reach for place in places) for at in range(50)]
    assert around(np.array(places, np.int64), reach, 50).tolist() == expected


def test_beats_that_are_not_normal_are_anomalous_and_marks_are_none():
    found = labels_of_beats(np.array([100, 300, 500, 700]), np.array(["N", "V", "+", "~"]), 100.0, 1000)
    assert np.flatnonzero(found["anomalous"]).tolist() == list(range(285, 316))
    assert np.flatnonzero(~found["usable"]).tolist() == [700]
    assert found["least"] == 16
    window = cut_windows([_recording(np.zeros((1, 1000)), **found)], 100, 100)
    assert dict(zip(window.names, window.anomalous, strict=True))["r@300"]


def test_a_recording_comes_back_from_its_file(tmp_path):
    wanted = EcgLike(ectopic=0.3).recording(4, seed=2)
    write_recording(tmp_path / "one.npz", wanted)
    [found] = read_recordings(tmp_path)
    np.testing.assert_array_equal(found.samples, wanted.samples)
    np.testing.assert_array_equal(found.anomalous, wanted.anomalous)
    assert (found.name, found.rate_hz, found.channels, found.unit, found.least) == (
        "one", wanted.rate_hz, wanted.channels, wanted.unit, wanted.least,
    )  # fmt: skip


def test_a_wfdb_record_says_what_its_npz_says(tmp_path):
    wfdb = pytest.importorskip("wfdb", reason="the package wfdb (extra signals) reads WFDB records")
    generator = np.random.default_rng(0)
    counts = generator.integers(-500, 500, (2000, 2))
    wfdb.wrsamp("rec", fs=360, units=["mV", "mV"], sig_name=["MLII", "V1"], d_signal=counts, fmt=["16", "16"],
                adc_gain=[200, 200], baseline=[0, 0], write_dir=str(tmp_path))  # fmt: skip
    wfdb.wrann("rec", "atr", np.array([200, 900, 1500]), ["N", "V", "+"], write_dir=str(tmp_path))
    [read] = read_recordings(tmp_path / "rec.hea")
    npz = tmp_path / "npz" / "rec.npz"
    npz.parent.mkdir()
    np.savez(npz, adc=counts.T.astype(np.int16), gain=np.full(2, 200.0), baseline=np.zeros(2, int), fs=360,
             leads=np.array(["MLII", "V1"]), ann_sample=np.array([200, 900, 1500]),
             ann_symbol=np.array(["N", "V", "+"]))  # fmt: skip
    [other] = read_recordings(npz)
    np.testing.assert_allclose(read.samples, other.samples, atol=1e-6)
    np.testing.assert_array_equal(read.anomalous, other.anomalous)
    assert (read.rate_hz, read.channels, read.unit) == (other.rate_hz, other.channels, "mV")


@pytest.mark.parametrize("content", [b"", b"PK nonsense", None])
def test_what_is_no_recording_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.npz"
    if content is None:
        np.savez(path, signal=np.zeros((2, 10), np.float32))
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz"):
        read_recordings(tmp_path)


def test_a_recording_without_its_rate_is_refused_with_what_it_lacks(tmp_path):
    np.savez(tmp_path / "x.npz", signal=np.zeros((2, 10), np.float32))
    with pytest.raises(DataError, match="it lacks rate_hz"):
        read_recordings(tmp_path)


def test_a_folder_without_recordings_and_recordings_of_two_kinds_are_refused(tmp_path):
    with pytest.raises(DataError, match="no recording"):
        read_recordings(tmp_path)
    with pytest.raises(DataError, match="rate_hz"):
        one_kind([_recording(np.zeros((1, 9))), Recording("s", np.zeros((1, 9), np.float32), 50.0, ("a",), "V")])


def test_a_recording_is_learned_from_before_and_judged_after_two_thirds_of_it(tmp_path):
    write_recording(tmp_path / "one.npz", EcgLike(ectopic=0.2).recording(100, seed=2))
    [first], [last] = training_part(tmp_path), labelled_part(tmp_path)
    assert first.samples.shape[1] + last.samples.shape[1] == 36_000
    assert first.samples.shape[1] == 23_760


def test_holdout_shares_no_sample_with_what_is_learned_from():
    ramp = _recording(np.arange(4000)[None])
    fit, holdout = split_windows([ramp], 100)
    assert fit.values.max() < holdout.values.min()


def test_generated_knocks_come_at_the_rate_of_the_geometry_and_are_labelled():
    bearing = Bearing(fault=1.0, noise=0.0)
    found, same, good = (
        bearing.recording(4, seed=3),
        bearing.recording(4, seed=3),
        Bearing(noise=0.0).recording(4, seed=3),
    )
    np.testing.assert_array_equal(found.samples, same.samples)
    begins = int(found.anomalous[0]) + np.count_nonzero(np.diff(found.anomalous.astype(int)) == 1)
    assert bearing.knocks_hz == pytest.approx(9 / 2 * 29.5 * 0.8)
    assert begins == pytest.approx(4 * bearing.knocks_hz, rel=0.02)
    assert good.anomalous.sum() == 0
    energy = np.square(found.samples - good.samples).mean(0)
    assert energy[found.anomalous].sum() > 0.9 * energy.sum()


def test_a_bearing_knocks_only_while_its_race_is_loaded():
    found = Bearing(fault=1.0, episodes=((1.0, 2.0),)).recording(4, seed=3)
    places = np.flatnonzero(found.anomalous) / found.rate_hz
    assert 0.99 < places.min() < 1.02
    assert 1.98 < places.max() < 2.02


def test_early_beats_are_labelled_where_they_are():
    strange = EcgLike(ectopic=0.3, noise=0.0).recording(60, seed=1)
    assert 5 < np.count_nonzero(np.diff(strange.anomalous.astype(int)) == 1) < 40
    assert EcgLike(ectopic=0.0).recording(60, seed=1).anomalous.sum() == 0


def test_defects_change_what_their_mask_says_and_fade_with_contrast():
    good = cut_windows([EcgLike().recording(40, seed=1)], 360, 360).values
    (strong, mask), (faint, same) = (make_defects(good, seed=4, repeats=2, contrast=c) for c in (1.0, 0.1))
    np.testing.assert_array_equal(mask, same)
    base = np.concatenate([good, good])
    assert np.array_equal(strong[~mask], base[~mask])
    assert mask.any((1, 2)).all()
    np.testing.assert_allclose(faint - base, 0.1 * (strong - base), atol=1e-5)


def test_copies_are_near_their_originals():
    good = cut_windows([EcgLike().recording(20, seed=1)], 360, 360).values
    more, base = copies(good, 50, 0)
    assert len(more) == 50
    np.testing.assert_array_equal(more[: len(good)], good)
    assert np.abs(more - good[base]).max() < 0.1 * np.abs(good).max() + 0.1


def test_pca_takes_off_what_good_windows_span():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 2, 60, generator=generator)
    good = torch.einsum("nk,kcq->ncq", torch.randn(40, 3, generator=generator), basis)
    head = pca(good, 3)
    assert head(good[:, None])[0].max() < 1e-6
    torch.testing.assert_close(head.components @ head.components.T, torch.eye(3), atol=1e-4, rtol=0)
    strange = good.clone()
    strange[:, 1, 20] += 1.0
    assert head(strange[:, None])[0].amax((1, 2)).min() > 0.1
    with pytest.raises(DataError, match="too few"):
        pca(good, 40)
    again = PcaMethod.build(PcaMethod.config("quick"), head.state_dict())
    assert torch.equal(again(strange[:, None])[0], head(strange[:, None])[0])


def test_scores_that_learn_nothing_are_what_they_are_called():
    scaled = np.array([[[0.0, 3.0], [1.0, -1.0]]], np.float32)
    assert peak_to_peak(scaled).tolist() == [3.0]
    assert amplitude(scaled)[0] == pytest.approx((11 / 4) ** 0.5)


def test_intervals_widen_where_windows_overlap():
    generator = np.random.default_rng(0)
    scores = np.repeat(np.r_[generator.normal(0, 1, 40), generator.normal(1, 1, 40)], 5)
    labels = np.repeat(np.r_[np.zeros(40, bool), np.ones(40, bool)], 5)
    mixed = generator.permutation(400)  # so that no two of one group are neighbours
    apart = window_auroc(labels[mixed], scores[mixed], np.arange(400).astype(str))
    together = window_auroc(labels, scores, np.repeat(np.arange(80), 5).astype(str))
    assert apart.value == together.value == image_auroc(labels, scores)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    assert together.low < together.value < together.high


def test_intervals_are_as_wide_as_the_figure_spreads_where_windows_overlap_across_groups():
    steps, windows = 4, 200  # a window begins every quarter of one
    count = windows * steps
    groups = (np.arange(count) // steps).astype(str)
    labels = (np.arange(count) // (20 * steps)) % 2 == 1

    def scores(seed):
        noise = np.random.default_rng(seed).standard_normal(count + steps - 1)
        return np.convolve(noise, np.full(steps, steps**-0.5), "valid") + 0.5 * labels

    spread = np.std([image_auroc(labels, scores(seed)) for seed in range(1000)])
    found = [window_auroc(labels, scores(seed), groups) for seed in range(2000, 2010)]
    assert 0.87 < np.mean([one.high - one.low for one in found]) / (2 * 1.96 * spread) < 1.1


def test_points_are_judged_inside_anomalous_windows_alone():
    points = np.zeros((2, 8), bool)
    points[1, 4:8] = True
    maps = np.array([[[9.0, 9.0]], [[1.0, 2.0]]])
    assert point_auroc(points, maps) == 1.0
    assert point_auroc(points[:1], maps[:1]) is None


def test_a_channel_that_never_changes_is_named():
    values = np.random.default_rng(0).standard_normal((5, 2, 40)).astype(np.float32)
    values[:, 1] = 3.0
    with pytest.raises(DataError, match="channel 1"):
        SignalTrunk.of(values, _layout(2, 40))


def test_channel_in_a_large_unit_is_not_taken_for_a_flat_one() -> None:
    values = np.random.default_rng(0).normal(0, 2e-7, (20, 1, 50)).astype(np.float32)  # amperes
    scaled = SignalTrunk.of(values, _layout(1, 50))(torch.from_numpy(values))[0]
    assert float(scaled.std()) == pytest.approx(1.0, rel=0.01)


def _layout(channels: int, window: int, **band: float) -> SignalLayout:
    names = tuple(f"c{index}" for index in range(channels))
    return SignalLayout(channels=names, unit="mV", rate_hz=360, window=window, hop=window, **band)


@given(st.floats(0.0, 170.0), st.floats(0, 6.28))
@settings(max_examples=60, deadline=None)
def test_band_keeps_what_is_inside_it_in_its_place_and_takes_off_the_rest(hz, phase):
    time = np.arange(1440) / 360
    wave = np.sin(2 * np.pi * hz * time + phase).astype(np.float32)
    kernel = torch.from_numpy(band_kernel(_layout(1, 1440, low_hz=2.0, high_hz=25.0)))
    kept = in_band(torch.from_numpy(wave)[None, None], kernel).numpy()[0, 0]
    half = len(kernel) // 2
    inside, before = kept[half:-half], wave[half:-half]
    if 5 <= hz <= 18:
        np.testing.assert_allclose(inside, before, atol=0.05)
    elif hz < 0.2 or hz > 33:
        assert np.abs(inside).max() < 0.03
    assert np.abs(inside).max() <= 1.05 * max(np.abs(before).max(), 1e-3) + 0.03


def test_band_takes_a_constant_off_wholly_and_no_band_is_no_filter():
    windows = torch.full((2, 3, 720), 7.5)
    kernel = torch.from_numpy(band_kernel(_layout(3, 720, low_hz=1.0)))
    assert float(in_band(windows, kernel).abs().max()) < 1e-4
    assert in_band(windows, torch.from_numpy(band_kernel(_layout(3, 720)))) is windows


@pytest.mark.parametrize("engine", [Engine.ONNXRUNTIME, Engine.OPENVINO])
def test_the_exported_trunk_filters_as_torch_does(tmp_path, engine):
    values = np.random.default_rng(0).normal(3, 2, (20, 2, 720)).astype(np.float32)
    trunk = SignalTrunk.of(values, _layout(2, 720, low_hz=1.0, high_hz=25.0))
    export_fixed_trunk(trunk, tmp_path / "trunk.onnx", shape=(2, 720))
    session = open_graph(tmp_path / "trunk.onnx", engine=engine, precision=Precision.FLOAT32, threads=1)
    found = session.run({"image": values[:1]})[SIGNAL]
    expected = trunk(torch.from_numpy(values[:1]))[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert float(trunk(torch.from_numpy(values))[0].std()) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("band", [{"low_hz": 0.4}, {"high_hz": 50.0}, {"low_hz": 30.0, "high_hz": 20.0}])
def test_a_band_that_the_window_or_the_rate_cannot_hold_is_refused(band):
    with pytest.raises(UsageError, match="Hz"):
        layout_for([_recording(np.zeros((1, 900)))], window_s=2.0, hop_s=None, **band)


def test_a_hop_beyond_the_window_is_refused():
    with pytest.raises(UsageError, match="--hop"):
        layout_for([_recording(np.zeros((1, 900)))], window_s=1.0, hop_s=2.0)


SMALL = {"segments": "16", "local": "8", "width": "16", "depth": "1", "heads": "2", "steps": "60", "passes": "4",
         "loss_gate": "9"}  # fmt: skip
RULES = ParityRules(good_samples=30, defect_samples=30, flipped=1.0, auroc_drop=1.0, shift=50.0)


@pytest.fixture(scope="module")
def bearing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bearing")
    write_recording(folder / "train" / "a.npz", Bearing().recording(5, seed=1))
    write_recording(folder / "test" / "b.npz", Bearing(fault=3.0, episodes=((1, 2),)).recording(3, seed=2))
    return folder


@pytest.fixture(scope="module")
def runs(bearing, tmp_path_factory):
    made = {}
    for method, options in (("mmae_ecg", SMALL), ("pca_residual", {"components": "6"})):
        out = tmp_path_factory.mktemp(method) / "run"
        train(
            method=method, data=bearing, out=out, window_s=0.1, product="spindle", settings=options,
            device="cpu", progress=no_progress,
        )  # fmt: skip
        made[method] = out
    return made


@pytest.mark.parametrize("method", ["mmae_ecg", pytest.param("pca_residual", marks=pytest.mark.slow)])
def test_a_detector_of_a_signal_is_trained_proved_packed_and_judges_as_torch_does(bearing, runs, tmp_path, method):
    run = SignalRun.load(runs[method])
    layout = run.record.signal
    assert (layout.channels, layout.unit, layout.rate_hz) == (("radial x", "radial y", "axial"), "g", 5120.0)
    assert (layout.window, layout.hop) == (512, 256)
    bundle = export_signal_run(runs[method], tmp_path / "bundle", rules=RULES, progress=no_progress)
    manifest = bundle.manifest
    assert (manifest.modality, manifest.signal, manifest.product) == (Modality.SIGNAL, layout, "spindle")
    assert manifest.moments_file is None
    by_run = evaluate_signal(run=runs[method], bundle=None, data=bearing)
    by_box = evaluate_signal(
        run=None, bundle=bundle.path, data=bearing, precision=Precision.FLOAT32, json=tmp_path / "f.json",
        report=tmp_path / "r.html", picture=tmp_path / "p.png",
    )  # fmt: skip
    np.testing.assert_allclose(by_box.maps, by_run.maps, rtol=1e-3, atol=1e-4 * by_run.maps.max())
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["window_auroc"] == pytest.approx(by_run.figures()["window_auroc"], abs=0.01)
    assert set(figures["baselines"]) == {"PCA-8 residual", "PCA-32 residual", "peak to peak", "amplitude"}
    text = (tmp_path / "r.html").read_text()
    assert "Not a medical device" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert text.count("<polyline") >= 3
    assert bundle.id in text
    assert "default-src 'none'" in text
    assert all(re.search(r"radial x, -?[\d.e-]+ to [\d.e-]+ g</text>", one) for one in text.split("<svg")[1:])
    assert "Run" in by_run.notes[-1]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_usual_commands_train_export_and_evaluate_a_signal(bearing, tmp_path, monkeypatch):
    def lineward(*words):
        monkeypatch.setattr("sys.argv", ["lineward", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0

    run, bundle = tmp_path / "run", tmp_path / "bundle"
    code = lineward(
        "train", "--modality", "signal", "--data", bearing, "--out", run, "--window", "0.1", "--set", "components=6",
    )  # fmt: skip
    assert code == 0
    assert SignalRun.load(run).record.method == "pca_residual"
    assert lineward("evaluate", "--run", run, "--data", bearing, "--report", tmp_path / "r.html") == 0
    assert (tmp_path / "r.html").stat().st_size > 1000
    assert lineward("train", "--modality", "signal", "--method", "memory", "--data", bearing, "--out", bundle) == 2


def test_cells_over_lost_samples_say_nothing_in_an_evaluation_as_on_a_box(runs, tmp_path):
    recording = Bearing(fault=3.0, episodes=((0, 1),)).recording(1, seed=2)
    window = SignalRun.load(runs["pca_residual"]).record.signal.window
    recording.samples[0, : window // 50] = np.nan
    write_recording(tmp_path / "test" / "x.npz", recording)
    found = evaluate_signal(run=runs["pca_residual"], bundle=None, data=tmp_path).maps
    dead = lost_cells(recording.samples[:, :window], found[0].shape, 0.05)
    assert dead.any()
    np.testing.assert_array_equal(found[0] == 0, dead)
    assert (found[1:] > 0).all()


def test_evaluating_another_signal_is_refused(runs, tmp_path):
    write_recording(tmp_path / "test" / "x.npz", EcgLike(ectopic=0.5).recording(6, seed=1))
    with pytest.raises(DataError, match="the detector judges radial x"):
        evaluate_signal(run=runs["pca_residual"], bundle=None, data=tmp_path)


def test_a_damaged_run_is_named(runs, tmp_path):
    run = SignalRun.load(runs["pca_residual"])
    run.path = tmp_path / "copy"
    run.save()
    (tmp_path / "copy" / "head.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="train again"):
        SignalRun.load(tmp_path / "copy")
    with pytest.raises(DataError, match="lineward train"):
        SignalRun.load(tmp_path)
