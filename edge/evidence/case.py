"""Case: what is gathered of one event before it is written; Picture: a frame that is compressed once, when needed.

Knows nothing of threads and files; the record that it makes is the content of event.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge.alerts.wire import format_utc
from edge.evidence.drawing import draw
from edge.evidence.names import RECORD
from edge.evidence.pictures import draw_overlay, encode_array, encode_jpeg, encode_map
from edge.judgement.region_of_interest import covered_box

if TYPE_CHECKING:
    from edge.bundle import Bundle
    from edge.frames import Frame, JudgedFrame

SCHEMA = "lineward.evidence/1"
MAP_FILE, MAP_SCALE_FILE, OVERLAY_FILE, FRAME_FILE = "map.png", "map.json", "overlay.jpg", "frame.jpg"
WINDOW_FILE = "window.npy"  # of a signal: the samples themselves, which a picture cannot give back
_CHANNELS_BY_SAMPLES = 2


class Picture:
    """One frame of a camera; after :meth:`jpeg` its pixels are let go. Made in the camera's thread, read in another.

    Args:
        frame: as captured.
    """

    def __init__(self, frame: Frame) -> None:
        self.camera = frame.camera
        self.camera_seq = frame.camera_seq
        self.captured_at = frame.captured_at
        self._image = frame.image
        self._jpeg = b""

    @property
    def raw_bytes(self) -> int:
        """Of the pixels that it holds."""
        return self._image.nbytes

    def jpeg(self, quality: int) -> bytes:
        """The frame as JPEG.

        Raises:
            EvidenceError: it cannot be encoded.
        """
        if not self._jpeg:
            self._jpeg = encode_jpeg(draw(self._image).picture, quality)
            self._image = self._image[:0].copy()
        return self._jpeg


@dataclass(slots=True, eq=False)  # each is only itself
class Case:
    """What is known of one event so far.

    Attributes:
        reference: its name.
        judged: the frame that brought it, let go once :meth:`show` was called.
        bundle: that judged it.
        event_id: in stream mode.
        picture: of that frame.
        before: frames before it, the nearest last.
        after: frames after it that are still to come.
        due: monotonic seconds at which it is closed whatever is still to come.
        taken: frames that came after it.
        files: what is encoded by now.
        frames: for the record, one entry per picture.
        skipped: frames that were left out because too many waited.
        failed: it cannot be kept.
    """

    reference: str
    judged: JudgedFrame
    bundle: Bundle
    event_id: str | None
    picture: Picture
    before: tuple[Picture, ...]
    after: int
    due: float
    taken: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    frames: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    failed: bool = False

    def show(self, *, quality: int) -> None:
        """Encode the event's own pictures: map, overlay, frame, and those before it.

        Raises:
            EvidenceError: one cannot be encoded.
        """
        judged = self.judged
        if judged.prediction is not None:
            anomaly_map, image = judged.prediction.anomaly_map, judged.frame.image
            crop = self.bundle.manifest.preprocessing.crop
            box = covered_box(crop, frame_width=image.shape[1], frame_height=image.shape[0])
            self.files[MAP_FILE], scale = encode_map(anomaly_map)
            scale |= {"covers": dict(zip("xywh", box, strict=True)), "threshold": _finite(judged.verdict.threshold)}
            self.files[MAP_SCALE_FILE] = _json(scale)
            regions = judged.verdict.regions
            seen = draw(image)
            drawn = draw_overlay(
                seen.picture, anomaly_map, box=seen.box(box), threshold=judged.verdict.threshold,
                regions=seen.regions(regions),
            )  # fmt: skip
            self.files[OVERLAY_FILE] = encode_jpeg(drawn, quality)
            if image.ndim == _CHANNELS_BY_SAMPLES:
                self.files[WINDOW_FILE] = encode_array(image)
        for index, picture in enumerate(self.before):
            self.add(picture, index - len(self.before), quality=quality)
        self.add(self.picture, 0, quality=quality)
        self.before = ()
        # From here on only its figures matter; the buffers belong to the camera again.
        frame = dataclasses.replace(judged.frame, image=judged.frame.image[:0].copy())
        self.judged = dataclasses.replace(judged, frame=frame, prediction=None)

    def add(self, picture: Picture, place: int, *, quality: int) -> None:
        """Encode one frame.

        Args:
            picture: the frame.
            place: -1 is the frame before the event, 0 the event's own, 1 the one after it.
            quality: of the JPEG.

        Raises:
            EvidenceError: it cannot be encoded.
        """
        name = FRAME_FILE if place == 0 else f"{'before' if place < 0 else 'after'}-{abs(place)}.jpg"
        self.files[name] = picture.jpeg(quality)
        moment = format_utc(picture.captured_at)
        self.frames.append({"file": name, "place": place, "camera_seq": picture.camera_seq, "ts": moment})

    def complete(self) -> dict[str, bytes]:
        """All files, the record among them."""
        verdict, manifest = self.judged.verdict, self.bundle.manifest
        record = {
            "schema": SCHEMA,
            "reference": self.reference,
            "camera": verdict.camera,
            "event_id": self.event_id,
            "part_id": verdict.part_id,
            "ts": format_utc(verdict.captured_at),
            "uptime_ms": verdict.captured_ns // 1_000_000,
            "camera_seq": verdict.camera_seq,
            "decision": verdict.decision.value,
            "reason": verdict.reason,
            "score": _finite(verdict.score),
            "threshold": _finite(verdict.threshold),
            "p_value": _finite(verdict.p_value),
            "regions": [dataclasses.asdict(region) | {"peak": _finite(region.peak)} for region in verdict.regions],
            "product": manifest.product,
            "bundle": {"id": self.bundle.id, "method": manifest.method},
            "memory_version": verdict.memory_version,
            "moments_version": verdict.moments_version,
            "threshold_version": verdict.threshold_version,
            "subclass": verdict.subclass,
            "frames": sorted(self.frames, key=lambda frame: frame["place"]),
            "frames_left_out": self.skipped,
            "files": {
                name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in sorted(self.files.items())
            },
        }
        return {**self.files, RECORD: _json(record)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
