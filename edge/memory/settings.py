"""MemorySettings: whether and how a box learns, ships and changes its memory. Reading them touches no other file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (pydantic needs it at run time)

from pydantic import Field, model_validator

from edge.federation.update import Order, WireRows
from edge.memory.dynamic import DynamicSettings
from edge.memory.gate import GateSettings

HOUR_S = 3600.0


class MemorySettings(GateSettings):
    """What the box learns from its own good frames, and how a new memory comes into force."""

    every_s: float = Field(
        10.0,
        gt=0,
        title="Sample interval [s]",
        description="At most one frame per camera in this time is embedded, to learn from and to try new memories on.",
    )
    ship_every_s: float = Field(
        8 * HOUR_S,
        ge=1,
        title="Ship interval [s]",
        description="Running time after which what was learned is reduced and sent to the fleet, and is tried at home.",
    )
    min_frames: float = Field(
        8.0,
        ge=1,
        title="Least frames behind a row",
        description="Rows that fewer frames stand behind never leave the box; at most 1 / (1 - update.beta) can.",
    )
    order: Order = Field(
        Order.ANCHOR,
        title="Order of rows",
        description="anchor: averages around anchors, for textures and loose parts; positional: one average per place, "
        "for aligned parts (it shows their layout).",
    )
    rows: int = Field(512, ge=1, le=65536, title="Rows", description="Most rows of an update; anchor order only.")
    wire: WireRows = Field(WireRows.FLOAT16, title="Numbers on the wire", description="float16 or uint8.")
    commissioning: Path | None = Field(
        None,
        title="Commissioning images",
        description="Folder of images declared good at this box; replaces the bundle's set. Images of one sub-folder "
        "count as one part. Thresholds are made from them alone: at the first start with a bundle, and for every new "
        "memory.",
    )
    shadow_frames: int = Field(
        200, ge=1, title="Shadow frames", description="Sampled frames that a new memory is tried on beside the old one."
    )
    shadow_s: float = Field(
        HOUR_S, ge=0, title="Shadow time [s]", description="A new memory is tried at least this long."
    )
    drift_per_week: float = Field(
        2.0,
        gt=0,
        title="Drift per week",
        description="How much farther from the trainer's memory the box's own may get within any 7 days, in mean "
        "distances of good patches. Reaching it refuses the new memory and raises a notice.",
    )
    update: DynamicSettings = Field(
        DynamicSettings(), title="Update", description="How rows follow the frames that feed them."
    )

    @model_validator(mode="after")
    def _some_row_can_leave(self) -> MemorySettings:
        most = 1 / (1 - self.update.beta)
        if self.order is Order.ANCHOR and self.min_frames >= most * (1 - 1e-9):
            raise ValueError(
                f"no row can ever leave: with update.beta {self.update.beta:g} fewer than {most:g} frames stand behind "
                f"one, min_frames asks for {self.min_frames:g}; lower min_frames or raise update.beta"
            )
        return self
