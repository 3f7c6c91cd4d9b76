"""Distillation end to end on small generated webs: what a student run holds, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploy.parity import ParityRules
from edge.bundle import Precision, Preprocessing
from edge.errors import DataError, GateError, UsageError
from edge.inference.engines import available_engines
from trainer import export as exporting
from trainer import fit
from trainer.data.conveyor import write_default
from trainer.data.generic import generic_canvases
from trainer.distill import command, gallery
from trainer.distill.latency import Timing
from trainer.distill.student import Student
from trainer.evaluation.command import evaluate
from trainer.export import export_run
from trainer.fit import train
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.registry import methods
from trainer.runs import Run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Few samples of small images: the limits are those of a smoke test. The gate's own limits have their own tests.
RULES = ParityRules(shift=4.0, flipped=0.2, auroc_drop=0.2, good_samples=20, defect_samples=20)
GRID: dict[str, Any] = {"blocks": (6,), "sizes": (64,), "rows": (8,), "device": "cpu", "rules": RULES}


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    """Quantise on a smaller generic set, keep trunks between runs out of the home folder, and train briefly."""
    generic = generic_canvases(64)[::6]
    memory = MemoryMethod.config("quick").model_copy(update={"rows": 40, "candidates": 400})
    student = Student.config("quick").model_copy(
        update={"steps": 12, "relit": 4, "defects": 12, "candidates": 300, "width": 8}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "generic_canvases", lambda: generic)
        patch.setattr(command, "generic_canvases", lambda: generic)
        patch.setattr(MemoryMethod, "config", lambda _preset: memory)
        patch.setattr(Student, "config", lambda _preset: student)
        patch.setattr(gallery, "_VALIDATION_DEFECTS", 24)
        patch.setattr(fit, "_VALIDATION_DEFECTS", 24)
        patch.setenv("LINEWARD_CACHE", str(request.config.cache.mkdir("lineward")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    return write_default(folder, seed=4, kind="metal", train=16, test_good=12, test_defective=12, side=96)


@pytest.fixture(scope="module")
def teachers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers")
    wanted = {"lite0": 96, "lite2": 64}
    return [
        train(
            method="memory",
            data=data,
            out=folder / trunk,
            trunk=trunk,
            preprocessing=Preprocessing(height=side, width=side),
            product="web",
            device="cpu",
            progress=quiet,
        ).path
        for trunk, side in wanted.items()
    ]


@pytest.fixture(scope="module")
def student(data: Path, teachers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the second best of two: the gate, which has its own tests, is made to refuse the best in int8."""
    out = tmp_path_factory.mktemp("student") / "run"
    asked: list[Path] = []

    def pack(path: Path, *arguments: Any, **options: Any) -> Any:
        asked.append(path)
        return refused("shift of 0.9") if len(asked) == 1 else export_run(path, *arguments, **options)

    grid = {**GRID, "rows": (8, 24), "budget_ms": 1000.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "export_run", pack)
        run = command.distill(teachers=teachers, data=data, out=out, progress=quiet, **grid)
    assert len(asked) == 2
    return run


def refused(text: str) -> SimpleNamespace:
    """Return what packing says where an int8 path is refused."""
    paths = [{"engine": available_engines()[0].value, "precision": "int8", "refusals": [text]}]
    return SimpleNamespace(manifest=SimpleNamespace(calibration=(), parity={"paths": paths}))


def test_distill_leaves_a_run_that_loads_and_judges_with_the_same_bits(student: Run) -> None:
    loaded = Run.load(student.path)
    assert loaded.record == student.record
    for canvas in student.holdout[:3]:
        assert np.array_equal(loaded.judge(canvas), student.judge(canvas))


def test_distill_records_teachers_candidates_and_the_choice(student: Run) -> None:
    record = json.loads((student.path / "run.json").read_text())
    found = record["distillation"]
    assert record["method"] == "student"
    assert record["method"] not in methods()
    assert [(t["method"], t["trunk"], t["height"]) for t in found["teachers"]] == [
        ("memory", "lite0", 96),
        ("memory", "lite2", 64),
    ]
    assert sorted(c["rows"] for c in found["candidates"]) == [8, 24]
    for candidate in found["candidates"]:
        assert 0 < candidate["milliseconds_low"] <= candidate["milliseconds"] <= candidate["milliseconds_high"]
        assert candidate["fits"]
        assert candidate["bytes"] > 100_000
    best = found["candidates"][found["chosen"]]
    assert best["image_auroc"] == pytest.approx(max(record["validation"].values()))
    assert record["trunk"]["blocks"] == best["blocks"] == len(student.trunk.blocks)
    assert record["config"]["rows"] == best["rows"] == len(student.head.get_buffer("bank_s8"))


def test_distill_a_student_that_the_gate_refuses_in_int8_makes_way_for_the_next(student: Run) -> None:
    found = student.record.distillation
    assert found is not None
    kept, other = found.candidates[found.chosen], found.candidates[1 - found.chosen]
    assert kept.refused == ()
    assert other.refused == ("shift of 0.9",)
    assert other.image_auroc >= kept.image_auroc


def test_student_exports_passes_the_gate_and_evaluates_as_any_run(student: Run, data: Path, tmp_path: Path) -> None:
    bundle = export_run(student.path, tmp_path / "bundle", rules=RULES, progress=quiet)
    assert {pair[1] for pair in bundle.calibrated()} >= {Precision.FLOAT32, Precision.INT8}
    figures = {}
    for name, subject in (("run", {"run": student.path}), ("bundle", {"bundle": bundle.path})):
        extra = {"precision": Precision.FLOAT32} if name == "bundle" else {}
        out = tmp_path / f"{name}.json"
        report = tmp_path / f"{name}.html"
        evaluate(**{"run": None, "bundle": None, **subject}, data=data, json=out, report=report, alpha=0.1, **extra)
        figures[name] = json.loads(out.read_text())["image_auroc"]
    page = (tmp_path / "run.html").read_text()
    assert "Students that were tried" in page
    assert page.count("lite0, 6 blocks, 64x64") >= 2
    assert "Students that were tried" not in (tmp_path / "bundle.html").read_text()
    assert figures["run"] > 0.6
    assert figures["bundle"] == pytest.approx(figures["run"], abs=0.01)


@pytest.fixture
def three_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the export of shapes: each takes 3 ms."""
    monkeypatch.setattr(command, "export_shapes", lambda wanted, *_, **__: wanted)
    monkeypatch.setattr(command, "measure", lambda exported: [Timing(3.0, 2.9, 3.1)] * len(exported))


@pytest.mark.usefixtures("three_ms")
def test_distill_a_budget_that_nothing_fits_names_the_fastest(data: Path, teachers: list[Path], tmp_path: Path) -> None:
    said = r"--budget-ms 2\.5: no student fits; the fastest, lite0 of 6 blocks .* takes 3\.00 ms \(2\.90 to 3\.10\)"
    with pytest.raises(UsageError, match=said):
        command.distill(teachers=teachers, data=data, out=tmp_path / "run", budget_ms=2.5, progress=quiet, **GRID)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("three_ms")
def test_distill_where_the_gate_refuses_all_nothing_is_written(
    data: Path, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "export_run", lambda *_, **__: refused("shift of 0.8"))
    with pytest.raises(GateError, match=r"refused every student that fits: .*8 rows: shift of 0\.8"):
        command.distill(teachers=teachers[1:], data=data, out=tmp_path / "run", progress=quiet, **GRID)
    assert not (tmp_path / "run").exists()


WRONG: dict[str, dict[str, Any]] = {
    "--teacher": {"teachers": []},
    "--budget-ms 0": {"budget_ms": 0.0},
    "--budget-ms -1": {"budget_ms": -1.0},
    "--students 0": {"students": 0},
    "--sizes 50": {"sizes": (50,)},
    "--rows": {"rows": ()},
    "99 blocks": {"blocks": (99,)},
    "--trunk resnet": {"trunk": "resnet"},
    "--device tpu": {"device": "tpu"},
}


@pytest.mark.parametrize("message", WRONG)
def test_distill_a_wrong_argument_is_named(data: Path, teachers: list[Path], tmp_path: Path, message: str) -> None:
    wanted = {"teachers": teachers, "data": data, "out": tmp_path / "run", "progress": quiet, **GRID, **WRONG[message]}
    with pytest.raises(UsageError, match=message):
        command.distill(**wanted)
    assert not (tmp_path / "run").exists()


def test_distill_teachers_of_other_images_are_refused(teachers: list[Path], tmp_path: Path) -> None:
    other = write_default(tmp_path / "other", seed=5, kind="cloth", train=12, test_good=1, test_defective=1, side=64)
    with pytest.raises(DataError, match="learned from other images"):
        command.distill(teachers=teachers, data=other, out=tmp_path / "run", progress=quiet, **GRID)
