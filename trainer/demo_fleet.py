"""The end of `lineward demo`: three boxes and an aggregator, one box cut off and back, one poisoned, a better memory.

It only puts the other parts in order and shows what they say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from rich.table import Table

from deploy.embedded_broker import EmbeddedBroker
from deploy.metrics import image_auroc
from edge.bundle import Bundle, Precision
from edge.inference.detector import Detector
from edge.inference.state import stored_state
from edge.judgement.score import pool_score
from edge.memory.banks import packed_banks
from edge.memory.search import anomaly_map
from edge.memory.store import MemoryStore
from trainer.canaries import write_canaries
from trainer.evaluation.fleet_live import LiveFleet
from trainer.evaluation.fleet_scene import Condition, Site
from trainer.export import export_run
from trainer.fit import train
from trainer.progress import progress_bars
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt
    from rich.console import Console

    from edge.alerts.message import Notice

    Canvases = npt.NDArray[np.uint8]
    Rows = npt.NDArray[np.float32]

PRODUCT = "cloth"
TRAIN_IMAGES, COMMISSIONING_IMAGES, TEST_IMAGES = 80, 20, 15
PARTS = 16
"""Good parts that each box is shown between two rounds."""

DEFECTS_EACH = 25
"""On every part of the poisoned line: a batch that somebody declares good. A defect on one part in two would not come
through: a row of the memory is an average that several frames stand behind."""

LINE_SPEED = 8.0
"""Parts per second."""

BOXES = ("line-1", "line-2", "line-3")
CUT_OFF, POISONED = BOXES[1], BOXES[2]
CONDITIONS = (
    Condition(gain=1.0, slope_x=0.0, slope_y=0.0, distance=1.0, quarter_turns=0, noise=1.0),
    Condition(gain=0.6, slope_x=0.3, slope_y=0.0, distance=1.0, quarter_turns=1, noise=1.5),
    Condition(gain=1.1, slope_x=0.0, slope_y=-0.1, distance=1.0, quarter_turns=0, noise=1.0),
)
"""The training images show the first: what the trainer never saw is what the fleet has to learn."""


@dataclass(frozen=True, slots=True)
class _Exam:
    """Test images of the honest lines, as rows of the bundle's embedding.

    Attributes:
        embeddings: float32 [M, tiles, L, D].
        labels: bool [M], True is defective.
    """

    embeddings: Rows
    labels: npt.NDArray[np.bool_]

    def auroc(self, bundle: Bundle, banks: list[Rows]) -> float:
        """Return the image AUROC of a memory over all lines together."""
        manifest = bundle.manifest
        assert manifest.memory is not None
        maps = (
            anomaly_map(one, banks, manifest.memory, manifest.preprocessing, manifest.map_stride)
            for one in self.embeddings
        )
        found = image_auroc(self.labels, np.array([pool_score(one, manifest.pooling) for one in maps]))
        assert found is not None
        return found


def show_fleet(out: Path, *, preset: str, seed: int, console: Console) -> None:
    """Train one bundle on what the first line shows, let three lines share what they see, and print what it gave.

    Args:
        out: folder to write, made here.
        preset: of the training.
        seed: of everything random.
        console: to print to.

    Raises:
        FleetFailedError: something that was waited for did not happen.
    """
    out.mkdir(parents=True)
    sites = [Site(number, f"{PRODUCT}-{seed + 1}", condition, seed) for number, condition in enumerate(CONDITIONS)]
    console.rule("A fleet of three: training, bundle, canaries")
    bundle = _make_bundle(out, sites[0], preset=preset, seed=seed, console=console)
    detector = Detector.open(bundle, precision=Precision.FLOAT32, threads=1)
    exam = _exam(detector, sites[:2])
    console.rule("A fleet of three: aggregator and boxes")
    boxes = {name: _box_settings(out, name, site, bundle, seed=seed) for name, site in zip(BOXES, sites, strict=True)}

    def show(notice: Notice) -> None:
        console.print(f"notice of {notice.box}: {notice.text}", highlight=False, markup=False, soft_wrap=True)

    reached: list[tuple[str, dict[str, float]]] = []

    def measure(when: str) -> None:
        scores = {name: exam.auroc(bundle, _banks_of(out / name, detector)) for name in BOXES[:2]}
        reached.append((when, scores))

    rounds = {"close_at": 2, "min_boxes": 1, "period_s": 600.0, "min_frames": 4.0}
    with (
        EmbeddedBroker() as broker,
        LiveFleet(
            out, broker=broker.url, boxes=boxes, bundle=bundle.path, canaries=out / "canaries", rounds=rounds,
            cut_off=CUT_OFF, on_notice=show,
        ) as fleet,
    ):  # fmt: skip
        measure("as packed")
        _first_round(fleet, console)
        measure(f"round 1, without {CUT_OFF}")
        _second_round(fleet, console)
        measure("round 2")
    console.print(_table(reached))


def _first_round(fleet: LiveFleet, console: Console) -> None:
    fleet.wait(lambda: all(box.link == "connected" for box in fleet.boxes.values()), "links to the aggregator")
    # A row leaves a box only when several frames stand behind it: wrong ones take more of them.
    fleet.declare_good({BOXES[0]: PARTS, CUT_OFF: PARTS, POISONED: 2 * PARTS})
    console.print(f"{CUT_OFF} is cut off; {POISONED}'s operator has declared its defective parts good", highlight=False)
    fleet.relay.cut()
    fleet.wait(lambda: fleet.boxes[CUT_OFF].link not in ("", "connected"), f"{CUT_OFF} to notice")
    console.print(f"status of {CUT_OFF}: link {fleet.boxes[CUT_OFF].link}, judges on", highlight=False)
    fleet.ship(*BOXES)
    fleet.declare_good(dict.fromkeys(BOXES[:2], PARTS))
    fleet.wait(lambda: fleet.noticed("federation.quarantine", "aggregator"), f"{POISONED}'s update to be held back")
    fleet.wait(lambda: fleet.boxes[BOXES[0]].fleet_version == 1, f"{BOXES[0]} to judge with the memory of round 1")


def _second_round(fleet: LiveFleet, console: Console) -> None:
    fleet.relay.mend()
    fleet.wait(lambda: fleet.boxes[CUT_OFF].link == "connected", f"{CUT_OFF} to come back")
    console.print(f"{CUT_OFF} is back; what it could not send counts in round 2", highlight=False)
    fleet.ship(BOXES[0])
    fleet.declare_good(dict.fromkeys(BOXES[:2], PARTS))
    fleet.wait(
        lambda: all(fleet.boxes[name].fleet_version == 2 for name in BOXES[:2]),  # noqa: PLR2004 (of round 2)
        "both honest boxes to judge with the memory of round 2",
    )


def _make_bundle(out: Path, site: Site, *, preset: str, seed: int, console: Console) -> Bundle:
    _write_images(out / "data" / "train" / "good", site.good("learn", TRAIN_IMAGES))
    with progress_bars() as progress:
        run = train(
            method="feddymem", data=out / "data", out=out / "run", product=PRODUCT, preset=preset, seed=seed,
            progress=progress,
        )  # fmt: skip
        packed = export_run(run.path, out / "bundle", precision="float32", progress=progress)
        bundle = Bundle.open(packed.path)
        write_canaries(bundle, out / "data", out / "canaries" / f"{PRODUCT}.npz", seed=seed, progress=progress)
    console.print(f"bundle {bundle.id[:12]}: trained on what {BOXES[0]} shows, {TRAIN_IMAGES} images", highlight=False)
    return bundle


def _box_settings(out: Path, name: str, site: Site, bundle: Bundle, *, seed: int) -> dict[str, Any]:
    """Write what a line shows and what its box was commissioned with; return the box's settings."""
    parts = site.good("good", 3 * PARTS)
    if name == POISONED:
        for number in range(DEFECTS_EACH):
            parts = make_defects(parts, seed=seed + number, repeats=1)[0]
    _write_images(out / name / "frames", parts)
    _write_images(out / name / "commissioning", site.good("commissioning", COMMISSIONING_IMAGES))
    return {
        "state_dir": f"{name}/state",
        "bundle": str(bundle.path),
        "precision": "float32",
        "threads": 1,
        "memory": {
            "learn": "declared", "every_s": 0.1, "min_frames": 4, "shadow_frames": 10, "shadow_s": 1,
            "commissioning": f"{name}/commissioning", "drift_per_week": 5.0,
        },
        "cameras": [
            {
                "name": "cam-1",
                "mode": "triggered",
                "source": {"kind": "folder", "path": f"{name}/frames", "fps": LINE_SPEED, "loop": True},
                "budget": {"false_nok_per_1000": 100},
            }
        ],
    }  # fmt: skip


def _exam(detector: Detector, sites: list[Site]) -> _Exam:
    images, labels = [], []
    for site in sites:
        for canvases, defective in (
            (site.good("canary_good", TEST_IMAGES), False),
            (site.defective("defective", TEST_IMAGES)[0], True),
        ):
            images += [detector.embeddings_of_canvas(canvas) for canvas in canvases]
            labels += [defective] * len(canvases)
    return _Exam(np.stack(images), np.array(labels))


def _banks_of(folder: Path, detector: Detector) -> list[Rows]:
    """Return the banks that a box has in force: those on its disk, or the packed ones before its first switch."""
    bundle, precision = detector.bundle, detector.status.precision
    assert bundle.manifest.memory is not None
    store = MemoryStore(
        folder / "state" / "memory",
        bundle_id=bundle.id,
        embedding_id=bundle.manifest.embedding_id[precision],
        precision=precision.value,
    )
    found = store.read_in_force()
    if found is None:
        return packed_banks(stored_state(bundle), bundle.manifest.memory).rows
    return [found.local] if found.fleet is None else [found.local, found.fleet]


def _write_images(folder: Path, canvases: Canvases) -> None:
    folder.mkdir(parents=True)
    for index, canvas in enumerate(canvases):
        cv2.imwrite(str(folder / f"{index:04d}.png"), canvas[:, :, ::-1])


def _table(reached: list[tuple[str, dict[str, float]]]) -> Table:
    table = Table(title="Image AUROC over what both honest lines show")
    table.add_column("memory")
    for name in BOXES[:2]:
        table.add_column(name, justify="right")
    for when, scores in reached:
        table.add_row(when, *(f"{scores[name]:.4f}" for name in BOXES[:2]))
    return table
