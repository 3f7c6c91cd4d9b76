"""The values that travel through the box: Frame in, Prediction between, Verdict out.

They are immutable and know nothing of cameras, engines or brokers. Durations use the monotonic clock in
nanoseconds; only what leaves the box carries UTC.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003 (a field type of public values)
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge.adaptation.moments import Moments


@dataclass(frozen=True, slots=True)
class Frame:
    """One image as a camera delivered it; a depth map, or a window of a signal, from other sources.

    Attributes:
        image: uint8 [H, W, 3], BGR, values 0..255; else as :class:`edge.inputs.Modality` says.
        camera: name of the camera in the box's settings.
        camera_seq: counts the frames of this camera since the box started, dropped ones included; starts at 0.
        captured_ns: ``time.monotonic_ns()`` when decoding of the frame was complete; of a window, when its last sample
            was measured: before the last one of the chunk that it came in by what lies between them.
        captured_at: the same moment in UTC (timezone-aware).
        part_id: identity of the part in triggered mode, else None.
        name: where the frame came from (a file name, a video position), for people; may be empty.
        refusal: why its source says that it must not be judged; empty where it may.
    """

    image: npt.NDArray[Any]
    camera: str
    camera_seq: int
    captured_ns: int
    captured_at: datetime
    part_id: str | None = None
    name: str = ""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a detector says of one frame: the raw map, no threshold, no image score.

    Attributes:
        anomaly_map: float32 [h, w], raw, higher is more anomalous; covers the manifest's crop of the frame.
        frame: the frame it belongs to.
        preprocess_ns: time for crop, resize and tiles.
        inference_ns: time inside the engine, trunk and head together.
        memory_version: of the memory that the map was measured against, 0 for the one packed in the bundle.
        moments_version: of the moments that it was corrected by, 0 for none.
        moments: of the frame before correction of what they belong to; None where nobody asked for them.
        route: float32 [E], see :data:`edge.inference.sessions.ROUTE`; None where the bundle has no router.
        subclass: name of the sub-class whose expert the map is of; empty where the bundle has none.
    """

    anomaly_map: npt.NDArray[np.float32]
    frame: Frame
    preprocess_ns: int
    inference_ns: int
    memory_version: int = 0
    moments_version: int = 0
    moments: Moments | None = None
    route: npt.NDArray[np.float32] | None = None
    subclass: str = ""


class Decision(str, Enum):
    """What the box says of one part."""

    OK = "OK"
    NOK = "NOK"
    NOT_JUDGED = "NOT_JUDGED"


@dataclass(frozen=True, slots=True)
class Region:
    """A connected region above the threshold, in pixels of the camera frame; of a window x in samples, y in channels.

    Attributes:
        x: left edge.
        y: top edge.
        w: width, >= 1.
        h: height, >= 1.
        area: pixels of the camera frame covered by the region.
        peak: highest raw map value inside.
    """

    x: int
    y: int
    w: int
    h: int
    area: int
    peak: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judged frame.

    Attributes:
        decision: OK below the threshold, NOK at or above it; NOT_JUDGED when ``reason`` says why.
        score: pooled raw score, NaN when not judged.
        threshold: the raw threshold it was compared with.
        p_value: (1 + number of calibration scores >= score) / (n + 1), in (0, 1]; NaN when not judged.
        regions: regions above the threshold, strongest first; empty when OK.
        camera: as in the frame.
        camera_seq: as in the frame.
        part_id: as in the frame.
        captured_ns: as in the frame.
        captured_at: as in the frame.
        reason: empty, or why the part was not judged.
        latency_ms: milliseconds per stage (``preprocess``, ``inference``, ``judgement``, ``total`` since capture).
        memory_version: of the memory that judged, 0 for the one packed in the bundle; where no frame was judged, of
            the one whose threshold is shown.
        evidence: reference of the pictures kept of it; None where none are.
        moments_version: of the moments that its frame was corrected by, 0 for none.
        threshold_version: counts the changes of this camera's threshold, 0 for the one that the bundle gave first.
        subclass: name of the sub-class that judged; empty where the bundle has none.
    """

    decision: Decision
    score: float
    threshold: float
    p_value: float
    camera: str
    camera_seq: int
    captured_ns: int
    captured_at: datetime
    part_id: str | None = None
    regions: tuple[Region, ...] = ()
    reason: str = ""
    latency_ms: dict[str, float] = field(default_factory=dict)
    memory_version: int = 0
    evidence: str | None = None
    moments_version: int = 0
    threshold_version: int = 0
    subclass: str = ""


class EventPhase(str, Enum):
    """Where an anomaly event is in its life."""

    NEW = "new"
    UPDATE = "update"
    END = "end"


@dataclass(frozen=True, slots=True)
class AnomalyEvent:
    """One phase of an anomaly in a stream of frames.

    Attributes:
        event_id: 32 hex digits, the same in every phase of one event.
        phase: new, update or end.
        camera: name of the camera.
        camera_seq: of the frame that brought this phase.
        captured_ns: of that frame, monotonic.
        captured_at: of that frame, UTC.
        score: of that frame, raw.
        peak_score: highest raw score since the event began.
        threshold: the raw threshold in force.
        p_value: of that frame, as in :class:`Verdict`.
        frames: frames judged since the event began, this one included.
        regions: of that frame.
        latency_ms: of that frame.
        memory_version: of the memory that judged that frame; it may change within one event.
        evidence: reference of the pictures kept of the event, the same in every phase; None where none are.
        moments_version: of that frame, as in :class:`Verdict`.
        threshold_version: of that frame.
        subclass: of that frame.
    """

    event_id: str
    phase: EventPhase
    camera: str
    camera_seq: int
    captured_ns: int
    captured_at: datetime
    score: float
    peak_score: float
    threshold: float
    p_value: float
    frames: int
    regions: tuple[Region, ...] = ()
    latency_ms: dict[str, float] = field(default_factory=dict)
    memory_version: int = 0
    evidence: str | None = None
    moments_version: int = 0
    threshold_version: int = 0
    subclass: str = ""


@dataclass(frozen=True, slots=True)
class JudgedFrame:
    """A frame at the end of its way, as observers get it before anything is reported.

    Attributes:
        frame: as captured; a part whose frame never came has an empty image.
        prediction: what the detector said; None where it could not say anything.
        verdict: of this camera's judge.
        events: phases that this frame brought, in stream mode.
        alarmed: NOK, or part of an anomaly event.
    """

    frame: Frame
    prediction: Prediction | None
    verdict: Verdict
    events: tuple[AnomalyEvent, ...] = ()
    alarmed: bool = False
