"""The topic tree: who publishes what where. Knows names only, neither payloads nor the broker.

``<prefix>/<site>/<box>/{available,status,gap,notice}``, ``.../<camera>/{alert,verdict,state}`` and
``.../cmd/<verb>[/result]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edge.errors import MessageError

# MQTT 5, clause 1.5.4: a UTF-8 string field is at most 65,535 bytes; five names of 200 characters stay far below.
MAX_SEGMENT = 200
COMMAND_SEGMENT = "cmd"
RESULT_SEGMENT = "result"
REPLAY_VERB = "replay"
ACCEPT_VERB = "accept"
SHIP_VERB = "ship"
DEAD_LETTERS_VERB = "dead_letters"
THRESHOLD_VERB = "threshold"
RECIPE_VERB = "recipe"
RESET_VERB = "reset"
EVIDENCE_VERB = "evidence"
TRIGGER_VERB = "trigger"


class Kind(str, Enum):
    """What a topic carries; the value is the topic's last segment (but for commands)."""

    AVAILABLE = "available"
    STATUS = "status"
    GAP = "gap"
    NOTICE = "notice"
    ALERT = "alert"
    VERDICT = "verdict"
    STATE = "state"
    COMMAND = "cmd"
    RESULT = "result"


BOX_KINDS = frozenset({Kind.AVAILABLE, Kind.STATUS, Kind.GAP, Kind.NOTICE})
CAMERA_KINDS = frozenset({Kind.ALERT, Kind.VERDICT, Kind.STATE})


def check_segment(value: str, *, field: str) -> str:
    """A name that can be one level of a topic, returned as it came.

    Raises:
        MessageError: it is empty, too long, or holds ``+``, ``#``, ``/`` or a control character.
    """
    if not value or len(value) > MAX_SEGMENT:
        raise MessageError(f"{field}: a name of 1 to {MAX_SEGMENT} characters is needed, not {len(value)}")
    if any(c in "+#/" or not c.isprintable() for c in value) or value != value.strip():
        raise MessageError(f"{field} {value!r}: a name in a topic has no +, #, / or control character, no blank ends")
    # MQTT 5, clause 4.7.2: topics that start with $ are the broker's own.
    if value.startswith("$"):
        raise MessageError(f"{field} {value!r}: a name in a topic does not start with $")
    return value


def check_prefix(value: str) -> str:
    """A prefix of one or more segments.

    Raises:
        MessageError: as :func:`check_segment`.
    """
    for segment in value.split("/"):
        check_segment(segment, field="prefix")
    return value


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a box is, and therefore where it publishes.

    Attributes:
        site: the plant.
        box: the box, unique within its site.
        prefix: first segments of every topic.

    Raises:
        MessageError: a name cannot be part of a topic.
    """

    site: str
    box: str
    prefix: str = "lineward"

    def __post_init__(self) -> None:
        check_prefix(self.prefix)
        check_segment(self.site, field="site")
        check_segment(self.box, field="box")

    @property
    def root(self) -> str:
        """``<prefix>/<site>/<box>``."""
        return f"{self.prefix}/{self.site}/{self.box}"

    @property
    def available(self) -> str:
        """Retained: online, stopped or offline."""
        return f"{self.root}/{Kind.AVAILABLE.value}"

    @property
    def status(self) -> str:
        """Retained: how the box is doing."""
        return f"{self.root}/{Kind.STATUS.value}"

    @property
    def gap(self) -> str:
        """Rows that the box dropped on purpose."""
        return f"{self.root}/{Kind.GAP.value}"

    @property
    def notice(self) -> str:
        """What a person should know of the box itself."""
        return f"{self.root}/{Kind.NOTICE.value}"

    def alert(self, camera: str) -> str:
        """Phases of anomaly events of a camera."""
        return self._of_camera(camera, Kind.ALERT)

    def verdict(self, camera: str) -> str:
        """Verdicts on the parts of a camera in triggered mode."""
        return self._of_camera(camera, Kind.VERDICT)

    def state(self, camera: str) -> str:
        """Retained: what an actuator binds to."""
        return self._of_camera(camera, Kind.STATE)

    def command(self, verb: str) -> str:
        """Where a command is sent to the box."""
        return f"{self.root}/{COMMAND_SEGMENT}/{check_segment(verb, field='verb')}"

    def result(self, verb: str) -> str:
        """Where the box answers a command."""
        return f"{self.command(verb)}/{RESULT_SEGMENT}"

    def _of_camera(self, camera: str, kind: Kind) -> str:
        return f"{self.root}/{check_camera(camera)}/{kind.value}"


def check_camera(name: str) -> str:
    """A camera's name, returned as it came.

    Raises:
        MessageError: as :func:`check_segment`, or the name is the one reserved for commands.
    """
    if name == COMMAND_SEGMENT:
        raise MessageError(f"camera {name!r}: this name is reserved for commands; choose another")
    return check_segment(name, field="camera")


@dataclass(frozen=True, slots=True)
class Address:
    """A topic taken apart.

    Attributes:
        kind: what it carries.
        identity: the box.
        leaf: the camera of alert, verdict and state; the verb of a command and its result; else empty.
    """

    kind: Kind
    identity: Identity
    leaf: str = ""


def parse_topic(topic: str) -> Address:
    """Take a topic apart, from its end: the prefix may have any number of segments.

    Raises:
        MessageError: it is not one of ours.
    """
    *head, last = topic.split("/")
    if last == RESULT_SEGMENT and len(head) > 1 and head[-2] == COMMAND_SEGMENT:
        *head, _, leaf = head
        kind = Kind.RESULT
    elif head and head[-1] == COMMAND_SEGMENT:
        *head, _ = head
        kind, leaf = Kind.COMMAND, last
    elif last in {k.value for k in BOX_KINDS}:
        kind, leaf = Kind(last), ""
    elif last in {k.value for k in CAMERA_KINDS} and head:
        *head, leaf = head
        kind = Kind(last)
        check_camera(leaf)
    else:
        raise MessageError(f"topic {topic[:MAX_SEGMENT]!r} is not one of this product's")
    *prefix, site, box = head if len(head) > 2 else ("", "", "")  # noqa: PLR2004 (prefix, site and box)
    if leaf:
        check_segment(leaf, field="topic")
    return Address(kind=kind, identity=Identity(site=site, box=box, prefix="/".join(prefix)), leaf=leaf)


def subscriptions(prefix: str, *, site: str = "+", box: str = "+", kinds: frozenset[Kind]) -> list[str]:
    """Topic filters that match the given kinds; ``+`` stands for any site or box.

    Raises:
        MessageError: a name cannot be part of a topic.
    """
    check_prefix(prefix)
    for name in (site, box):
        if name != "+":
            check_segment(name, field="filter")
    root = f"{prefix}/{site}/{box}"
    filters = [f"{root}/{k.value}" for k in sorted(kinds & BOX_KINDS)]
    filters += [f"{root}/+/{k.value}" for k in sorted(kinds & CAMERA_KINDS)]
    filters += [f"{root}/{COMMAND_SEGMENT}/+"] * (Kind.COMMAND in kinds)
    filters += [f"{root}/{COMMAND_SEGMENT}/+/{RESULT_SEGMENT}"] * (Kind.RESULT in kinds)
    return filters
