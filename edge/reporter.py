"""Reporter: verdicts and events into the durable outbox, camera states into retained topics.

A full disk or a message that cannot be built is counted and shown, and never stops the judging.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from edge.alerts.message import (
    BundleRef,
    Judge,
    MemoryRef,
    Severity,
    adaptation_of,
    alert_from_event,
    encode,
    notice_message,
    verdict_message,
)
from edge.alerts.outbox import Draft, Priority
from edge.errors import MessageError, OutboxError
from edge.frames import Decision, EventPhase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.alerts.message import NoticeKind, PartView
    from edge.alerts.outbox import Outbox
    from edge.alerts.publisher import Publisher
    from edge.alerts.topics import Identity
    from edge.bundle import Bundle
    from edge.frames import AnomalyEvent, Verdict
    from edge.health.metrics import Metrics
    from edge.inputs import SignalLayout

_LOG = logging.getLogger(__name__)
# What an operator misses least goes first when the outbox is full.
_EVENT_PRIORITY = {EventPhase.NEW: Priority.HIGH, EventPhase.UPDATE: Priority.LOW, EventPhase.END: Priority.HIGH}
_VERDICT_PRIORITY = {Decision.NOK: Priority.HIGH, Decision.NOT_JUDGED: Priority.HIGH, Decision.OK: Priority.NORMAL}
_NOTICE_LEVEL = {
    Severity.INFO: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.ALARM: logging.ERROR,
}


class _Judging(NamedTuple):
    """What a message says of the bundle behind it."""

    product: str
    bundle: BundleRef
    signal: SignalLayout | None


def _judging(bundle: Bundle) -> _Judging:
    manifest = bundle.manifest
    return _Judging(manifest.product, BundleRef(id=bundle.id, method=manifest.method), manifest.signal)


def _versions(verdict: Verdict) -> tuple[object, ...]:
    """What a state names beside its score: it is said again where one of these changes."""
    return verdict.memory_version, verdict.moments_version, verdict.threshold_version, verdict.subclass


class Reporter:
    """Where the cameras of a box hand in what they found. Safe to call from several threads.

    Args:
        identity: of the box, for topics.
        outbox: the durable queue.
        publisher: for retained states.
        bundle: that judges every camera for which :meth:`judged_by` names no other.
        metrics: counts ``alerts``, ``verdicts``, ``notices`` and ``messages_lost``.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        outbox: Outbox,
        publisher: Publisher,
        bundle: Bundle,
        metrics: Metrics,
    ) -> None:
        self._identity = identity
        self._outbox = outbox
        self._publisher = publisher
        self._default = _judging(bundle)
        self._bundles: dict[str, _Judging] = {}
        self._memories = {0: MemoryRef()}
        self._metrics = metrics
        self._lock = threading.Lock()
        self._shown: dict[str, tuple[object, ...]] = {}
        self._error = ""

    @property
    def error(self) -> str:
        """Why the last message was lost; empty when it was stored."""
        return self._error

    def judged_by(self, source: str, bundle: Bundle) -> None:
        """Learn, before its next message, which bundle's product and method those of a camera or station name."""
        with self._lock:
            self._bundles[source] = _judging(bundle)

    def know_memory(self, version: int, *, fleet: int) -> None:
        """Learn, before it judges, which version of the fleet's memory is inside a version of the box's own."""
        with self._lock:
            self._memories[version] = MemoryRef(version=version, fleet=fleet)

    def event(self, event: AnomalyEvent, *, calibration_count: int) -> None:
        """Store one phase of an event."""
        judge = self._judge(event.camera, event.memory_version, calibration_count)

        def make(epoch: str, seq: int) -> bytes:
            return encode(alert_from_event(event, identity=self._identity, judge=judge, epoch=epoch, seq=seq))

        self._store(Draft(self._identity.alert(event.camera), make, _EVENT_PRIORITY[event.phase]), "alerts")

    def verdict(
        self, verdict: Verdict, *, calibration_count: int, views: Sequence[PartView] = (), judged_by: str = ""
    ) -> None:
        """Store the verdict on one part.

        Args:
            verdict: its ``camera`` is the station, or the camera that is one alone.
            calibration_count: scores behind its p-value.
            views: what each camera of the station says.
            judged_by: the camera whose figures and bundle these are, where that is not the verdict's.
        """
        camera = judged_by or verdict.camera
        judge = self._judge(camera, verdict.memory_version, calibration_count)

        def make(epoch: str, seq: int) -> bytes:
            message = verdict_message(
                verdict, identity=self._identity, judge=judge, epoch=epoch, seq=seq, views=views, decided_by=camera
            )
            return encode(message)

        topic = self._identity.verdict(verdict.camera)
        self._store(Draft(topic, make, _VERDICT_PRIORITY[verdict.decision]), "verdicts")

    def notice(self, kind: NoticeKind, severity: Severity, text: str, **detail: Any) -> None:  # noqa: ANN401 (JSON)
        """Store what a person should know of the box itself.

        Args:
            kind: of the occasion.
            severity: how soon it should be read.
            text: for people.
            detail: figures, as JSON values.
        """

        def make(epoch: str, seq: int) -> bytes:
            return encode(
                notice_message(
                    identity=self._identity,
                    epoch=epoch,
                    seq=seq,
                    kind=kind.value,
                    severity=severity,
                    text=text,
                    detail=detail,
                )
            )

        _LOG.log(_NOTICE_LEVEL[severity], "%s: %s", kind.value, text)
        self._store(Draft(self._identity.notice, make, Priority.HIGH), "notices")

    def state(
        self,
        camera: str,
        state: str,
        *,
        reason: str = "",
        event_id: str | None = None,
        part_id: str | None = None,
        verdict: Verdict | None = None,
    ) -> None:
        """Publish a camera's retained state where it differs from the one shown.

        Args:
            camera: its name.
            state: ``ok``, ``nok`` or ``not_judged``.
            reason: why it was not judged.
            event_id: of the event that lasts, in stream mode.
            part_id: of the part, in triggered mode.
            verdict: whose score, threshold and memory are shown, and whose part is a new one each time.
        """
        part = None if verdict is None or part_id is None else verdict.camera_seq
        judged = verdict is not None and verdict.decision is not Decision.NOT_JUDGED
        shown = (state, reason, event_id, part_id, part, _versions(verdict) if judged and verdict else None)
        values: dict[str, Any] = {"state": state, "reason": reason, "event_id": event_id, "part_id": part_id}
        if verdict is not None:
            values |= {
                name: value
                for name, value in (("score", verdict.score), ("threshold", verdict.threshold))
                if math.isfinite(value)
            }
            values |= {"memory": self._memory(verdict.memory_version), "adaptation": adaptation_of(verdict)}
        with self._lock:
            if self._shown.get(camera) == shown:
                return
            self._shown[camera] = shown
        try:
            self._publisher.publish_state(camera, values)
        except MessageError as error:
            self._metrics.count("states_failed")
            _LOG.error("camera %s: its state cannot be published: %s", camera, error)

    def _memory(self, version: int) -> MemoryRef:
        with self._lock:
            return self._memories.get(version, MemoryRef(version=version))

    def _judge(self, source: str, memory_version: int, calibration_count: int) -> Judge:
        product, bundle, signal = self._bundles.get(source, self._default)
        return Judge(
            product=product,
            bundle=bundle,
            memory=self._memory(memory_version),
            p_value_floor=1 / (calibration_count + 1),
            signal=signal,
        )

    def _store(self, draft: Draft, counter: str) -> None:
        try:
            self._outbox.append_many([draft])
        except (OutboxError, MessageError) as error:
            self._metrics.count("messages_lost")
            if not self._error:
                _LOG.error("messages are being lost: %s", error)
            self._error = str(error)
            return
        self._metrics.count(counter)
        if self._error:
            _LOG.info("messages are stored again")
            self._error = ""
