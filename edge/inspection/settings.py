"""Settings of triggered inspection: stations, their triggers and rules, and the registers that a PLC reads."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field


class TriggerSource(str, Enum):
    """What says that a part is there.

    ``frame``: each frame of a triggered camera is a part (hardware trigger, or a folder of parts). ``mqtt``: a command
    ``cmd/trigger`` names the part. ``modbus``: the PLC writes the part's number and counts the trigger register up.
    """

    FRAME = "frame"
    MQTT = "mqtt"
    MODBUS = "modbus"


class Rule(str, Enum):
    """How the views of a part become its verdict.

    ``any_nok``: NOK if any view is NOK; OK only if all views are OK. ``all_nok``: NOK only if all views are NOK.
    In both, NOT_JUDGED if the views that are missing could change the answer.
    """

    ANY_NOK = "any_nok"
    ALL_NOK = "all_nok"


class StationSettings(BaseModel):
    """A place where parts are inspected by one camera or several, with one verdict per part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(title="Name", description="Part of the station's topics; unlike any camera's.")
    cameras: tuple[str, ...] = Field(
        min_length=1, max_length=16, title="Cameras", description="Their names; each is in one station only."
    )
    trigger: TriggerSource = Field(TriggerSource.FRAME, title="Trigger", description="frame, mqtt or modbus.")
    rule: Rule = Field(Rule.ANY_NOK, title="Rule of the views", description="any_nok or all_nok.")
    deadline_ms: float = Field(
        500.0, gt=0, le=600_000, title="Deadline [ms]", description="From the trigger to the verdict; then NOT_JUDGED."
    )


class ModbusSettings(BaseModel):
    """The Modbus TCP server of the box, read by a PLC. Off where absent; docs/formats.md has the registers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", title="Address", description="To listen on; the PLC's network card, not 0.0.0.0.")
    port: int = Field(502, ge=0, le=65535, title="Port", description="502 needs a privilege; 0 picks a free one.")
    unit: int = Field(1, ge=0, le=247, title="Unit id", description="Requests to another unit are not answered.")
