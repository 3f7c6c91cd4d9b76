"""BoxSettings: one YAML file per box, read with errors that name the file, the key and the nearest valid key.

Reading settings must touch no camera, engine or broker.
"""

from __future__ import annotations

import difflib
import json
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge.adaptation.settings import AdaptationSettings  # noqa: TC001 (pydantic needs it at run time)
from edge.alerts.settings import BrokerSettings
from edge.alerts.topics import check_camera, check_segment
from edge.bundle import Engine, Precision  # noqa: TC001 (pydantic needs them at run time)
from edge.capture.settings import SourceSettings, TriggerMode
from edge.errors import MessageError, SettingsError
from edge.evidence.settings import EvidenceSettings  # noqa: TC001 (pydantic needs it at run time)
from edge.federation.settings import FederationSettings  # noqa: TC001 (pydantic needs it at run time)
from edge.health.settings import CameraHealthSettings, MetricsSettings  # noqa: TC001 (as above)
from edge.inference.onnxruntime_session import Provider
from edge.inputs import Modality
from edge.inspection.settings import ModbusSettings, StationSettings, check_alone, check_station
from edge.judgement.events import EventSettings
from edge.judgement.min_area import MinArea  # noqa: TC001 (pydantic needs it at run time)
from edge.judgement.region_of_interest import RegionOfInterest
from edge.judgement.threshold import Budget, ExternalThreshold
from edge.memory.settings import MemorySettings  # noqa: TC001 (pydantic needs it at run time)
from edge.slots.settings import TrialSettings

DEFAULT_FRAME_RATE = 25.0
# Where pydantic speaks of Python.
_WORDS = {
    "tuple_type": "must be a list",
    "too_short": "needs at least one entry",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "model_type": "must be a section with keys of its own",
}


class Mode(str, Enum):
    """``stream``: frames of a moving web, alerts per anomaly event. ``triggered``: one frame, one part, one verdict."""

    STREAM = "stream"
    TRIGGERED = "triggered"


class CameraSettings(BaseModel):
    """One camera: where its frames come from and how they are judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(title="Name", description="Part of the camera's topics; unique in the box, no + # or /.")
    source: SourceSettings = Field(title="Source", description="Where frames come from.")
    enabled: bool = Field(default=True, title="Enabled", description="A disabled camera is not opened, and says so.")
    bundle: Path | None = Field(
        None, title="Bundle", description="Folder of the bundle that judges this camera; the box's where absent."
    )
    mode: Mode = Field(
        Mode.STREAM, title="Judging mode", description="stream: anomaly events; triggered: a verdict per part."
    )
    region_of_interest: RegionOfInterest = Field(
        RegionOfInterest(), title="Region of interest", description="Where defects matter; everywhere by default."
    )
    min_area: MinArea | None = Field(
        None, title="Smallest area", description="A defect smaller than it does not alarm; any may where absent."
    )
    budget: Budget = Field(Budget(), title="False-alarm budget", description="Sets the threshold.")
    frame_rate: float | None = Field(
        None,
        gt=0,
        le=1000,
        title="Frame rate",
        description="Frames judged per second, to spread false events per hour over; the source's fps, else 25.",
    )
    events: EventSettings = Field(EventSettings(), title="Events", description="Stream mode: when an event lasts.")
    timeout_ms: float | None = Field(
        None,
        gt=0,
        title="Time-out [ms]",
        description="Triggered mode: a part judged later than this after capture is NOT_JUDGED; unlimited by default.",
    )
    threshold: ExternalThreshold | None = Field(
        None, title="Threshold from outside", description="Used in place of the budget where it names this bundle."
    )
    adaptation: AdaptationSettings | None = Field(
        None, title="Adaptation", description="Of this camera alone, in place of the box's section."
    )
    health: CameraHealthSettings | None = Field(
        None, title="Camera health", description="Watches for frozen, dark, blurred or moved cameras; else off."
    )

    @field_validator("name")
    @classmethod
    def _name_fits_a_topic(cls, name: str) -> str:
        try:
            return check_camera(name)
        except MessageError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _something_fires_it(self) -> CameraSettings:
        if self.mode is Mode.STREAM and self.source.trigger is TriggerMode.SOFTWARE:
            raise ValueError(f"camera {self.name!r} has a software trigger, and nothing fires it in mode stream")
        return self

    @property
    def alpha(self) -> float:
        """False-alarm probability per frame that the budget allows."""
        if self.mode is Mode.TRIGGERED:
            return self.budget.triggered_alpha()
        return self.budget.stream_alpha(frame_rate=self._rate, enter_hits=self.events.enter_hits)

    def budget_text(self, alpha: float) -> str:
        """Say a false-alarm probability per frame in the units of the budget."""
        if self.mode is Mode.TRIGGERED:
            return f"{1000 * alpha:.3g} false NOK per 1,000"
        return f"{3600 * alpha * self._rate / self.events.enter_hits:.3g} false events per hour"

    @property
    def _rate(self) -> float:
        return self.frame_rate or self.source.fps or DEFAULT_FRAME_RATE


def check_signal(signal: CameraSettings) -> None:
    """Raise a ValueError where an entry of ``signals`` asks for what only cameras have."""
    if signal.source.modality is not Modality.SIGNAL:
        raise ValueError(f"signal {signal.name!r}: kind {signal.source.kind.value} is a camera's; move it to `cameras`")
    for name, given in (
        ("mode: triggered", signal.mode is Mode.TRIGGERED),
        ("health", signal.health is not None),
        ("adaptation", signal.adaptation is not None),
        ("min_area", signal.min_area is not None),
    ):
        if given:
            raise ValueError(f"signal {signal.name!r}: {name} is for cameras; take it out")


class BoxSettings(BaseModel):
    """Everything one box needs to know. Relative paths are relative to the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str = Field(title="Site", description="The plant; second segment of every topic.")
    box: str = Field(title="Box", description="This box, unique in its site; third segment of every topic.")
    state_dir: Path = Field(title="State folder", description="Where the durable outbox is kept; made if missing.")
    bundle: Path = Field(  # type: ignore[assignment]  # where none is given, that of an entry takes its place
        None,
        title="Bundle",
        description="Folder of the bundle that judges whatever names none of its own; where absent all must, and the "
        "first one's stands for the box in its status and in slots.",
    )
    products: tuple[Path, ...] = Field(
        (), title="Product files", description="Products to add to the bundle, made by `lineward prompt`."
    )
    engine: Engine | None = Field(None, title="Engine", description="onnxruntime or openvino; the best one by default.")
    precision: Precision | None = Field(
        None, title="Precision", description="float32, bfloat16 or int8; the fastest one that is exact by default."
    )
    provider: Provider = Field(
        Provider.CPU,
        title="Provider of ONNX Runtime",
        description="What computes inside ONNX Runtime: cpu, cuda, or tensorrt (float16 unless precision is float32).",
    )
    threads: int = Field(0, ge=0, le=256, title="Threads", description="For the engine; 0 lets the engine choose.")
    broker: BrokerSettings = Field(BrokerSettings(), title="Broker", description="The MQTT broker.")
    outbox_max_mb: int = Field(
        64, ge=1, le=65536, title="Outbox limit [MiB]", description="The least important messages are dropped beyond."
    )
    status_every_s: float = Field(
        10.0, ge=0.1, le=3600, title="Status interval [s]", description="Status is published on change and this often."
    )
    memory: MemorySettings | None = Field(
        None, title="Memory", description="Lets the memory of a bundle that has one follow the line; off where absent."
    )
    adaptation: AdaptationSettings | None = Field(
        None,
        title="Adaptation",
        description="Lets cameras follow slow changes of light and optics, with bundles that carry moments; off where "
        "absent.",
    )
    federation: FederationSettings | None = Field(
        None, title="Federation", description="Shares the memory with a fleet; off where absent, needs memory."
    )
    evidence: EvidenceSettings | None = Field(
        None, title="Evidence", description="Keeps pictures of what was found; off where absent."
    )
    metrics: MetricsSettings | None = Field(
        None, title="Metrics", description="Serves figures to Prometheus; off where absent."
    )
    modbus: ModbusSettings | None = Field(
        None, title="Modbus", description="Serves verdicts to a PLC over Modbus TCP; off where absent."
    )
    trial: TrialSettings = Field(
        TrialSettings(), title="Trial", description="What a bundle newly installed into a slot has to show."
    )
    engine_stall_s: float = Field(
        20.0,
        ge=1,
        le=600,
        title="Engine stall [s]",
        description="An inference that takes longer ends the process, for its supervisor to start it again.",
    )
    cameras: tuple[CameraSettings, ...] = Field(
        (), title="Cameras", description="One entry per camera, depth cameras included."
    )
    signals: tuple[CameraSettings, ...] = Field(
        (),
        title="Signals",
        description="One entry per signal: vibration, current, ECG. A window of it is judged as a camera's frame is, "
        "and it is named and reported beside the cameras.",
    )
    stations: tuple[StationSettings, ...] = Field(
        (), title="Stations", description="Triggered cameras that judge parts together; each alone where absent."
    )

    @field_validator("site", "box")
    @classmethod
    def _name_fits_a_topic(cls, name: str, info: Any) -> str:  # noqa: ANN401 (pydantic's ValidationInfo)
        try:
            return check_segment(name, field=str(info.field_name))
        except MessageError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _signals_are_watched_as_cameras_are(self) -> BoxSettings:
        for signal in self.signals:
            check_signal(signal)
        for camera in self.cameras:
            if camera.source.modality is Modality.SIGNAL and camera not in self.signals:
                raise ValueError(f"camera {camera.name!r} is a signal; move it under `signals`")
            if camera.source.modality is Modality.DEPTH and (camera.health or camera.adaptation):
                raise ValueError(f"camera {camera.name!r}: health and adaptation are for pictures, not for depth")
        if not (self.cameras or self.signals):
            raise ValueError("cameras: needs at least one entry where there are no signals")
        # So that whoever reads `cameras` finds all that is watched; a frozen model can be completed only so.
        object.__setattr__(self, "cameras", self.cameras + tuple(s for s in self.signals if s not in self.cameras))
        return self

    @model_validator(mode="after")
    def _everything_has_a_bundle(self) -> BoxSettings:
        if "bundle" in self.model_fields_set:
            return self
        for camera in self.cameras:
            if camera.bundle is None:
                what = "signal" if camera in self.signals else "camera"
                raise ValueError(f"{what} {camera.name!r} names no bundle and the box has none; add `bundle` to either")
        if self.memory is not None:
            raise ValueError("memory is that of the box's bundle, and there is none; add `bundle` beside it")
        first = next((camera for camera in self.cameras if camera.enabled), self.cameras[0])
        object.__setattr__(self, "bundle", first.bundle)
        return self

    @model_validator(mode="after")
    def _camera_names_are_unique(self) -> BoxSettings:
        names = [camera.name for camera in self.cameras]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two cameras are named {twice[0]!r}; give each its own name")
        return self

    @model_validator(mode="after")
    def _stations_have_cameras(self) -> BoxSettings:
        triggered = {camera.name for camera in self.cameras if camera.mode is Mode.TRIGGERED}
        taken = {camera.name for camera in self.cameras}
        for station in self.stations:
            if station.name in taken:
                raise ValueError(f"station {station.name!r}: the name is taken; give it one of its own")
            for name in station.cameras:
                if name not in triggered:
                    raise ValueError(f"station {station.name!r}: {self._why_no_view(name)}")
            taken.add(station.name)
            triggered -= set(station.cameras)
            its = [camera for camera in self.cameras if camera.name in station.cameras]
            check_station(station, its, modbus=self.modbus is not None)
        for camera in self.cameras:
            if camera.name in triggered:
                check_alone(camera)
        return self

    def adaptation_of(self, camera: CameraSettings) -> AdaptationSettings | None:
        """Return how a camera follows its line; None where it does not, as depth and signals never do."""
        return (camera.adaptation or self.adaptation) if camera.source.modality is Modality.IMAGE else None

    def _why_no_view(self, name: str) -> str:
        """Why a station cannot have this camera, and the cure."""
        modes = {camera.name: camera.mode for camera in self.cameras}
        if name not in modes:
            return f"no camera is named {name!r}; cameras here: {', '.join(modes)}"
        if modes[name] is not Mode.TRIGGERED:
            return f"camera {name!r} watches a stream; give it `mode: triggered`"
        return f"camera {name!r} is in another station already; each camera is in one"

    @model_validator(mode="after")
    def _federation_has_a_memory(self) -> BoxSettings:
        if self.federation is not None and self.memory is None:
            raise ValueError("federation needs a memory section; add one, `memory: {}` has the defaults")
        return self


def load_settings(path: Path) -> BoxSettings:
    """Read a box's YAML file.

    Args:
        path: the file; relative paths in it are relative to its folder.

    Raises:
        SettingsError: the file is missing, no YAML, or has an unknown, doubled, missing or invalid key. The message
            names the file, the key and, for an unknown key, the nearest valid one; it never repeats a value, since
            that may be a password.
    """
    content = read_yaml(path, needed="site, box, state_dir and cameras")
    try:
        settings = BoxSettings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"{path}: {explain(error, BoxSettings)}") from error
    return _resolved(settings, path.resolve().parent)


def read_yaml(path: Path, *, needed: str) -> dict[Any, Any]:
    """Read a YAML file that holds settings; strict where PyYAML is not.

    Args:
        path: the file.
        needed: the keys that an empty file lacks, for its error.

    Raises:
        SettingsError: the file is missing, not UTF-8, no YAML, empty, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        content = _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise SettingsError(f"{path}: {where}{error.problem or error.context}; correct the YAML") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be parsed as YAML ({type(error).__name__}); correct it") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: holds no settings; at least {needed} are needed")
    return content


def settings_schema() -> str:
    """Return the JSON Schema of the YAML file, with title and description of each key."""
    return json.dumps(BoxSettings.model_json_schema(), indent=1)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one line what is wrong with settings: the key, the reason and the nearest valid key; never the value.

    Args:
        error: what pydantic raised.
        model: the model that it raised it for.
    """
    problems = error.errors(include_url=False, include_input=False)

    def is_unknown(problem: Any) -> bool:  # noqa: ANN401 (pydantic's ErrorDetails)
        """Where a key may be one of several models, each of the others calls its keys unknown."""
        owners, _ = _walk(model, problem["loc"])
        valid = {name for owner in owners for name in owner.model_fields}
        return problem["type"] == "extra_forbidden" and problem["loc"][-1] not in valid

    # An unknown key is often also a missing one; the unknown one tells more.
    known = [problem for problem in problems if problem["type"] != "extra_forbidden" or is_unknown(problem)]
    first = min(known or problems, key=lambda problem: not is_unknown(problem))
    loc = first["loc"]
    owner, path = _walk(model, loc)
    key = ".".join(path) or "settings"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(str(loc[-1]), owner)}"
    if first["type"] == "missing":
        return f"{key}: is missing; add it"
    return f"{key}: {_WORDS.get(first['type'], first['msg'].removeprefix('Value error, '))}"


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML forbids and PyYAML overlooks."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 (PyYAML's signature)
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _resolved(settings: BoxSettings, folder: Path) -> BoxSettings:
    def absolute(path: Path) -> Path:
        return folder / path.expanduser()

    broker = settings.broker
    files = {
        name: absolute(value)
        for name in ("password_file", "ca_file", "cert_file", "key_file")
        if (value := getattr(broker, name)) is not None
    }
    cameras = tuple(_resolved_camera(camera, folder) for camera in settings.cameras)
    signals = {signal.name for signal in settings.signals}
    memory, federation = settings.memory, settings.federation
    if memory is not None and memory.commissioning is not None:
        memory = memory.model_copy(update={"commissioning": absolute(memory.commissioning)})
    if federation is not None:
        names = ("key_file", "aggregator_key_file", "exchange")
        paths = {name: absolute(value) for name in names if (value := getattr(federation, name)) is not None}
        federation = federation.model_copy(update=paths)
    return settings.model_copy(
        update={
            "state_dir": absolute(settings.state_dir),
            "bundle": absolute(settings.bundle),
            "products": tuple(absolute(path) for path in settings.products),
            "broker": broker.model_copy(update=files),
            "memory": memory,
            "federation": federation,
            "cameras": cameras,
            "signals": tuple(camera for camera in cameras if camera.name in signals),
        }
    )


def _resolved_camera(camera: CameraSettings, folder: Path) -> CameraSettings:
    update: dict[str, Any] = {}
    if camera.bundle is not None:
        update["bundle"] = folder / camera.bundle.expanduser()
    if (mask := camera.region_of_interest.mask) is not None:
        region = camera.region_of_interest.model_copy(update={"mask": folder / mask.expanduser()})
        update["region_of_interest"] = region
    if camera.source.path is not None:
        path = str(folder / Path(camera.source.path).expanduser())
        update["source"] = camera.source.model_copy(update={"path": path})
    signal = camera.source.signal
    files = {name: folder / one.expanduser() for name in ("password_file", "ca_file") if (one := getattr(signal, name))}
    if files:
        update["source"] = camera.source.model_copy(update={"signal": signal.model_copy(update=files)})
    return camera.model_copy(update=update)


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _walk(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[type[BaseModel]], list[str]]:
    """Follow an error's location: the models that own its last key, and the path without pydantic's union tags."""
    owners, path = [model], list[str]()
    here = [model]
    for part in loc:
        if any(one.__name__ == part for one in here):
            continue
        path.append(str(part))
        if isinstance(part, str):
            owners = here
            here = [
                inner
                for one in here
                if part in one.model_fields
                for inner in _models_in(one.model_fields[part].annotation)
            ]
    return owners, path


def _nearest(key: str, owners: list[type[BaseModel]]) -> str:
    valid = sorted({name for owner in owners for name in owner.model_fields})
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(valid)}"
