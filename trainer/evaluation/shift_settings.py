"""Settings of the sub-class shift protocol: what is judged, and what the judging detector was given of it.

Names and sentences; they must not know methods or data.
"""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field

from trainer.data.subclass_shift import SHOTS


class AdaptedBy(str, Enum):
    """What a detector does about what it judges; it is never trained and its threshold never moves.

    ``nothing``: it judges as it was trained. ``own_moments``: what a box can do without being told anything: each
    image and its taps are brought from their own moments to those of training. ``moments``: what a box does that
    follows its camera: every image is brought from the moments of the given good images to those of training. ``rows``:
    the head itself takes the given good images in (:class:`trainer.methods.base.Adaptable`), nothing is corrected.
    """

    NOTHING = "nothing"
    OWN_MOMENTS = "own moments"
    MOMENTS = "moments"
    ROWS = "rows"


class Setting(BaseModel):
    """One setting, as the report publishes it.

    Attributes:
        name: its key everywhere in the report.
        trained_on: whether the judged sub-class is among the trained ones.
        adapted_by: see :class:`AdaptedBy`.
        given: good images of the judged sub-class that were given, none of them judged.
        meaning: for people to read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    trained_on: bool
    adapted_by: AdaptedBy
    given: int = Field(ge=0)
    meaning: str


SEEN, UNSEEN, OWN = "seen", "unseen", "unseen, own"


def by_moments(count: int) -> str:
    """Return the name of the setting in which moments of ``count`` good images are given."""
    return f"{UNSEEN}+{count}"


def by_rows(count: int) -> str:
    """Return the name of the setting in which a head takes ``count`` good images in."""
    return f"{UNSEEN}+{count} rows"


SETTINGS = (
    Setting(
        name=SEEN,
        trained_on=True,
        adapted_by=AdaptedBy.NOTHING,
        given=0,
        meaning="Test images of trained sub-classes, judged as they are.",
    ),
    Setting(
        name=UNSEEN,
        trained_on=False,
        adapted_by=AdaptedBy.NOTHING,
        given=0,
        meaning="Test images of sub-classes that were left out, judged as they are.",
    ),
    Setting(
        name=OWN,
        trained_on=False,
        adapted_by=AdaptedBy.OWN_MOMENTS,
        given=0,
        meaning="The same, each image and its taps brought from their own moments to those of training.",
    ),
    *(
        Setting(
            name=by_moments(count),
            trained_on=False,
            adapted_by=AdaptedBy.MOMENTS,
            given=count,
            meaning=f"The same, every image brought from the moments of {count} given good to those of training.",
        )
        for count in SHOTS
    ),
    *(
        Setting(
            name=by_rows(count),
            trained_on=False,
            adapted_by=AdaptedBy.ROWS,
            given=count,
            meaning=f"The same, uncorrected, by a head that took the rows of {count} given good images in.",
        )
        for count in SHOTS
    ),
)
"""All settings, in the order of tables and drawings."""
