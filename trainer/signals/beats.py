"""What beat annotations of ECG records say of samples: which are anomalous, which say nothing.

Labels are for evaluation and for choosing good windows; no detector is given the place of a beat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.signals.recording import EVENT_S, around

if TYPE_CHECKING:
    import numpy.typing as npt

NORMAL = frozenset("N")
"""Symbols of normal beats."""
BEATS = frozenset("NLRBAaJSVrFejnE/fQ?")
"""Symbols of beats, as PhysioNet's WFDB library defines them; others are marks of rhythm, noise and the like."""
NOISE = frozenset("~|")
"""Changes of signal quality and artefacts that look like beats."""


def labels_of_beats(
    places: npt.NDArray[np.integer], symbols: npt.NDArray[np.str_], rate_hz: float, length: int
) -> dict[str, Any]:
    """Return what a recording is told of its beats.

    Args:
        places: int64 [m], samples.
        symbols: unicode [m].
        rate_hz: of the recording.
        length: n, of the recording.

    Returns:
        ``anomalous``: 0.15 s to both sides of each beat that is not normal; ``usable``: False where noise is marked;
        ``least``: a window is anomalous when such a beat's place lies in it.
    """
    reach = round(EVENT_S * rate_hz)
    abnormal, noise = np.isin(symbols, sorted(BEATS - NORMAL)), np.isin(symbols, sorted(NOISE))
    return {
        "anomalous": around(np.asarray(places)[abnormal], reach, length),
        "usable": ~around(np.asarray(places)[noise], 0, length),
        "least": reach + 1,
    }
