"""Settings of triggered inspection: stations, their triggers and rules, and the registers that a PLC reads."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edge.alerts.topics import check_camera
from edge.capture.settings import TriggerMode
from edge.errors import MessageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.settings import CameraSettings


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

    ``any_nok``: NOK if any view is NOK. ``all_nok``: NOK only if all views are NOK. ``at_least``: NOK if at least so
    many views are NOK. In all of them, a part that is not NOK is OK if every view was judged in time, else NOT_JUDGED:
    a view that is missing, late, dropped or unreadable never makes OK.
    """

    ANY_NOK = "any_nok"
    ALL_NOK = "all_nok"
    AT_LEAST = "at_least"


class StationSettings(BaseModel):
    """A place where parts are inspected by one camera or several, with one verdict per part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(title="Name", description="Part of the station's topics; unlike any camera's.")
    cameras: tuple[str, ...] = Field(
        min_length=1, max_length=16, title="Cameras", description="Their names; each is in one station only."
    )
    trigger: TriggerSource = Field(TriggerSource.FRAME, title="Trigger", description="frame, mqtt or modbus.")
    rule: Rule = Field(Rule.ANY_NOK, title="Rule of the views", description="any_nok, all_nok or at_least.")
    at_least: int | None = Field(
        None, ge=1, le=16, title="NOK views", description="Rule at_least: so many NOK views make a part NOK."
    )
    deadline_ms: float = Field(
        500.0, gt=0, le=600_000, title="Deadline [ms]", description="From the trigger to the verdict; then NOT_JUDGED."
    )
    delay_ms: float = Field(
        0.0,
        ge=0,
        le=60_000,
        title="Delay [ms]",
        description="Triggers mqtt and modbus: a camera that runs freely gives the first frame captured so long after "
        "the trigger; at least the camera's own latency.",
    )
    match_ms: float = Field(
        20.0,
        gt=0,
        le=10_000,
        title="Matching window [ms]",
        description="Trigger frame, several live cameras: frames captured within this time show one part; parts must "
        "come at least twice as far apart.",
    )
    max_parts: int = Field(
        16, ge=1, le=256, title="Open parts", description="Parts not yet judged; a further one is NOT_JUDGED at once."
    )

    @field_validator("name")
    @classmethod
    def _name_fits_a_topic(cls, name: str) -> str:
        try:
            return check_camera(name)
        except MessageError as error:
            raise ValueError(str(error).replace("camera", "station")) from error

    @field_validator("cameras")
    @classmethod
    def _cameras_differ(cls, cameras: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in cameras if cameras.count(name) > 1})
        if twice:
            raise ValueError(f"camera {twice[0]!r} is named twice; each gives one view")
        return cameras

    @model_validator(mode="after")
    def _rule_fits(self) -> StationSettings:
        if (self.at_least is not None) != (self.rule is Rule.AT_LEAST):
            raise ValueError("at_least goes with rule: at_least, and only with it")
        if self.at_least is not None and self.at_least > len(self.cameras):
            raise ValueError(f"at_least: {self.at_least} views cannot be NOK of {len(self.cameras)}")
        if self.delay_ms >= self.deadline_ms:
            raise ValueError("delay_ms must be below deadline_ms: no frame would ever come in time")
        if self.trigger is TriggerSource.FRAME and self.delay_ms:
            raise ValueError("delay_ms is for the triggers mqtt and modbus; with frame, the frame is the trigger")
        if self.trigger is TriggerSource.FRAME and len(self.cameras) > 1 and 2 * self.match_ms > self.deadline_ms:
            raise ValueError("match_ms must be at most half of deadline_ms")
        return self

    @property
    def nok_views(self) -> int:
        """So many NOK views make a part NOK."""
        return {Rule.ANY_NOK: 1, Rule.ALL_NOK: len(self.cameras)}.get(self.rule, self.at_least or 1)


class ModbusSettings(BaseModel):
    """The Modbus TCP server of the box, read by a PLC. Off where absent; docs/inspection.md has the registers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", title="Address", description="To listen on; the PLC's network card, not 0.0.0.0.")
    port: int = Field(502, ge=0, le=65535, title="Port", description="502 needs a privilege; 0 picks a free one.")
    unit: int = Field(1, ge=0, le=255, title="Unit id", description="Requests to another unit are not answered.")
    max_clients: int = Field(
        4, ge=1, le=64, title="Clients", description="Connections at a time; one that is silent makes room for another."
    )
    idle_s: float = Field(
        60.0, ge=1, le=86_400, title="Idle time [s]", description="A connection that is silent for longer is closed."
    )
    products: dict[Annotated[int, Field(ge=1, le=65_534)], str] = Field(
        {},
        title="Products by number",
        description="What a number in a recipe register means; 1, 2, ... in the bundle's order where absent.",
    )

    @field_validator("products")
    @classmethod
    def _products_differ(cls, products: dict[int, str]) -> dict[int, str]:
        names = list(products.values())
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"product {twice[0]!r} has two numbers; give it one")
        return products


def check_station(station: StationSettings, cameras: Sequence[CameraSettings], *, modbus: bool) -> None:
    """Find out whether a station can be triggered as its settings say.

    Args:
        station: its settings.
        cameras: its cameras.
        modbus: whether the box has a Modbus server.

    Raises:
        ValueError: it cannot; names the station, the camera and the cure.
    """
    of = f"station {station.name!r}"
    if station.trigger is TriggerSource.MODBUS and not modbus:
        raise ValueError(f"{of}: trigger modbus needs a modbus section; add one, `modbus: {{}}` has the defaults")
    if station.trigger is not TriggerSource.FRAME:
        return
    software = [camera.name for camera in cameras if camera.source.trigger is TriggerMode.SOFTWARE]
    if software:
        raise ValueError(f"{of}: camera {software[0]!r} has a software trigger; set the station's to mqtt or modbus")
    if len({camera.source.live for camera in cameras}) > 1:
        raise ValueError(f"{of}: files and live cameras cannot be matched by their frames; set its trigger to mqtt")


def check_alone(camera: CameraSettings) -> None:
    """Find out whether a triggered camera can be a station of its own.

    Raises:
        ValueError: it cannot; names the camera and the cure.
    """
    if camera.source.trigger is TriggerMode.SOFTWARE:
        raise ValueError(
            f"camera {camera.name!r} has a software trigger, and nothing fires it; put it into a station with trigger "
            "mqtt or modbus"
        )
