"""CameraGates: which frames of a camera may teach the memory, under the memory in force. It must not know frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError
from edge.inference.preprocessing import cut_map
from edge.memory.gate import FrameGate, GateSettings, Learn

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edge.bundle import Manifest
    from edge.memory.changeover import JudgedCamera


class CameraGates:
    """A gate for each camera, made anew whenever its good scores change.

    Args:
        cameras: by name; a camera's own region of interest holds for its gate too.
        settings: of the gates.

    Attributes:
        trouble: why nothing is learned by score; empty where it is, or is not meant to be.
    """

    def __init__(self, cameras: Mapping[str, JudgedCamera], settings: GateSettings) -> None:
        self._cameras = cameras
        self._settings = GateSettings(learn=settings.learn, quantile=settings.quantile)
        self._gates: dict[str, tuple[npt.NDArray[np.float32], FrameGate | None]] = {}
        self.trouble = ""

    def by_score(self, camera: str, *, memory_version: int) -> FrameGate | None:
        """Return the gate of a camera; None where it cannot be made, or while a switch is on its way to the camera."""
        judge = self._cameras[camera].judge
        if judge.memory_version != memory_version:
            return None
        scores = judge.good_scores
        known = self._gates.get(camera)
        # Another memory, or another size of the frames under a region of interest, brings other scores.
        if known is not None and known[0] is scores:
            return known[1]
        gate: FrameGate | None = None
        try:
            gate = FrameGate(scores, judge.calibration.groups, self._settings)
            self.trouble = ""
        except DataError as error:
            self.trouble = str(error)
        self._gates[camera] = (scores, gate)
        return gate

    def inside(self, camera: str, manifest: Manifest) -> npt.NDArray[np.bool_] | None:
        """Return which patches of a camera's frames count, bool [tiles, L]; None where all do."""
        mask = self._cameras[camera].judge.mask
        if mask is None:
            return None
        tiles = cut_map(mask, manifest.preprocessing, manifest.map_stride)
        return np.asarray(tiles.reshape(len(tiles), -1), dtype=np.bool_)

    def declared(self, camera: str) -> FrameGate:
        """Return a gate for a frame that somebody declared good: it needs no calibration."""
        learn = Learn.OFF if self._settings.learn is Learn.OFF else Learn.DECLARED
        judge = self._cameras[camera].judge
        return FrameGate(judge.good_scores, None, self._settings.model_copy(update={"learn": learn}))
