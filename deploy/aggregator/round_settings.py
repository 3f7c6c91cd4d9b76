"""When a round closes and what is taken into it, as settings; and where its time comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge.alerts.outbox_file import boot_id, boottime_ns
from edge.federation.fields import Digest, Name  # noqa: TC001 (pydantic needs them at run time)
from edge.federation.messages import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES
from edge.federation.wire import Limits

if TYPE_CHECKING:
    from collections.abc import Callable


class Scope(str, Enum):
    """What one bank is made of: all boxes of an embedding, or those of one product in it."""

    EMBEDDING = "embedding"
    PRODUCT = "product"


class RoundSettings(BaseModel):
    """When a round closes, and what is taken into it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: Name = Field(title="Fleet", description="Name of the fleet; updates of another are refused.")
    scope: Scope = Field(Scope.PRODUCT, title="Scope", description="One bank for each product, or for all together.")
    close_at: int = Field(
        3, ge=1, title="Close at", description="A round closes as soon as so many boxes have sent an update."
    )
    min_boxes: int = Field(
        2,
        ge=1,
        title="Fewest boxes",
        description="A bank is made of at least so many boxes. With fewer at its deadline a round stays open for "
        "another period and keeps what it has.",
    )
    period_s: float = Field(
        86_400.0, ge=0.1, le=366 * 86_400, title="Period", description="A round's deadline, seconds after its opening."
    )
    min_frames: float = Field(
        8.0, ge=1, title="Fewest frames", description="Distinct frames that must stand behind each row."
    )
    max_update_bytes: int = Field(4 * 2**20, ge=4096, le=64 * 2**20, title="Largest update, bytes")
    max_rows: int = Field(4096, ge=1, le=65_536, title="Most rows of an update")
    max_columns: int = Field(2048, ge=1, le=65_536, title="Most columns of an update")
    max_chunk: int = Field(DEFAULT_CHUNK_BYTES, ge=1024, le=MAX_CHUNK_BYTES, title="Largest chunk, bytes")
    max_incoming_bytes: int = Field(
        256 * 2**20, ge=2**20, title="Incoming, bytes", description="Declared sizes of all updates on their way."
    )
    max_pools: int = Field(64, ge=1, title="Most pools", description="Embeddings times products that are served.")
    embedding_ids: tuple[Digest, ...] = Field(
        (), title="Embeddings", description="Embedding ids that are served; any where none is named."
    )
    products: tuple[Name, ...] = Field(
        (), title="Products", description="Products that are served; any where none is named."
    )
    keep_banks: int = Field(10, ge=1, title="Banks kept", description="The newest banks of a pool, for rollback.")
    keep_rounds: int = Field(
        3, ge=2, title="Rounds kept", description="Rounds whose updates are kept after they were counted."
    )
    carry_rounds: int = Field(
        2,
        ge=0,
        title="Rounds carried",
        description="For so many rounds the last accepted update of a box that has sent nothing new counts on; at most "
        "keep_rounds. What a late or broken box knew is not lost at once.",
    )
    keep_quarantined: int = Field(
        200, ge=1, title="Quarantined kept", description="The newest quarantined updates of a pool."
    )

    @model_validator(mode="after")
    def _min_boxes_close(self) -> RoundSettings:
        if self.min_boxes > self.close_at:
            raise ValueError(f"min_boxes {self.min_boxes} is above close_at {self.close_at}: raise close_at")
        return self

    @model_validator(mode="after")
    def _carried_is_kept(self) -> RoundSettings:
        if self.carry_rounds > self.keep_rounds:
            raise ValueError(f"carry_rounds {self.carry_rounds} is above keep_rounds {self.keep_rounds}: raise that")
        return self

    @property
    def limits(self) -> Limits:
        """Of an update's payload."""
        return Limits(self.max_update_bytes, self.max_rows, self.max_columns)

    def pool(self, embedding_id: str, product: str) -> str:
        """The pool of a box."""
        return embedding_id if self.scope is Scope.EMBEDDING else f"{embedding_id}/{product}"


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from: durations since boot, the boot's name, and UTC for what people read."""

    now_ns: Callable[[], int] = boottime_ns
    boot: Callable[[], str] = boot_id
    utc: Callable[[], datetime] = field(default=lambda: datetime.now(timezone.utc))
