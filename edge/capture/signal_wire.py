"""The wire format of signals: JSON lines, packed float32 messages, and text lines for small controllers.

One parser reads all three, told apart by their first byte. Pure; docs/formats.md describes the format.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import CaptureError

if TYPE_CHECKING:
    import numpy.typing as npt

MAGIC = b"LWS1"
_HEADER = struct.Struct("<4sHHIQdI")
HEADER_BYTES = _HEADER.size
MAX_MESSAGE_BYTES = 4 * 2**20
MAX_QUEUED_BYTES = MAX_MESSAGE_BYTES + HEADER_BYTES
"""Longest message of a message queue."""
MAX_PIECES = 65_536
"""Most lines and packed messages in one message of a message queue; to read 4 MiB of short lines takes 20 s."""
MAX_CHANNELS = 4096
MAX_SEQ = 2**63 - 1
_FLOAT_BYTES = 4
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive samples of all channels.

    Attributes:
        first: number of the first sample; the sender counts its samples, lost ones included.
        samples: float32 [T, K], T >= 1; NaN where the sender knows that a value is missing.
        rate_hz: samples per second as the sender says; None where it does not.
        channels: names of the K channels; empty where the sender does not say.
        begins: no sample before it belongs to the same recording; what is numbered before is over.
        repeated: came before, and was sent again.
    """

    first: int
    samples: npt.NDArray[np.float32]
    rate_hz: float | None = None
    channels: tuple[str, ...] = ()
    begins: bool = False
    repeated: bool = False


def pack(chunk: Chunk) -> bytes:
    """Return a chunk as one packed message; names of channels are not in it."""
    body = np.ascontiguousarray(chunk.samples, dtype="<f4").tobytes()
    length, channels = chunk.samples.shape
    head = _HEADER.pack(MAGIC, channels, 0, length, chunk.first, chunk.rate_hz or 0.0, zlib.crc32(body))
    return head + body


def to_json(chunk: Chunk) -> bytes:
    """Return a chunk as one JSON line, its newline included; NaN becomes null."""
    rows = [[None if math.isnan(value) else float(value) for value in row] for row in chunk.samples.tolist()]
    content: dict[str, Any] = {"seq": chunk.first, "samples": rows}
    if chunk.rate_hz is not None:
        content["rate_hz"] = chunk.rate_hz
    if chunk.channels:
        content["channels"] = list(chunk.channels)
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def to_text(chunk: Chunk) -> bytes:
    """Return a chunk as text lines, one per sample: ``S``, its number, one value per channel (or ``nan``)."""
    lines = (
        " ".join(("S", str(chunk.first + index), *(f"{value:.7g}" for value in row)))
        for index, row in enumerate(chunk.samples.tolist())
    )
    return "".join(f"{line}\n" for line in lines).encode()


class StreamParser:
    """From bytes as they come in to chunks; keeps what is not complete yet, up to one message.

    A line that cannot be read is counted in ``broken`` and left out: the next one begins at the next newline. A packed
    message that cannot be read ends the stream, since nobody knows where the next one begins.

    Args:
        whole: what comes is one message of a message queue, of which everything must be right.

    Attributes:
        broken: lines that could not be read.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._bytes = bytearray()
        self._whole = whole
        self.broken = 0

    def feed(self, data: bytes) -> list[Chunk]:
        """Take bytes in and return what is complete.

        Raises:
            CaptureError: a packed message is damaged, or a message is longer than 4 MiB; of a whole message anything.
        """
        self._bytes += data
        found: list[Chunk] = []
        pieces = 0
        while self._bytes:
            pieces += 1
            if self._whole and pieces > MAX_PIECES:
                raise CaptureError(f"a message has more than {MAX_PIECES} lines; send more samples in each, or fewer")
            taken = self._packed(found) if self._bytes.startswith(MAGIC[:1]) else self._line(found)
            if not taken:
                break
            del self._bytes[:taken]
        return found

    @property
    def unread(self) -> int:
        """Bytes of a message that is not complete yet."""
        return len(self._bytes)

    def _packed(self, found: list[Chunk]) -> int:
        """Read one packed message; returns its length, 0 where it is not complete."""
        buffer = self._bytes
        if not MAGIC.startswith(bytes(buffer[: len(MAGIC)])):
            raise CaptureError("the stream holds no message of this format; see what sends it, and its version")
        if len(buffer) < HEADER_BYTES:
            return 0
        length = HEADER_BYTES + body_bytes(bytes(buffer[:HEADER_BYTES]))
        if len(buffer) < length:
            return 0
        found.append(unpack(bytes(buffer[:length])))
        return length

    def _line(self, found: list[Chunk]) -> int:
        end = self._bytes.find(b"\n")
        if end < 0:
            if len(self._bytes) > MAX_MESSAGE_BYTES:
                raise CaptureError(f"a line is longer than {MAX_MESSAGE_BYTES} bytes; send shorter chunks")
            return 0
        line = bytes(self._bytes[:end]).strip()
        if line:
            try:
                found.append(read_line(line))
            except CaptureError:
                if self._whole:
                    raise
                self.broken += 1
        return end + 1


def read_messages(payload: bytes) -> list[Chunk]:
    """Return the chunks of one whole message of a message queue; a last line needs no newline.

    Raises:
        CaptureError: it is not of this format.
    """
    if len(payload) > MAX_QUEUED_BYTES:
        raise CaptureError(f"a message is longer than {MAX_QUEUED_BYTES} bytes; send shorter chunks")
    parser = StreamParser(whole=True)
    chunks = parser.feed(payload if payload.startswith(MAGIC) or payload.endswith(b"\n") else payload + b"\n")
    if parser.unread or not chunks:
        raise CaptureError("a message is not complete; send whole chunks")
    return chunks


def body_bytes(header: bytes) -> int:
    """Return how many bytes follow a packed header.

    Raises:
        CaptureError: it is none, or of a message that is too long.
    """
    magic, channels, flags, length, first, rate, _ = _HEADER.unpack(header)
    if magic != MAGIC or flags != 0:
        raise CaptureError("a packed message has an unknown header; see what sends it, and its version")
    size = int(channels) * int(length) * _FLOAT_BYTES
    if not 1 <= channels <= MAX_CHANNELS or length < 1 or size > MAX_MESSAGE_BYTES or first > MAX_SEQ:
        raise CaptureError(
            f"a packed message says {channels} channels by {length} samples from number {first}; at most "
            f"{MAX_CHANNELS} channels and {MAX_MESSAGE_BYTES} bytes"
        )
    if not (math.isfinite(rate) and rate >= 0):
        raise CaptureError(f"a packed message says a rate of {rate}; send samples per second, or 0")
    return size


def unpack(message: bytes) -> Chunk:
    """Read one packed message.

    Raises:
        CaptureError: it is not complete or damaged.
    """
    size = body_bytes(message[:HEADER_BYTES])
    body = message[HEADER_BYTES : HEADER_BYTES + size]
    _, channels, _, length, first, rate, checksum = _HEADER.unpack(message[:HEADER_BYTES])
    if len(body) != size or zlib.crc32(body) != checksum:
        raise CaptureError("a packed message is damaged (its checksum differs); see the link")
    samples = np.frombuffer(body, "<f4").reshape(length, channels).astype(np.float32)
    return Chunk(first, _without_infinity(samples), rate or None)


def read_line(line: bytes) -> Chunk:
    """Read one JSON line or one text line.

    Raises:
        CaptureError: it is neither.
    """
    try:
        if line.startswith(b"S"):
            words = line.split()
            first, values = int(words[1]), [float(word) for word in words[2:]]
            return _checked(first, _float32([values]), None, ())
        content = json.loads(line)
        names = content.get("channels") or []
        rate = content.get("rate_hz")
        samples = _float32(content["samples"])
        return _checked(
            content["seq"], samples, None if rate is None else float(rate), tuple(str(name) for name in names)
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        shown = line[:_SHOWN].decode(errors="replace")
        raise CaptureError(f"a line cannot be read ({type(error).__name__}): {shown!r}") from error


def _checked(first: object, samples: npt.NDArray[np.float32], rate: float | None, names: tuple[str, ...]) -> Chunk:
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= MAX_SEQ:
        raise ValueError("seq")
    if samples.ndim != 2 or not samples.size or samples.shape[1] > MAX_CHANNELS:  # noqa: PLR2004 (samples by channels)
        raise ValueError("samples")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError("rate_hz")
    if names and len(names) != samples.shape[1]:
        raise ValueError("channels")
    return Chunk(first, _without_infinity(samples), rate, names)


def _float32(rows: object) -> npt.NDArray[np.float32]:
    """None becomes NaN, which is what null means; what is too large an infinity."""
    with np.errstate(over="ignore"):
        return np.array(rows, np.float32)


def _without_infinity(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A value out of range is no measurement."""
    return np.where(np.isfinite(samples), samples, np.float32(np.nan))
