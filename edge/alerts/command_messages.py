"""What a box can be told to do over MQTT, and how it answers. It must not know who does it."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator

from edge.alerts.topics import (
    ACCEPT_VERB,
    DEAD_LETTERS_VERB,
    EVIDENCE_VERB,
    RECIPE_VERB,
    REPLAY_VERB,
    RESET_VERB,
    SHIP_VERB,
    THRESHOLD_VERB,
    TRIGGER_VERB,
)
from edge.alerts.wire import MAX_ID, Count, Epoch, Message, Seq, Utc


class CommandMessage(Message):
    """What every command may carry; the publisher looks after all three, handlers see only the ``id``."""

    id: str | None = Field(None, max_length=MAX_ID, description="Comes back in the result.")
    key: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_ID,
        description="Draw one per command: a box does the same key once and gives its first answer again, ever after.",
    )
    expires_at: Utc | None = Field(None, description="Not done after this moment; refused where the box has no time.")


class ReplayCommand(CommandMessage):
    """Asks a box to send the kept messages ``from`` .. ``to`` of an epoch again; published to ``cmd/replay``."""

    epoch: Epoch
    first: Seq = Field(alias="from")
    last: Seq = Field(alias="to")


class AcceptCommand(CommandMessage):
    """Declares a part good: its frame feeds the memory whatever its score; published to ``cmd/accept``."""

    camera: str
    camera_seq: Count | None = None
    part_id: str | None = Field(None, max_length=1024)

    @model_validator(mode="after")
    def _names_one_frame(self) -> AcceptCommand:
        if (self.camera_seq is None) == (self.part_id is None):
            raise ValueError("give either camera_seq or part_id")
        return self


class TriggerCommand(CommandMessage):
    """Says that a part is in front of a station that is triggered over MQTT; published to ``cmd/trigger``."""

    part_id: str = Field(min_length=1, max_length=256, description="Comes back with the verdict.")
    station: str | None = Field(None, description="Needed where a box has several stations that are triggered so.")


class ShipCommand(CommandMessage):
    """Asks a box to send what its memory has learnt to the fleet now; published to ``cmd/ship``."""


class DeadLettersCommand(CommandMessage):
    """Asks what the broker refused for good, the oldest first, or to try all of it again: ``cmd/dead_letters``."""

    action: Literal["list", "requeue"] = "list"
    limit: int = Field(50, ge=1, le=200, description="Most that are listed.")


class EvidenceCommand(CommandMessage):
    """Asks a box for the pictures that it keeps: which there are, the files of one, or a part of a file."""

    reference: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="The evidence of an alert; what there is is listed where absent.",
    )
    file: str | None = Field(
        None, min_length=1, max_length=64, description="One of its files; all are named where absent."
    )
    offset: Count = Field(0, description="First byte of the file that is wanted; up to 131,072 are answered.")
    camera: str | None = Field(None, max_length=200, description="Lists only this camera's.")
    day: str | None = Field(None, pattern=r"^[0-9]{8}$", description="Lists only this day's, yyyymmdd in UTC.")
    limit: int | None = Field(None, ge=1, le=500, description="Most that are listed, the newest; 50 where absent.")

    @model_validator(mode="after")
    def _file_is_of_one(self) -> EvidenceCommand:
        if self.reference is None and (self.file is not None or self.offset):
            raise ValueError("file and offset need a reference")
        return self


class ThresholdCommand(CommandMessage):
    """Sets the threshold of a camera from the next frame on; published to ``cmd/threshold``."""

    camera: str
    value: float | None = Field(description="Raw score at and above which a frame is NOK; null for the budget's.")
    bundle_id: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the bundle that the value was chosen for.")
    memory_version: Count = Field(description="Of the memory that the value was chosen for; 0 is the packed one.")
    product: str | None = Field(
        None, max_length=200, description="Needed of a bundle for several products: the one whose threshold it is."
    )


class RecipeCommand(CommandMessage):
    """Says which product frames show from now on, and settles moments anew; published to ``cmd/recipe``."""

    camera: str | None = Field(
        None, description="Every camera that has several products or follows its line where absent."
    )
    recipe: str | None = Field(
        max_length=200, description="Name of a product or sub-class of the bundle; null leaves it to the router again."
    )


class ResetCommand(CommandMessage):
    """Has a camera's moments settle anew on the parts that come now, which must be good; published to ``cmd/reset``."""

    camera: str | None = Field(None, description="Every camera that follows its line where absent.")


class CommandResult(Message):
    """The answer to a command. ``count``: messages that will be sent again, frames that fed, or rows that go out."""

    schema_: Literal["lineward.result/1"] = Field("lineward.result/1", alias="schema")
    site: str
    box: str
    verb: str
    ok: bool
    id: str | None = None
    count: Count = 0
    reason: str = ""
    detail: dict[str, JsonValue] = Field(default_factory=dict, description="Whatever else the answer holds.")


Command: TypeAlias = (
    ReplayCommand
    | AcceptCommand
    | ShipCommand
    | EvidenceCommand
    | ThresholdCommand
    | RecipeCommand
    | ResetCommand
    | DeadLettersCommand
    | TriggerCommand
)
COMMANDS: dict[str, type[CommandMessage]] = {
    REPLAY_VERB: ReplayCommand,
    ACCEPT_VERB: AcceptCommand,
    SHIP_VERB: ShipCommand,
    DEAD_LETTERS_VERB: DeadLettersCommand,
    THRESHOLD_VERB: ThresholdCommand,
    RECIPE_VERB: RecipeCommand,
    RESET_VERB: ResetCommand,
    EVIDENCE_VERB: EvidenceCommand,
    TRIGGER_VERB: TriggerCommand,
}
