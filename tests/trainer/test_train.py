"""Training end to end on a small generated folder, the same for every method; run folders; bad input."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch

from deploy.parity import LEAST_GOOD_IMAGES
from edge.bundle import Pooling, Preprocessing
from edge.errors import DataError, UsageError
from trainer import fit as fitting
from trainer import runs
from trainer.data.conveyor import write_default
from trainer.data.folder import read_folder
from trainer.fit import choose_device, choose_pooling, preprocessing_for, train
from trainer.methods.registry import get, methods
from trainer.runs import Run
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METHODS = sorted(methods())
FILES = ("run.json", "head.safetensors", "holdout.npz", "reference.npz")
SIZE = Preprocessing(height=64, width=64)


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


def fit(method: str, data: Path, out: Path, **options: Any) -> Run:
    wanted = {"preprocessing": SIZE, "device": "cpu", **options}
    return train(method=method, data=data, out=out, progress=quiet, **wanted)


@pytest.fixture(scope="module", autouse=True)
def brief_methods(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fewer steps and rows, and no cache in the home folder: these tests are of what surrounds a method."""
    small = {"steps": 8, "rows": 40, "candidates": 400, "batch_rows": 256, "anomalies": 12}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEWARD_CACHE", str(request.config.cache.mkdir("lineward")))
        for method in methods().values():

            def brief(preset: str, original: Any = method.config) -> Any:
                config = original(preset)
                return config.model_copy(update={k: v for k, v in small.items() if k in type(config).model_fields})

            patch.setattr(method, "config", brief)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cloth")
    return write_default(folder, seed=2, kind="cloth", train=16, test_good=3, test_defective=4, side=72)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {method: fit(method, data, folder / method, product="web") for method in METHODS}


def good_images(root: Path, count: int, side: int = 64) -> Path:
    rng = np.random.default_rng(count)
    folder = root / "train" / "good"
    folder.mkdir(parents=True)
    for index in range(count):
        image = np.clip(rng.normal(120, 20, (side, side, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{index:03d}.png"), image)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_train_leaves_a_whole_run_folder(trained: dict[str, Run], method: str) -> None:
    run = trained[method]
    assert {path.name for path in run.path.iterdir()} == set(FILES)
    record = json.loads((run.path / "run.json").read_text())
    assert (record["method"], record["product"], record["seed"]) == (method, "web", 0)
    assert record["train_images"] + len(run.holdout) == 16
    assert run.holdout.shape == (8, 64, 64, 3)
    assert set(record["validation"]) >= {f"image_auroc_{record['pooling']['cells']}_cells"}


@pytest.mark.parametrize("method", METHODS)
def test_load_judges_with_the_same_bits(trained: dict[str, Run], method: str) -> None:
    run, loaded = trained[method], Run.load(trained[method].path)
    assert loaded.record == run.record
    assert np.array_equal(loaded.holdout, run.holdout)
    assert loaded.holdout_groups.tolist() == run.holdout_groups.tolist()
    for canvas in run.holdout[:3]:
        assert np.array_equal(loaded.judge(canvas), run.judge(canvas))
    assert np.isfinite(loaded.holdout_scores()).all()


@pytest.mark.parametrize("method", METHODS)
def test_train_same_seed_gives_the_same_bytes_and_another_seed_others(
    trained: dict[str, Run], data: Path, tmp_path: Path, method: str
) -> None:
    first = (trained[method].path / "head.safetensors").read_bytes()
    assert (fit(method, data, tmp_path / "again").path / "head.safetensors").read_bytes() == first
    assert (fit(method, data, tmp_path / "other", seed=1).path / "head.safetensors").read_bytes() != first


@pytest.mark.parametrize("method", METHODS)
def test_train_never_opens_test_images(trained: dict[str, Run], data: Path, tmp_path: Path, method: str) -> None:
    poisoned = tmp_path / "data"
    shutil.copytree(data, poisoned)
    for path in [*poisoned.glob("test/*/*.png"), *poisoned.glob("ground_truth/*/*.png")]:
        path.write_bytes(b"not an image")
    run = fit(method, poisoned, tmp_path / "run")
    assert (run.path / "head.safetensors").read_bytes() == (trained[method].path / "head.safetensors").read_bytes()
    assert run.record.data_sha256 == trained[method].record.data_sha256
    for part in ("test", "ground_truth"):
        shutil.rmtree(poisoned / part)
    (poisoned / "meta.csv").unlink()
    fit(method, poisoned, tmp_path / "bare")


def test_holdout_shares_no_group_with_training(tmp_path: Path) -> None:
    data = good_images(tmp_path, 60)
    rows = ["path,group", *(f"train/good/{index:03d}.png,part{index // 5}" for index in range(60))]
    (data / "meta.csv").write_text("\n".join(rows))
    samples = read_folder(data).train
    split = fitting.hold_out(data, samples, 3)
    assert not {sample.group for sample in split.fit} & {sample.group for sample in split.holdout}
    assert len(split.fit) + len(split.holdout) == 60


def test_holdout_of_a_large_set_is_bounded_and_shares_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "HOLDOUT_MAXIMUM", 10)
    data = good_images(tmp_path, 100, side=8)
    rows = ["path,group", *(f"train/good/{index:03d}.png,part{index // 4}" for index in range(100))]
    (data / "meta.csv").write_text("\n".join(rows))
    split = fitting.hold_out(data, read_folder(data).train, 0)
    assert not {sample.group for sample in split.fit} & {sample.group for sample in split.holdout}
    assert 8 <= len(split.holdout) <= 15


@pytest.mark.parametrize("method", METHODS)
def test_train_twelve_images_are_enough(tmp_path: Path, method: str) -> None:
    run = fit(method, good_images(tmp_path / "data", 2 * LEAST_GOOD_IMAGES), tmp_path / "run")
    assert (run.record.train_images, len(run.holdout)) == (LEAST_GOOD_IMAGES, LEAST_GOOD_IMAGES)


@pytest.mark.parametrize("count", [1, 4, 10, 11])
def test_train_fewer_images_are_refused_before_anything_is_computed(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=f"{count} images of good parts are too few.*at least 12"):
        fit("memory", good_images(tmp_path / "data", count), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_train_groups_that_leave_too_little_are_refused(tmp_path: Path) -> None:
    data = good_images(tmp_path / "data", 30)
    rows = ["path,group", *(f"train/good/{index:03d}.png,{'a' if index < 28 else 'b'}" for index in range(30))]
    (data / "meta.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"30 images in 2 groups .*meta\.csv"):
        fit("memory", data, tmp_path / "run")


def test_train_tiles_and_crop(tmp_path: Path) -> None:
    data = good_images(tmp_path / "data", 12, side=120)
    wanted = preprocessing_for(size=(64, 64), tiles=(2, 1), overlap=32, crop=(10, 5, 100, 110))
    for method in METHODS:
        run = fit(method, data, tmp_path / method, preprocessing=wanted)
        stride = run.head.map_stride
        assert run.judge(run.holdout[0]).shape == (96 // stride, 64 // stride)
        assert Run.load(run.path).record.preprocessing == wanted


def test_train_an_image_smaller_than_the_crop_is_named(tmp_path: Path) -> None:
    data = good_images(tmp_path / "data", 12, side=64)
    wanted = preprocessing_for(size=(64, 64), tiles=(1, 1), overlap=0, crop=(0, 0, 100, 100))
    with pytest.raises(DataError, match=r"\d\d\d\.png: .*too small for the crop"):
        fit("memory", data, tmp_path / "run", preprocessing=wanted)


def test_train_a_corrupt_image_is_named(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    path = broken / "train" / "good" / "0005.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"0005\.png"):
        fit("memory", broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, {}, {"train/good/readme.txt": b"none"}])
def test_train_without_images_is_refused(tmp_path: Path, content: dict[str, bytes] | None) -> None:
    data = tmp_path / "data"
    for name, text in (content or {}).items():
        (data / name).parent.mkdir(parents=True)
        (data / name).write_bytes(text)
    if content is not None:
        data.mkdir(exist_ok=True)
    with pytest.raises(DataError, match="data"):
        fit("memory", data, tmp_path / "run")


@pytest.mark.parametrize("foreign", ["notes.txt", "folder", ""])
def test_train_an_out_with_other_files_is_left_alone(data: Path, tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    if foreign == "folder":
        (out / foreign).mkdir(parents=True)
    elif foreign:
        out.mkdir()
        (out / foreign).write_text("mine")
    else:
        out.write_text("a file")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="--out"):
        fit("memory", data, out)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_train_takes_the_place_of_an_earlier_run_or_of_what_one_left(
    trained: dict[str, Run], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained["pbas"].path, out)
    (out / ".saving-cut-off").mkdir()
    assert fit("memory", data, out).record.method == "memory"
    assert Run.load(out).record.method == "memory"
    (out / "run.json").unlink()
    assert fit("pbas", data, out).record.method == "pbas"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nothing"}, "--method nothing"),
        ({"preset": "fast"}, "--preset fast"),
        ({"device": "tpu"}, "--device tpu"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed"),
        ({"product": ""}, "--product"),
    ],
)
def test_train_a_wrong_argument_is_named(data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(**{"method": "memory", "data": data, "out": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_choose_device_without_a_gpu() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UsageError, match="no GPU"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"size": (100, 64)}, "height"),
        ({"size": (0, 0)}, "height"),
        ({"tiles": (0, 1)}, "rows"),
        ({"tiles": (17, 1)}, "rows"),
        ({"overlap": 8}, "overlap"),
        ({"overlap": 64, "size": (64, 64)}, "overlap"),
        ({"crop": (-1, 0, 5, 5)}, "x"),
        ({"crop": (0, 0, 0, 5)}, "w"),
    ],
)
def test_preprocessing_out_of_range_names_the_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=f"--.*{field}"):
        preprocessing_for(**{"size": None, "tiles": (1, 1), "overlap": 0, "crop": None, **options})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_load_a_truncated_file_is_named(trained: dict[str, Run], tmp_path: Path, name: str, kept: float) -> None:
    for method in METHODS:
        folder = tmp_path / method
        shutil.copytree(trained[method].path, folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(kept * len(content))])
        with pytest.raises(DataError, match=name):
            Run.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_load_a_missing_file_is_named(trained: dict[str, Run], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained["memory"].path, folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        Run.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "nothing"},
        {"config": {"no_such_key": 1}},
        {"unknown": 1},
        {"seed": "x"},
        {"preprocessing": {"height": 65, "width": 64}},
    ],
)
def test_load_a_record_of_another_release_is_refused(
    trained: dict[str, Run], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained["memory"].path, folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(DataError, match=r"run\.json"):
        Run.load(folder)


def test_load_files_of_two_runs_are_not_mixed(trained: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained["memory"].path, folder)
    shutil.copy(trained["pbas"].path / "head.safetensors", folder)
    with pytest.raises(DataError, match=r"head\.safetensors"):
        Run.load(folder)
    shutil.copy(trained["memory"].path / "head.safetensors", folder)
    for name, names in (("reference", "subclasses"), ("holdout", "groups")):
        np.savez(folder / f"{name}.npz", canvas=np.zeros((4, 32, 32, 3), np.uint8), **{names: np.array(list("abcd"))})
        with pytest.raises(DataError, match=rf"{name}\.npz: canvases are .*, not uint8"):
            Run.load(folder)
        shutil.copy(trained["memory"].path / f"{name}.npz", folder)


def test_load_names_that_do_not_fit_the_images_are_told(trained: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained["memory"].path, folder)
    np.savez(folder / "reference.npz", canvas=np.zeros((4, 64, 64, 3), np.uint8), subclasses=np.array(list("abc")))
    with pytest.raises(DataError, match=r"reference\.npz: 3 subclasses for 4 canvases"):
        Run.load(folder)


def test_a_run_of_an_earlier_release_is_read_without_what_it_lacks(trained: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained["memory"].path, folder)
    record = json.loads((folder / "run.json").read_text())
    assert record.pop("reference_images") == 8
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "reference.npz").unlink()
    run = Run.load(folder)
    np.savez(folder / "holdout.npz", canvas=run.holdout, groups=run.holdout_groups)
    run = Run.load(folder)
    assert (len(run.holdout), len(run.holdout_subclasses), len(run.reference)) == (8, 0, 0)
    run.path = tmp_path / "again"
    run.save()
    assert Run.load(run.path).record.reference_images == 0


def test_training_keeps_some_of_what_it_saw_of_every_subclass(tmp_path: Path) -> None:
    data = good_images(tmp_path, 24)
    rows = ["path,condition", *(f"train/good/{i:03d}.png,{'day' if i < 16 else 'night'}" for i in range(24))]
    (data / "meta.csv").write_text("\n".join(rows))
    run = Run.load(fit("adapted_moe", data, tmp_path / "run").path)
    assert Counter(run.holdout_subclasses.tolist()) == {"day": 4, "night": 4}
    assert Counter(run.reference_subclasses.tolist()) == {"day": 12, "night": 4}
    assert run.record.reference_images == len(run.reference) == 16
    pixels = {one.tobytes() for one in run.reference}
    assert not pixels & {one.tobytes() for one in run.holdout}


def test_images_that_stand_for_a_subclass_are_bounded_and_spread() -> None:
    labels = np.array(["a"] * 1000 + ["b"] * 3)
    kept = fitting.drawn_evenly(labels)
    assert Counter(labels[kept].tolist()) == {"a": 64, "b": 3}
    assert np.diff(kept[:64]).max() <= 17
    many = np.repeat(np.arange(40).astype(str), 50)
    assert Counter(many[fitting.drawn_evenly(many)].tolist()) == dict.fromkeys(np.unique(many).tolist(), 10)


@pytest.mark.parametrize("step", ["save_file", "savez", "replace"])
def test_save_on_a_full_disk_leaves_nothing_or_the_earlier_run(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Run.load(trained["memory"].path)
    with monkeypatch.context() as patch:
        targets = {
            "save_file": (runs, "save_file"),
            "savez": (np, "savez_compressed"),
            "replace": (runs.Path, "replace"),
        }
        patch.setattr(*targets[step], full)
        run.path = tmp_path / "new"
        with pytest.raises(DataError, match="No space left on device"):
            run.save()
        assert not run.path.exists()
        run.path = tmp_path / "earlier"
        shutil.copytree(trained["pbas"].path, run.path)
        with pytest.raises(DataError, match="No space left"):
            run.save()
        assert not list(run.path.glob(".saving-*"))
    if step == "replace":  # the one step that cannot be undone: what is left is no run
        assert not (run.path / "run.json").exists()
    else:
        assert Run.load(run.path).record.method == "pbas"


def test_save_when_the_disk_takes_no_more_bytes(trained: dict[str, Run], tmp_path: Path) -> None:
    """A real limit: the file system refuses, and each library words it in its own way."""
    run = Run.load(trained["memory"].path)
    run.path = tmp_path / "run"
    weights = (trained["memory"].path / "head.safetensors").stat().st_size
    run.holdout = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)  # larger, incompressible
    run.holdout_groups = np.arange(60).astype(np.str_)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (weights // 2, weights + 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DataError, match="cannot be written"):
                run.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not run.path.exists()


def test_make_defects_same_places_at_every_contrast(trained: dict[str, Run]) -> None:
    canvases = trained["memory"].holdout
    for options in ({}, {"repeats": 2}, {"defects": 3, "size": (0.15, 0.4)}):
        masks = [make_defects(canvases, seed=5, contrast=c, **options)[1] for c in (None, 0.02, 0.4, 1.0)]
        assert all(np.array_equal(masks[0], other) for other in masks[1:])
        assert masks[0].any(axis=(1, 2)).all()


def test_make_defects_change_what_the_mask_covers_and_nothing_else(trained: dict[str, Run]) -> None:
    canvases = trained["memory"].holdout
    before = canvases.copy()
    images, masks = make_defects(canvases, seed=5, contrast=1.0, repeats=2)
    assert images.shape == (16, 64, 64, 3)
    assert np.array_equal(canvases, before)
    changed = (images != np.concatenate([canvases, canvases])).any(-1)
    assert (changed == masks).mean() > 0.99
    faint, _ = make_defects(canvases, seed=5, contrast=0.05, repeats=2)
    double = np.concatenate([canvases, canvases]).astype(int)
    assert np.abs(faint - double).sum() < 0.3 * np.abs(images.astype(int) - double).sum()
    assert not np.array_equal(make_defects(canvases, seed=6, contrast=1.0)[1], masks[:8])


def map_with(cells: int, height: float, noise: np.random.Generator, peak: float = 0.0) -> np.ndarray:
    anomaly_map = noise.normal(0, 0.1, (20, 20)).astype(np.float32)
    anomaly_map.ravel()[:cells] += height
    anomaly_map[-1, -1] += peak
    return anomaly_map


def test_choose_pooling_single_cells_ask_for_the_maximum() -> None:
    noise = np.random.default_rng(0)
    good = np.stack([map_with(0, 0, noise) for _ in range(30)])
    defective = np.stack([map_with(1, 1.0, noise) for _ in range(30)])
    rule, found = choose_pooling(good, defective)
    assert rule == Pooling(cells=1)
    assert found["image_auroc_1_cells"] == 1.0


def test_choose_pooling_lone_spikes_on_good_images_ask_for_more_cells() -> None:
    noise = np.random.default_rng(0)
    good = np.stack([map_with(0, 0, noise, peak=noise.uniform(0, 2)) for _ in range(60)])
    defective = np.stack([map_with(8, 0.5, noise, peak=noise.uniform(0, 2)) for _ in range(60)])
    rule, found = choose_pooling(good, defective)
    assert rule.cells > 1
    assert found[f"image_auroc_{rule.cells}_cells"] > found["image_auroc_1_cells"] + 0.05
    best = max(found.values())
    assert not any(v >= best - 0.002 and int(k.split("_")[2]) < rule.cells for k, v in found.items())


def test_registry_names_each_method_once() -> None:
    assert set(METHODS) >= {"pbas", "memory"}
    assert all(get(name).name == name for name in METHODS)
