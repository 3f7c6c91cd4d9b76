"""Putting a box's MemoryKeeper together from its parts. What each part does is theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.alerts.topics import ACCEPT_VERB, SHIP_VERB
from edge.federation.client import FederationClient
from edge.federation.keys import read_key_pair, read_public_key
from edge.memory.changeover import Changeover
from edge.memory.keeper import MemoryKeeper
from edge.memory.learner import Sender
from edge.settings import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.alerts.publisher import Publisher
    from edge.bundle import Bundle, Precision
    from edge.camera import CameraWorker
    from edge.federation.link import FleetLink
    from edge.health.metrics import Metrics
    from edge.memory.opening import OpenedMemory
    from edge.reporter import Reporter
    from edge.settings import BoxSettings

SPOOL_FILE = "federation.db"


def open_link(settings: BoxSettings, bundle: Bundle, precision: Precision) -> FederationClient | None:
    """Make the link that the settings describe, not yet started; None where the box is in no fleet.

    Raises:
        SettingsError: a key file cannot be read, or the secret one is open to others.
        StoreError: the updates that wait cannot be opened.
    """
    federation = settings.federation
    if federation is None:
        return None
    return FederationClient(
        address=federation.aggregator,
        server_key=read_public_key(federation.aggregator_key_file).key,
        keys=read_key_pair(federation.key_file),
        fleet=federation.fleet,
        box=f"{settings.site}/{settings.box}",
        product=bundle.manifest.product,
        subclass=federation.subclass,
        embedding_id=bundle.manifest.embedding_id[precision],
        path=settings.state_dir / SPOOL_FILE,
    )


def make_keeper(
    settings: BoxSettings,
    memory: OpenedMemory,
    *,
    cameras: Sequence[CameraWorker],
    link: FleetLink | None,
    reporter: Reporter,
    publisher: Publisher,
    metrics: Metrics,
) -> MemoryKeeper:
    """Make the keeper of an opened memory, and let it answer its commands.

    Args:
        settings: of the box; with a memory section.
        memory: as opened.
        cameras: of the box.
        link: to the fleet, if any.
        reporter: stores notices, and learns of memories before they judge.
        publisher: brings commands.
        metrics: of the box.
    """
    assert settings.memory is not None
    detector = memory.detector
    bundle, federation = detector.bundle, settings.federation
    sender = None
    if federation is not None:
        sender = Sender(
            fleet=federation.fleet,
            box=f"{settings.site}/{settings.box}",
            product=bundle.manifest.product,
            subclass=federation.subclass,
            embedding_id=bundle.manifest.embedding_id[detector.status.precision],
        )
    changeover = Changeover(
        detector=detector,
        packed=memory.packed,
        in_force=memory.in_force,
        store=memory.store,
        cameras=cameras,
        settings=settings.memory,
        notify=reporter.notice,
        announce=lambda version, fleet: reporter.know_memory(version, fleet=fleet),
    )
    keeper = MemoryKeeper(
        settings=settings.memory,
        detector=detector,
        cameras={camera.name: camera for camera in cameras},
        changeover=changeover,
        learner=memory.learner,
        store=memory.store,
        progress=memory.progress,
        sender=sender,
        link=link,
        notify=reporter.notice,
        answer=publisher.answer,
        metrics=metrics,
        remember=frozenset(camera.name for camera in settings.cameras if camera.mode is Mode.TRIGGERED),
    )
    for verb in (ACCEPT_VERB, SHIP_VERB):
        publisher.on_command(verb, keeper.command)
    return keeper
