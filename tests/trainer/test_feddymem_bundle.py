"""The fleet memory in a bundle: its layout, what a box recalibrates with, its canaries; on both engines and in int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.aggregator.canaries import read_canaries
from deploy.parity import ParityRules
from edge.bundle import Bundle, Engine, MemoryLayout, Precision, Preprocessing, load_arrays
from edge.errors import DataError, UsageError
from edge.inference.detector import Detector
from edge.inference.state import stored_state
from edge.memory.banks import packed_banks
from edge.memory.search import anomaly_map, nearest
from trainer import canaries as making
from trainer import export as exporting
from trainer.canaries import ALARM, write_canaries
from trainer.data.conveyor import write_default
from trainer.data.generic import generic_canvases
from trainer.export import export_run
from trainer.fit import train
from trainer.methods.feddymem.embed import embed_tiles
from trainer.methods.feddymem.model import FedDyMemHead

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trainer.runs import Run

RULES = ParityRules(shift=4.0, flipped=0.2, auroc_drop=0.2, good_samples=32, defect_samples=32)
HELD_OUT = 8


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def caches(request: pytest.FixtureRequest) -> Iterator[None]:
    generic = generic_canvases(64)[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "generic_canvases", lambda: generic)
        patch.setattr(making, "_IMAGES", 24)
        patch.setenv("LINEWARD_CACHE", str(request.config.cache.mkdir("lineward")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_default(
        tmp_path_factory.mktemp("web"), seed=6, kind="cloth", train=20, test_good=1, test_defective=1, side=96
    )


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(
        method="feddymem", data=data, out=tmp_path_factory.mktemp("run") / "run", product="web", device="cpu",
        preprocessing=Preprocessing(height=64, width=64), settings={"rows": 60, "fleet_rows": 90, "smoothing": 1},
        progress=quiet,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_run(run.path, tmp_path_factory.mktemp("bundle") / "bundle", rules=RULES, progress=quiet)


def detectors(bundle: Bundle) -> list[Detector]:
    return [
        Detector.open(bundle, engine=engine, precision=precision, threads=1)
        for engine, precision in bundle.calibrated()
        if precision is not Precision.BFLOAT16
    ]


def test_manifest_says_how_a_box_computes_the_map(bundle: Bundle) -> None:
    assert bundle.manifest.memory == MemoryLayout(
        local="bank_local", fleet="bank_fleet", grid=(8, 8), smoothing=1, background=0.3
    )
    assert {tensor.name: tensor.shape for tensor in bundle.manifest.state} == {
        "bank_local": (60, 96),
        "bank_fleet": (90, 96),
    }
    banks = packed_banks(stored_state(bundle), bundle.manifest.memory)
    assert banks.fleet is None


def test_commissioning_holds_all_held_out_images_and_their_groups(bundle: Bundle, run: Run) -> None:
    assert bundle.manifest.commissioning_file is not None
    arrays = load_arrays(bundle.file(bundle.manifest.commissioning_file))
    assert arrays["groups"].tolist() == run.holdout_groups.tolist()
    assert arrays["embedding_float32"].shape == arrays["embedding_int8"].shape == (HELD_OUT, 1, 64, 96)
    assert arrays["embedding_float32"].dtype == np.float16


def test_every_engine_gives_the_rows_of_torch_and_the_map_of_numpy(bundle: Bundle, run: Run) -> None:
    layout = bundle.manifest.memory
    assert layout is not None
    assert isinstance(run.head, FedDyMemHead)
    expected = embed_tiles(run.head, run.trunk, run.holdout[:2], batch=1)
    assert expected.shape == (2, 64, 96)
    banks = packed_banks(stored_state(bundle), layout).rows
    found = detectors(bundle)
    assert {d.status.engine for d in found} == set(Engine)
    for detector in found:
        assert detector.status.fallback_reason == ""
        for canvas, rows in zip(run.holdout, expected, strict=False):
            embedding = detector.embeddings_of_canvas(canvas)
            if detector.status.precision is Precision.FLOAT32:
                np.testing.assert_allclose(embedding[0], rows, atol=1e-4)
            direct = detector.map_of_canvas(canvas)
            said = anomaly_map(embedding, banks, layout, bundle.manifest.preprocessing, bundle.manifest.map_stride)
            assert np.abs(said - direct).max() <= 1e-3 * np.abs(direct).max()


def test_a_fleet_bank_is_searched_at_once_and_far_rows_do_not_saturate_int8(bundle: Bundle, run: Run) -> None:
    layout = bundle.manifest.memory
    assert layout is not None
    for detector in detectors(bundle):
        state = stored_state(bundle)
        before, rows = detector.map_of_canvas(run.holdout[0]), detector.embeddings_of_canvas(run.holdout[0])
        far = 50 * np.ones((30, 96), np.float32)
        state[layout.fleet] = np.concatenate([rows[0, :60], far]).astype(np.float32)
        detector.switch_state(state).result()
        after = detector.map_of_canvas(run.holdout[0])
        banks = [state[layout.local], state[layout.fleet]]
        said = anomaly_map(rows, banks, layout, bundle.manifest.preprocessing, bundle.manifest.map_stride)
        assert np.abs(said - after).max() <= 2e-3 * np.abs(before).max()
        assert after.max() < before.max()


def test_canaries_are_rows_of_the_bundles_space_on_both_sides_of_the_threshold(
    bundle: Bundle, data: Path, tmp_path: Path
) -> None:
    for precision in (Precision.FLOAT32, Precision.INT8):
        out = tmp_path / "canaries" / f"web-{precision.value}.npz"
        made = write_canaries(bundle, data, out, precision=precision, progress=quiet)
        read = read_canaries(out)
        assert (read.embedding_id, read.product) == (bundle.manifest.embedding_id[precision], "web")
        assert np.array_equal(read.defect, made.defect)
        assert read.good.shape == (HELD_OUT * 64, 96)
        assert bundle.manifest.memory is not None
        bank = packed_banks(stored_state(bundle), bundle.manifest.memory).local
        assert np.sqrt(nearest(read.defect, bank)[0]).min() > read.threshold
        assert np.mean(np.sqrt(nearest(read.good, bank)[0]) <= read.threshold) == pytest.approx(ALARM, abs=0.005)
        again = write_canaries(bundle, data, tmp_path / "again.npz", precision=precision, progress=quiet)
        other = write_canaries(bundle, data, tmp_path / "other.npz", precision=precision, seed=1, progress=quiet)
        assert np.array_equal(again.defect, made.defect)
        assert not np.array_equal(other.defect[:5], made.defect[:5])
        assert np.array_equal(other.good, made.good)


def test_canaries_of_other_images_use_all_of_them(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "ALARM", 0.5)  # few and small images: some defect has to lie beyond it
    monkeypatch.setattr(making, "_IMAGES", 100)
    other = tmp_path / "other" / "train" / "good"
    other.mkdir(parents=True)
    for path in sorted((data / "train" / "good").iterdir())[:5]:
        (other / path.name).write_bytes(path.read_bytes())
    made = write_canaries(bundle, tmp_path / "other", tmp_path / "c.npz", progress=quiet)
    assert len(made.good) == 5 * 64


def test_canaries_without_a_defect_that_alarms_are_refused(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(canvases: np.ndarray, **_: object) -> tuple[np.ndarray, np.ndarray]:
        return canvases, np.zeros(canvases.shape[:3], np.bool_)

    monkeypatch.setattr(making, "make_defects", untouched)
    with pytest.raises(DataError, match="no synthetic defect alarms"):
        write_canaries(bundle, data, tmp_path / "c.npz", progress=quiet)
    assert not (tmp_path / "c.npz").exists()


def test_canaries_command_names_what_it_cannot_use(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    import typer

    from trainer.cli import canaries

    app = typer.Typer()
    app.command()(canaries)

    def said(*extra: str) -> object:
        arguments = ["--bundle", str(bundle.path), "--data", str(data), "--out", str(tmp_path / "c.npz"), *extra]
        return CliRunner().invoke(app, arguments)

    done = said()
    assert (done.exit_code, (tmp_path / "c.npz").exists()) == (0, True)
    assert bundle.manifest.embedding_id[Precision.INT8] in done.output
    failed = said("--precision", "int4")
    assert isinstance(failed.exception, UsageError)
