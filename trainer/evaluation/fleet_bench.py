"""`lineward bench fleet`: a generated fleet from its images to its curves. It only puts the other parts in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deploy.aggregator.aggregate import aggregate
from deploy.aggregator.lloyd import single_threaded_blas
from edge.federation.wire import Limits, decode_update, encode_update
from trainer.evaluation.fleet import FleetSettings, RoundFigures, Simulation, examined
from trainer.evaluation.fleet_cost import measure
from trainer.evaluation.fleet_curves import bytes_curve, computed_points, coreset_point, mean, pooled_bank, worst
from trainer.evaluation.fleet_embed import generic_embedder
from trainer.evaluation.fleet_generated import ImageCounts, generated_boxes, trainer_gate
from trainer.evaluation.fleet_judge import squared_distances
from trainer.evaluation.fleet_poison import Poison, poisoned
from trainer.evaluation.fleet_report import FleetReport, PoisonLine, RoundLine
from trainer.evaluation.fleet_scene import MOST_BOXES, make_sites, trainer_sites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.aggregator.closing import Gate
    from deploy.progress import Progress
    from edge.federation.update import MemoryUpdate
    from trainer.evaluation.fleet_embed import Embedder
    from trainer.evaluation.fleet_judge import Judgement

DRAWN = 12
"""Boxes whose images are drawn; a larger fleet's other boxes send rows made of theirs."""

POISONED_SHARE = 6
"""One poisoner for so many boxes."""


class BenchSettings(BaseModel):
    """What is simulated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    boxes: int = Field(ge=2, le=MOST_BOXES, title="Boxes", description="Of the largest fleet.")
    seed: int = Field(0, ge=0, title="Seed", description="Of every random choice.")
    drawn: int = Field(DRAWN, ge=2, title="Drawn", description="Most boxes whose images are drawn and judged.")
    images: ImageCounts = Field(ImageCounts(), title="Images", description="Of each drawn box.")
    fleet: FleetSettings = Field(FleetSettings(late=0.1, cut_off=0.1), title="Fleet", description="What it does.")
    curve_rows: tuple[int, ...] = Field((64, 128, 256, 512), title="Curve", description="Rows of updates to compare.")


def simulate(settings: BenchSettings, *, embedder: Embedder | None = None, progress: Progress) -> FleetReport:
    """Draw, simulate and measure.

    Args:
        settings: what.
        embedder: that all boxes share; None takes the generic one.
        progress: progress function.
    """
    embedder = embedder or generic_embedder(progress=progress)
    sites = make_sites(min(settings.boxes, settings.drawn), seed=settings.seed)
    data = generated_boxes(sites, embedder, settings.images, progress=progress)
    gate = trainer_gate(
        trainer_sites(seed=settings.seed), embedder, settings.images.canary, embedding_id=embedder.embedding_id
    )
    with single_threaded_blas(1):
        simulation = Simulation(
            data,
            settings.fleet,
            embedder.judge,
            embedding_id=embedder.embedding_id,
            seed=settings.seed,
            gate=gate,
            progress=progress,
        )
        lines = tuple(round_line(simulation, figures) for figures in simulation.run())
        judgement = simulation.judgement()
        curve = bytes_curve(
            simulation.boxes, judgement, settings.fleet.aggregate, seed=settings.seed, sizes=settings.curve_rows
        )
        curve.append(coreset_point(data, judgement, share=0.01, seed=settings.seed))
        curve += computed_points(data, embedder.parameters)
        updates = [box.update(1, base_version=0, seed=settings.seed) for box in simulation.boxes]
        poison = poison_lines(simulation, judgement, updates, gate)
    costs = measure(
        updates,
        [box.learn for box in data],
        settings.boxes,
        settings.fleet.aggregate,
        seed=settings.seed,
        progress=progress,
    )
    return FleetReport(
        about={
            "boxes": settings.boxes,
            "boxes drawn and judged": len(data),
            "products": len({box.product for box in data}),
            "settings": settings.model_dump(mode="json"),
            "embedding_id": embedder.embedding_id,
        },
        rounds=lines,
        pooled=pooled(simulation, settings),
        curve=tuple(curve),
        poison=tuple(poison),
        costs=tuple(costs),
    )


def round_line(simulation: Simulation, figures: RoundFigures) -> RoundLine:
    """Take the means over the honest boxes."""
    nan = float("nan")
    found = dict.fromkeys(
        ("local_mixed", "fleet_mixed", "local_own", "fleet_own", "worst_own", "false_alarms"), nan
    )  # fmt: skip
    if figures.judged is not None:
        exam, judged = simulation.exam, figures.judged
        own = exam.own(judged.local), exam.own(judged.fleet)
        found = {
            "local_mixed": mean(exam.mixed(judged.local)),
            "fleet_mixed": mean(exam.mixed(judged.fleet)),
            "local_own": mean(own[0]),
            "fleet_own": mean(own[1]),
            "worst_own": worst(own[0] - own[1]),
            "false_alarms": mean(judged.false_alarms),
        }
    return RoundLine(
        number=figures.number,
        counted=figures.counted,
        late=figures.late,
        cut_off=figures.cut_off,
        refused=len(figures.refused),
        bytes_up=figures.bytes_up,
        bytes_down=figures.bytes_down,
        rows=figures.rows,
        aggregate_s=figures.aggregate_s,
        **found,
    )


def pooled(simulation: Simulation, settings: BenchSettings) -> dict[int, float]:
    """Return I-AUROC on all images with all frames in one place: as many rows as a box has, and four times as many."""
    rows = settings.fleet.box.local_rows + settings.fleet.aggregate.rows
    exam = simulation.exam
    found = {}
    for size in (rows, 4 * rows):
        bank = pooled_bank(simulation.honest, size, seed=settings.seed)
        found[size] = exam.auroc(simulation.judge.scores(squared_distances(exam.images, bank)))
    return found


def poison_lines(
    simulation: Simulation, judgement: Judgement, updates: Sequence[MemoryUpdate], gate: Gate
) -> list[PoisonLine]:
    """Spoil the updates of one box in six and merge them once, with and without the gate; others are judged.

    The boxes that lie are the last ones; what they would have sent honestly is the reference.
    """
    liars = max(1, len(updates) // POISONED_SHARE)
    trial = _Trial(simulation, judgement, len(updates) - liars)
    found = [trial.line("none", updates, gate)]
    rng = np.random.default_rng(simulation.settings.rounds)
    for kind in Poison:
        spoilt = [
            poisoned(update, kind, defects=box.data.defects, rng=rng)
            for update, box in zip(updates[-liars:], simulation.boxes[-liars:], strict=True)
        ]
        sent = [*updates[:-liars], *spoilt]
        found += [trial.line(kind.value, sent, each) for each in (None, gate)]
    return found


@dataclass(frozen=True)
class _Trial:
    """One merge of honest updates and others, judged by the honest boxes, the first ones."""

    simulation: Simulation
    judgement: Judgement
    honest: int

    def line(self, kind: str, sent: Sequence[MemoryUpdate], gate: Gate | None) -> PoisonLine:
        arrived = [decode_update(encode_update(update), Limits()) for update in sent]
        liars = {update.box for update in arrived[self.honest :]} if kind != "none" else set()
        accepted, refused = examined(arrived, gate, self.simulation.bank)
        merged = aggregate(accepted, settings=self.simulation.settings.aggregate, seed=0)
        exam = self.judgement.exam
        scores = self.judgement.beside(merged.rows)[: self.honest]
        return PoisonLine(
            kind=kind,
            gates=gate is not None,
            poisoners=len(liars),
            kept_out=sum(box in liars for box, _ in refused),
            honest_out=sum(box not in liars for box, _ in refused),
            mixed=mean(np.array([exam.auroc(row, exam.box < self.honest) for row in scores])),
        )
