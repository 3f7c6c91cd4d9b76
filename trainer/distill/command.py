"""The body of `lineward distill`: teachers and a folder of good images in, a student's run folder out."""

from __future__ import annotations

import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge.bundle import Precision
from edge.errors import GateError, UsageError
from trainer.data.folder import content_hash, read_folder
from trainer.data.generic import generic_canvases
from trainer.distill.gallery import Gallery
from trainer.distill.latency import engine, measure
from trainer.distill.record import Candidate, Distillation
from trainer.distill.search import Trained, export_shapes, shapes, time_trained, train_student
from trainer.distill.student import Student
from trainer.distill.teachers import load_teachers, teach, teacher_record
from trainer.export import export_run
from trainer.features import load_canvases
from trainer.fit import choose_device, groups_of, hold_out, seed_everything, versions
from trainer.methods.registry import builder
from trainer.runs import Run, RunRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from deploy.parity import ParityRules
    from deploy.progress import Progress
    from trainer.data.folder import Holdout, Sample
    from trainer.distill.latency import Timing
    from trainer.distill.search import Shape
    from trainer.distill.student import StudentConfig
    from trainer.distill.teachers import Taught

BLOCKS, SIZES, ROWS = (11,), (128, 160, 192), (256,)
"""The grid that is searched unless another is asked for."""
STUDENTS = 4
"""So many of those that fit are trained."""


def distill(
    *,
    teachers: Sequence[Path],
    data: Path,
    out: Path,
    budget_ms: float | None = None,
    preset: str = "quick",
    trunk: str = "lite0",
    blocks: Sequence[int] = BLOCKS,
    sizes: Sequence[int] = SIZES,
    rows: Sequence[int] = ROWS,
    students: int = STUDENTS,
    device: str = "auto",
    rules: ParityRules | None = None,
    progress: Progress,
) -> Run:
    """Distil teachers into the best student that fits a budget.

    Args:
        teachers: run folders, all trained on ``data`` with one seed; several are an ensemble.
        data: folder in MVTec layout; only train/good is read.
        out: run folder to write; must not hold anything but an earlier run.
        budget_ms: processor milliseconds on one thread that trunk and head may take in int8, from prepared input to
            map, on this machine; None takes the best student whatever it costs.
        preset: ``quick`` or ``full``.
        trunk: name of the students' network.
        blocks: how many of its blocks, to be tried.
        sizes: heights of the input, to be tried; crop, tiles and proportions are the first teacher's.
        rows: of a level's bank, to be tried.
        students: how many of those that fit are trained at most, the costliest first.
        device: ``auto``, ``cpu`` or ``cuda``.
        rules: of the parity gate; None takes those that every bundle for a line must pass.
        progress: progress function.

    Returns:
        The saved run.

    Raises:
        UsageError: an argument is out of range, no shape fits the budget (the message has the fastest), or ``out``
            holds other files.
        DataError: the folder or a teacher cannot be used, or the run cannot be written.
        GateError: the parity gate refused every student that fits; the message has its figures.
    """
    started = time.monotonic()
    if not teachers:
        raise UsageError("--teacher: give at least one run that `lineward train` wrote")
    if budget_ms is not None and not budget_ms > 0:
        raise UsageError(f"--budget-ms {budget_ms:g}: give milliseconds above 0")
    if students < 1:
        raise UsageError(f"--students {students}: give at least 1")
    config, torch_device = Student.config(preset), choose_device(device)
    Run.refuse_foreign(out)
    samples = read_folder(data).train
    runs = load_teachers(teachers, content_hash(samples))
    first = runs[0].record
    seed_everything(first.seed)
    # As the teachers' own: what they learned from is no hold-out. Of teachers of both kinds, some have seen a part.
    told = any(getattr(builder(run.record.method), "uses_subclasses", False) for run in runs)
    split = hold_out(data, samples, first.seed, by_subclass=told)
    wanted = shapes(first.preprocessing, trunk=trunk, blocks=blocks, sizes=sizes, rows=rows)
    with tempfile.TemporaryDirectory(prefix="lineward-distill-") as folder:
        search = _Search(
            config=config,
            wanted=wanted,
            folder=Path(folder),
            seed=first.seed,
            device=torch_device,
            progress=progress,
        )
        chosen_shapes = search.fitting(budget_ms)[:students]
        largest = max(
            (*(run.record.preprocessing for run in runs), *(shape.preprocessing for shape in chosen_shapes)),
            key=lambda one: one.canvas_height * one.canvas_width,
        )
        gallery = Gallery(
            _some(split.fit, config.images, first.seed),
            split.holdout,
            largest,
            seed=first.seed,
            relit=config.relit,
            defects=config.defects,
            progress=progress,
        )
        taught = teach(runs, gallery, device=torch_device, progress=progress)
        trained = [search.train(shape, gallery, taught) for shape in chosen_shapes]
        candidates = search.measured(trained, gallery, budget_ms)
        saver = _Saver(
            out=out,
            runs=runs,
            split=split,
            budget_ms=budget_ms,
            started=started,
            rules=rules,
            preset=preset,
            progress=progress,
        )
        return saver.keep(trained, candidates, Path(folder))


def _some(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Draw at most ``count`` samples, in their order."""
    if len(samples) <= count:
        return list(samples)
    chosen = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[index] for index in sorted(chosen)]


class _Search:
    def __init__(
        self,
        *,
        config: StudentConfig,
        wanted: Sequence[Shape],
        folder: Path,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.config, self.wanted, self.folder, self.seed = config, wanted, folder, seed
        self.device, self.progress = device, progress
        self.generic = generic_canvases()

    def fitting(self, budget_ms: float | None) -> list[Shape]:
        """Return the shapes within the budget, the costliest first."""
        timings = measure(export_shapes(self.wanted, self.config, self.generic, self.folder, progress=self.progress))
        order = sorted(range(len(timings)), key=lambda index: -timings[index].median)
        fits = [self.wanted[i] for i in order if budget_ms is None or timings[i].median <= budget_ms]
        if not fits:
            self._refuse(budget_ms, self.wanted[order[-1]], timings[order[-1]])
        return fits

    def _refuse(self, budget_ms: float | None, shape: Shape, timing: Timing) -> None:
        raise UsageError(
            f"--budget-ms {budget_ms:g}: no student fits; the fastest, {shape}, takes {timing.median:.2f} ms "
            f"({timing.low:.2f} to {timing.high:.2f}) on one thread of this machine with {engine().value} int8; allow "
            "more, or give smaller --sizes, --blocks or --rows"
        )

    def train(self, shape: Shape, gallery: Gallery, taught: Taught) -> Trained:
        return train_student(
            shape, gallery, taught, self.config, seed=self.seed, device=self.device, progress=self.progress
        )

    def measured(self, trained: Sequence[Trained], gallery: Gallery, budget_ms: float | None) -> list[Candidate]:
        exported, timings = time_trained(trained, gallery, self.generic, self.folder)
        candidates = [
            Candidate(
                trunk=student.shape.trunk.name,
                blocks=len(student.trunk.blocks),
                height=student.shape.preprocessing.height,
                width=student.shape.preprocessing.width,
                rows=student.shape.rows,
                soft=student.shares.teacher,
                hard=student.shares.masks,
                image_auroc=student.image_auroc,
                milliseconds=timing.median,
                milliseconds_low=timing.low,
                milliseconds_high=timing.high,
                engine=engine().value,
                precision=Precision.INT8.value,
                bytes=files.bytes,
                seconds=round(student.seconds, 1),
                fits=budget_ms is None or timing.median <= budget_ms,
            )
            for student, files, timing in zip(trained, exported, timings, strict=True)
        ]
        if not any(candidate.fits for candidate in candidates):
            index = min(range(len(candidates)), key=lambda i: candidates[i].milliseconds)
            self._refuse(budget_ms, trained[index].shape, timings[index])
        return candidates


class _Saver:
    def __init__(
        self,
        *,
        out: Path,
        runs: Sequence[Run],
        split: Holdout,
        budget_ms: float | None,
        started: float,
        rules: ParityRules | None,
        preset: str,
        progress: Progress,
    ) -> None:
        self.preset = preset
        self.out, self.runs, self.split = out, runs, split
        self.budget_ms, self.started, self.rules, self.progress = budget_ms, started, rules, progress

    def keep(self, trained: Sequence[Trained], candidates: Sequence[Candidate], folder: Path) -> Run:
        """Save the best that fits and passes the gate in int8."""
        known = list(candidates)
        order = sorted(
            (i for i, one in enumerate(known) if one.fits), key=lambda i: (-known[i].image_auroc, known[i].milliseconds)
        )
        for index in order:
            attempt = self._run(folder / f"run{index}", trained[index], known, index)
            attempt.save()
            refused = self._refusals(attempt, folder / f"bundle{index}")
            if not refused:
                run = self._run(self.out, trained[index], known, index)
                run.save()
                return run
            known[index] = known[index].model_copy(update={"refused": tuple(refused)})
        said = "; ".join(f"{trained[i].shape}: {', '.join(known[i].refused)}" for i in order)
        raise GateError(f"the parity gate refused every student that fits: {said}; allow more milliseconds or images")

    def _refusals(self, run: Run, bundle: Path) -> list[str]:
        """Return why no engine may run the student in int8, which is what was timed; empty where one may."""
        packed = export_run(run.path, bundle, rules=self.rules, progress=self.progress).manifest
        kept = {(item.engine, item.precision) for item in packed.calibration}
        if (engine(), Precision.INT8) in kept:
            return []
        return [
            text
            for path in packed.parity["paths"]
            if path["engine"] == engine().value and path["precision"] == Precision.INT8.value
            for text in path["refusals"]
        ]

    def _run(self, path: Path, student: Trained, candidates: Sequence[Candidate], chosen: int) -> Run:
        teacher = self.runs[0].record
        record = RunRecord(
            method=Student.name,
            trunk=student.shape.trunk,
            preset=self.preset,
            config=student.config.model_dump(mode="json"),
            product=teacher.product,
            preprocessing=student.shape.preprocessing,
            pooling=student.pooling,
            seed=teacher.seed,
            data_sha256=teacher.data_sha256,
            train_images=len(self.split.fit),
            validation=student.validation,
            seconds=round(time.monotonic() - self.started, 1),
            versions=versions(),
            created=datetime.now(timezone.utc),
            distillation=Distillation(
                teachers=tuple(teacher_record(run) for run in self.runs),
                budget_ms=self.budget_ms,
                candidates=tuple(candidates),
                chosen=chosen,
            ),
        )
        holdout = load_canvases(
            self.split.holdout, student.shape.preprocessing, progress=self.progress, what="read hold-out"
        )
        return Run(path, record, student.trunk, student.head, holdout, groups_of(self.split.holdout))
