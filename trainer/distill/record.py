"""What a distilled run remembers of its making: its teachers, its budget, and the figures of every candidate.

It must not know how any of it was computed.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TeacherRecord(BaseModel):
    """One teacher.

    Attributes:
        method: its name; ``timm`` or ``torchvision`` for an external network.
        trunk: name of its trunk, or of the external model.
        height: of its network input, pixels.
        width: of its network input, pixels.
        seed: it was trained with.
        image_auroc: on its own synthetic validation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    trunk: str
    height: int
    width: int
    seed: int
    image_auroc: float


class Candidate(BaseModel):
    """One student that was trained and measured.

    Attributes:
        trunk: name of the network.
        blocks: blocks of it.
        height: of the network input, pixels.
        width: of the network input, pixels.
        rows: of the compressed bank.
        soft: share of the branch's output that follows the teachers; with both 0 the memory detector is alone.
        hard: share of the branch's output that finds synthetic defects.
        image_auroc: I-AUROC on unseen kinds of synthetic defects, float32 torch.
        milliseconds: median processor time of trunk and head in int8, one thread, prepared input to map.
        milliseconds_low: lower quartile.
        milliseconds_high: upper quartile.
        engine: that was measured.
        precision: that was measured.
        bytes: of the two int8 files.
        seconds: to train.
        fits: whether the median is within the budget.
        refused: what the parity gate said of a candidate that was to be shipped; empty where it passed or was not
            asked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trunk: str
    blocks: int
    height: int
    width: int
    rows: int
    soft: float
    hard: float
    image_auroc: float
    milliseconds: float
    milliseconds_low: float
    milliseconds_high: float
    engine: str
    precision: str
    bytes: int
    seconds: float
    fits: bool
    refused: tuple[str, ...] = ()


class Distillation(BaseModel):
    """How a student came about.

    Attributes:
        teachers: whom it learned from; empty for the control that learned from synthetic masks alone.
        budget_ms: milliseconds that trunk and head may take; None where no limit was given.
        candidates: all that were trained, in the order of training.
        chosen: index of the one that was kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teachers: tuple[TeacherRecord, ...]
    budget_ms: float | None
    candidates: tuple[Candidate, ...]
    chosen: int
