"""Typed errors of the whole product. Each message names the file or field and the cure.

Every command turns a :class:`LinewardError` into its ``exit_code`` and one line on stderr: 2 usage, 3 bad input,
4 a gate refused. Anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from edge.federation.refusals import Refusal


class LinewardError(Exception):
    """Base of all errors that a user can cause and cure."""

    exit_code: ClassVar[int] = 3


class UsageError(LinewardError):
    """The command line or an argument is wrong."""

    exit_code: ClassVar[int] = 2


class MissingExtraError(UsageError):
    """A verb or engine needs an optional dependency that is not installed; the message names the extra."""


class DataError(LinewardError):
    """A folder, image or mask cannot be used as training or test data."""


class BundleError(LinewardError):
    """A bundle is incomplete, truncated, tampered with or of an unknown schema."""


class ProductError(LinewardError):
    """A product file is damaged or of another bundle, or none can be made."""


class SlotError(LinewardError):
    """The bundle slots of a box cannot be read or changed."""


class SettingsError(LinewardError):
    """A settings file does not parse, or has an unknown or invalid key."""


class CaptureError(LinewardError):
    """A camera, video or folder cannot be opened or read."""


class EngineError(LinewardError):
    """No engine can run a bundle's graphs on this machine."""


class OutboxError(LinewardError):
    """The durable outbox cannot be opened or written (a full or read-only disk, a damaged file)."""


class AdaptationError(LinewardError):
    """What a camera learned of its light cannot be read, or a recipe is none of the bundle's."""


class EvidenceError(LinewardError):
    """Evidence is not there, is damaged, or cannot be kept."""


class BrokerError(LinewardError):
    """The MQTT broker refuses us (login, TLS), or its address is invalid."""


class GateError(LinewardError):
    """A check that guards a bundle refused it; the message carries the measured figures."""

    exit_code: ClassVar[int] = 4


class MessageError(LinewardError):
    """A topic or payload is not one of the published messages, or a value cannot be put into one."""


class CommandError(LinewardError):
    """A box refuses a command; the message has its reason."""


class FederationError(LinewardError):
    """A message between box and aggregator is refused, by either side.

    Args:
        code: why, from a closed list that both sides know.
        message: which field, what was found and what to do.
    """

    def __init__(self, code: Refusal, message: str) -> None:
        super().__init__(message)
        self.code = code


class StoreError(LinewardError):
    """The aggregator's store cannot be opened or written (a full or read-only disk, a damaged file)."""
