"""FrameGate: whether a judged frame may feed the memory. It must not know the memory nor how often frames come.

Raw scores may be negative, and good frames often lie above half the threshold, so nothing here is a ratio of scores.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from edge.errors import DataError
from edge.judgement.threshold import leave_level

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MIN_SCORES = 10
"""Scores below which a quantile is not known: the median of 10 exceeds the true 0.8 once in 157 sets, of 5 in 17."""


class Learn(str, Enum):
    """Whose word lets a frame feed the memory.

    ``score``: a score below the calibrated quantile of good scores, or an operator or PLC that declared the part good.
    ``declared``: only that word. ``off``: nothing; the memory stays as it is.
    """

    SCORE = "score"
    DECLARED = "declared"
    OFF = "off"


class GateSettings(BaseModel):
    """What may teach the memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learn: Learn = Field(Learn.SCORE, title="Learn from", description="score | declared | off: what lets a frame feed.")
    quantile: float = Field(
        0.5,
        gt=0,
        lt=1,
        title="Quantile",
        description="Share of good frames that may feed by their score. High learns faster and lets faint defects in.",
    )


class FrameGate:
    """The gate of one memory in force; a memory that is replaced needs a new gate.

    Attributes:
        settings: as given.
        level: raw score below which a frame feeds; -inf where scores do not count.
    """

    def __init__(
        self,
        scores: npt.NDArray[np.floating],
        groups: npt.NDArray[np.str_] | None,
        settings: GateSettings | None = None,
    ) -> None:
        """Calibrate on good frames that the memory in force judged, never on frames chosen by their score.

        Args:
            scores: float [n], raw scores of images declared good; unused where scores do not count.
            groups: unicode [n], groups weigh the same; None when every image is independent.
            settings: what may teach; the defaults if None.

        Raises:
            DataError: by score, and there are fewer than 10 scores, a score is not finite, or groups are of another
                length.
        """
        self.settings = settings or GateSettings()
        self.level = -math.inf
        if self.settings.learn is not Learn.SCORE:
            return
        if scores.size < MIN_SCORES:
            raise DataError(
                f"{scores.size} calibration scores cannot place the gate, {MIN_SCORES} are needed; add images declared "
                "good to the commissioning set, or set memory.learn to declared"
            )
        self.level = leave_level(scores, groups, self.settings.quantile, math.inf)

    def admits(self, score: float, *, declared: bool | None = None) -> bool:
        """Return whether a frame may feed the memory.

        Args:
            score: raw score under the memory in force; a frame whose score is not finite never feeds.
            declared: True where an operator or PLC declared the part good, False where bad, None where nobody spoke.
        """
        if self.settings.learn is Learn.OFF or declared is False or not math.isfinite(score):
            return False
        return declared is True or score < self.level
