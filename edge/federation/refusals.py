"""Why a message between box and aggregator is refused: a closed list with a sentence each for operators."""

from __future__ import annotations

from enum import Enum


class Refusal(str, Enum):
    """Why something was refused. The value travels; :attr:`sentence` is for people, :attr:`final` for the box."""

    REVOKED = "revoked"
    UNKNOWN_BOX = "unknown_box"
    STOLEN_NAME = "stolen_name"
    BAD_VERSION = "bad_version"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    BAD_HASH = "bad_hash"
    BAD_OFFSET = "bad_offset"
    BAD_SHAPE = "bad_shape"
    NOT_FINITE = "not_finite"
    BAD_SUPPORT = "bad_support"
    SUPPORT_TOO_SMALL = "support_too_small"
    WRONG_FLEET = "wrong_fleet"
    WRONG_EMBEDDING = "wrong_embedding"
    WRONG_PRODUCT = "wrong_product"
    STALE_ROUND = "stale_round"
    FUTURE_ROUND = "future_round"
    REPLAYED_NONCE = "replayed_nonce"
    ALREADY_COUNTED = "already_counted"
    NO_SPACE = "no_space"
    BUSY = "busy"
    OTHER = "other"

    @property
    def sentence(self) -> str:
        """What happened and what an operator does about it."""
        return _SENTENCES[self]

    @property
    def final(self) -> bool:
        """Whether sending the same update again can never succeed, so that the box may drop it."""
        return self in _FINAL


_FINAL = frozenset(
    {
        Refusal.MALFORMED,
        Refusal.TOO_LARGE,
        Refusal.BAD_SHAPE,
        Refusal.NOT_FINITE,
        Refusal.BAD_SUPPORT,
        Refusal.SUPPORT_TOO_SMALL,
        Refusal.WRONG_FLEET,
        Refusal.WRONG_EMBEDDING,
        Refusal.WRONG_PRODUCT,
        Refusal.STALE_ROUND,
        Refusal.REPLAYED_NONCE,
        Refusal.ALREADY_COUNTED,
    }
)
_SENTENCES: dict[Refusal, str] = {
    Refusal.REVOKED: "The key of this box was revoked; enrol the box again with a new key.",
    Refusal.UNKNOWN_BOX: "This key belongs to no enrolled box; enrol it at the aggregator.",
    Refusal.STOLEN_NAME: "The message claims another box's name than its key has; look for a box with copied settings.",
    Refusal.BAD_VERSION: "The other side speaks another version of the protocol; update the older of the two.",
    Refusal.MALFORMED: "The message is damaged or was not made by this product.",
    Refusal.TOO_LARGE: "The update is over the aggregator's limit; send fewer rows or raise the limit.",
    Refusal.BAD_HASH: "The bytes that arrived are not those that were announced; the box sends them again.",
    Refusal.BAD_OFFSET: "A chunk does not continue what is stored; the box asks where to resume.",
    Refusal.BAD_SHAPE: "The update has the wrong number of rows or columns; check that all boxes run the same bundle.",
    Refusal.NOT_FINITE: "The update holds values that are not finite or beyond float16; begin the box's memory again.",
    Refusal.BAD_SUPPORT: "The counts behind the rows contradict each other; begin the box's memory again.",
    Refusal.SUPPORT_TOO_SMALL: "A row stands for fewer frames than may leave a box; let it learn longer.",
    Refusal.WRONG_FLEET: "The box belongs to another fleet; correct the fleet's name in its settings.",
    Refusal.WRONG_EMBEDDING: "The aggregator does not serve this bundle's embedding; roll out the same bundle.",
    Refusal.WRONG_PRODUCT: "The aggregator does not serve this product; correct the settings of one of them.",
    Refusal.STALE_ROUND: "The update is for a round closed too long ago; the box makes a new one.",
    Refusal.FUTURE_ROUND: "The update names a round that has not begun; the box asks for the current one.",
    Refusal.REPLAYED_NONCE: "Another update with this nonce was received; look for a recorded and altered message.",
    Refusal.ALREADY_COUNTED: "This box has already sent another update for the round; the first one counts.",
    Refusal.NO_SPACE: "The aggregator's disk is full; free space, boxes keep what they have and send it again.",
    Refusal.BUSY: "The aggregator cannot take this now; the box tries again later.",
    Refusal.OTHER: "The other side gives a reason that this version does not know; update the older of the two.",
}
