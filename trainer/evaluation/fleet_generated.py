"""The generated fleet's data: the images of every site as embeddings, and the aggregator's canaries.

It must not know rounds or how boxes judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deploy.aggregator.canaries import Canaries
from deploy.aggregator.gates import examine
from edge.memory.bank import MemoryBank
from edge.memory.search import nearest
from trainer.evaluation.fleet_box import BoxData, first_bank
from trainer.evaluation.fleet_scene import KNOWN_DEFECTS, UNKNOWN_DEFECTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from deploy.aggregator.gates import Examination
    from deploy.progress import Progress
    from edge.federation.update import MemoryUpdate
    from trainer.evaluation.fleet_scene import Site

    Half = npt.NDArray[np.float16]
    Single = npt.NDArray[np.float32]
    Embed = Callable[[npt.NDArray[np.uint8]], Half]

_COVERED = 0.5  # of a patch's pixels, from which on it shows the defect
_REFERENCE_ROWS = 256  # of each product
_ALARM = 0.99  # quantile of good patches' distances, above which one alarms


class ImageCounts(BaseModel):
    """Images of one box."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learn: int = Field(40, ge=2, title="Learn", description="Good ones that it sees.")
    commissioning: int = Field(20, ge=1, title="Commissioning", description="Good ones that set its threshold.")
    good: int = Field(10, ge=1, title="Good", description="Good test images.")
    defective: int = Field(10, ge=1, title="Defective", description="Defective test images.")
    taught: int = Field(5, ge=1, title="Taught", description="Defective ones that it would teach as a poisoner.")
    canary: int = Field(
        10, ge=1, title="Canary", description="Defective ones of each product that the aggregator holds."
    )


def generated_boxes(sites: Sequence[Site], embed: Embed, counts: ImageCounts, *, progress: Progress) -> list[BoxData]:
    """Draw and embed the images of every site.

    Args:
        sites: one for each box.
        embed: from canvases to float16 [n, L, D].
        counts: images of each box.
        progress: called after each box.
    """
    boxes = []
    for site in sites:
        learn, commissioning, good = (
            embed(site.good(split, count))
            for split, count in (
                ("learn", counts.learn), ("commissioning", counts.commissioning), ("good", counts.good)
            )
        )  # fmt: skip
        bad = embed(site.defective("defective", counts.defective)[0])
        boxes.append(
            BoxData(
                name=f"site{site.number // 8}/box{site.number}",
                product=site.product,
                condition=f"condition {site.number}",
                learn=learn,
                commissioning=commissioning,
                test=np.concatenate([good, bad]),
                labels=np.repeat([False, True], [counts.good, counts.defective]),
                groups=np.arange(counts.good + counts.defective).astype(np.str_),
                defects=defect_rows(site, embed, "taught", counts.taught, UNKNOWN_DEFECTS),
            )
        )
        progress("drawing boxes", len(boxes), len(sites))
    return boxes


def defect_rows(site: Site, embed: Embed, split: str, count: int, families: Sequence[str]) -> Single:
    """Return the patch rows float32 [n, D] that show a defect, of images of one box."""
    canvases, masks = site.defective(split, count, families)
    embedded = embed(canvases)
    side = round(embedded.shape[1] ** 0.5)
    cells = masks.reshape(len(masks), side, masks.shape[1] // side, side, masks.shape[2] // side).mean((2, 4))
    return embedded[cells.reshape(len(cells), -1) >= _COVERED].astype(np.float32)


@dataclass(frozen=True)
class TrainerGate:
    """The gate of an aggregator that has canaries of every product, and the trainer's memory until it has a bank.

    Attributes:
        canaries: by product.
        reference: what updates of the first round are compared with.
    """

    canaries: Mapping[str, Canaries]
    reference: MemoryBank

    def __call__(
        self, update: MemoryUpdate, *, reference: MemoryBank | None, peers: Sequence[MemoryUpdate]
    ) -> Examination:
        """Examine an update; see :class:`deploy.aggregator.closing.Gate`."""
        canaries = self.canaries.get(update.product)
        return examine(update, reference=reference or self.reference, canaries=canaries, peers=peers)


def trainer_gate(sites: Sequence[Site], embed: Embed, count: int, *, embedding_id: str) -> TrainerGate:
    """Make canaries of images at the trainer, with half of the families of defects.

    Args:
        sites: of the trainer, one for each product; no box of the fleet is there.
        embed: from canvases to float16 [n, L, D].
        count: defective images of each product, and twice as many good ones.
        embedding_id: 64 hex digits.
    """
    canaries, banks = {}, []
    for site in sites:
        good = embed(site.good("canary_good", 2 * count))
        # Every other image makes a reference, the rest is what canaries hold for good.
        banks.append(first_bank(good[::2], _REFERENCE_ROWS, seed=0))
        held = good[1::2].reshape(-1, good.shape[2]).astype(np.float32)
        canaries[site.product] = Canaries(
            embedding_id=embedding_id,
            product=site.product,
            defect=defect_rows(site, embed, "canary_defective", count, KNOWN_DEFECTS),
            good=held,
            threshold=float(np.sqrt(np.quantile(nearest(held, banks[-1])[0], _ALARM))),
        )
    rows = np.concatenate(banks)
    share = np.full(len(rows), 1 / len(rows), np.float32)
    return TrainerGate(canaries, MemoryBank(rows, share, share))
