"""Opening the memory of a box: what was kept is read, checked and put in force again, or put aside and the packed used.

It knows the files and the detector; it must not know cameras, nor who is told of a damage.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge.errors import DataError, SettingsError
from edge.inference.state import stored_state
from edge.memory.banks import Banks
from edge.memory.learner import Learner
from edge.memory.progress import Progress
from edge.memory.store import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from edge.inference.detector import Detector
    from edge.memory.settings import MemorySettings
    from edge.memory.store import MemoryInForce

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenedMemory:
    """What a box goes on with.

    Attributes:
        store: the files.
        packed: the state that the bundle was packed with.
        in_force: the memory that judged last; None where the packed one does.
        learner: what follows the line.
        progress: how far shipping had come.
        damage: for people, what was put aside and why.
    """

    detector: Detector
    store: MemoryStore
    packed: dict[str, npt.NDArray[Any]]
    in_force: MemoryInForce | None
    learner: Learner
    progress: Progress
    damage: list[str] = field(default_factory=list)

    def put_in_force(self) -> None:
        """Have the detector judge with the kept memory; without one nothing happens.

        Raises:
            LinewardError: it does not fit the bundle, or no engine runs it.
        """
        kept, manifest = self.in_force, self.detector.bundle.manifest
        if kept is None or manifest.memory is None:
            return
        preprocessing, stride = manifest.preprocessing, manifest.map_stride
        wanted = (preprocessing.canvas_height // stride, preprocessing.canvas_width // stride)
        if kept.calibration.maps.shape[1:] != wanted:
            raise DataError(f"the kept maps are {kept.calibration.maps.shape[1:]}, the bundle's {wanted}")
        state = Banks(kept.local, kept.fleet).fill(self.packed, manifest.memory)
        self.detector.switch_state(state, memory_version=kept.version).result()

    def reject(self, reason: str) -> None:
        """Put the kept memory aside: the packed one judges."""
        self.in_force = None
        aside = _aside(self.store.put_in_force_aside())
        self.damage.append(f"{reason}; {aside}, the memory packed in the bundle judges")
        _LOG.error("memory: %s", self.damage[-1])


def open_memory(settings: MemorySettings, detector: Detector, folder: Path) -> OpenedMemory:
    """Read what a box has kept for this bundle.

    Args:
        settings: of the memory.
        detector: that judges with the packed memory so far.
        folder: of all memories of this box.

    Raises:
        SettingsError: the bundle's method has a memory that cannot be changed.
        BundleError: the bundle is damaged.
    """
    bundle, precision = detector.bundle, detector.status.precision
    layout = bundle.manifest.memory
    if layout is None or not detector.has_embedding:
        raise SettingsError(
            f"memory: the memory of {bundle.path} (method {bundle.manifest.method}) cannot change; remove the memory "
            "section, or use a bundle of the method feddymem"
        )
    store = MemoryStore(
        folder,
        bundle_id=bundle.id,
        embedding_id=bundle.manifest.embedding_id[precision],
        precision=precision.value,
    )
    packed = stored_state(bundle)
    opened = OpenedMemory(detector, store, packed, None, Learner.begin(settings, packed[layout.local]), Progress())
    try:
        opened.in_force = store.read_in_force()
    except DataError as error:
        opened.reject(str(error))
    try:
        opened.learner, opened.progress = _learned(store, opened.learner, settings)
    except DataError as error:
        opened.damage.append(f"{error}; {_aside(store.put_learned_aside())}, learning begins again")
        _LOG.error("memory: %s", opened.damage[-1])
    return opened


def _learned(store: MemoryStore, fresh: Learner, settings: MemorySettings) -> tuple[Learner, Progress]:
    kept = store.read_learned()
    if kept is None:
        return fresh, Progress()
    notes, arrays = kept
    learner = Learner.restore(settings, arrays)
    if learner.rows.shape != fresh.rows.shape:
        raise DataError(f"what was learned is {list(learner.rows.shape)}, the bundle's is {list(fresh.rows.shape)}")
    return learner, Progress.read(notes)


def _aside(path: Path | None) -> str:
    return "it cannot be put aside, check the folder's permissions" if path is None else f"it lies aside as {path}"
