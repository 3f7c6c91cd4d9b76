"""Whether a frame shows enough to be judged, and which cells of its map say nothing; of the modality in hand.

It must not know thresholds: a frame that shows too little is not judged, whatever its score would be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge.errors import CaptureError
from edge.inference.depth import valid_share, within_range
from edge.inference.signals import lost_cells, too_much_lost

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge.bundle import Manifest
    from edge.frames import Frame


def require_enough(manifest: Manifest, frame: Frame, tiles: npt.NDArray[Any]) -> None:
    """Refuse a frame that must not be judged; points of a depth map out of range become invalid.

    Args:
        manifest: of the bundle.
        frame: as captured.
        tiles: what was made of it, [T, ...]; written to where it is a depth map.

    Raises:
        CaptureError: its source refuses it, or too much of it was lost or never measured; the message says how much.
    """
    if frame.refusal:
        raise CaptureError(frame.refusal)
    if manifest.signal is not None:
        reason = too_much_lost(frame.image, manifest.signal.max_lost, manifest.signal.channels)
        if reason:
            raise CaptureError(f"{reason}; see the link to the sensor")
    if manifest.depth is not None:
        within_range(tiles, manifest.depth)
        share = valid_share(tiles)
        if share < manifest.depth.min_valid:
            raise CaptureError(
                f"{100 * share:.3g} % of the points are valid, {100 * manifest.depth.min_valid:.3g} % must be; see the "
                "sensor's distance and what shines or absorbs"
            )


def hide_lost(manifest: Manifest, frame: Frame, anomaly_map: npt.NDArray[np.float32]) -> None:
    """Give cells of a signal's map the value 0, in place, that cover too many lost samples to say anything.

    As with invalid points of a depth map, which a head gives 0 itself: what was not measured is no anomaly.

    Args:
        manifest: of the bundle.
        frame: as captured.
        anomaly_map: float32 [h, w], of that frame.
    """
    if manifest.signal is None:
        return
    dead = lost_cells(frame.image, anomaly_map.shape, manifest.signal.max_lost)
    if dead is not None:
        anomaly_map[dead] = 0.0
