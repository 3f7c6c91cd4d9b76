"""A signal as a source of frames: chunks of a transport in, windows out, every sample accounted for.

Knows the bundle's layout and no transport; a window is a frame, so that all behind it is as with cameras.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edge.capture.signal_rate import RateCheck
from edge.capture.signal_windows import Window, Windows
from edge.capture.sources import ALIVE, IDLE, Grab, Idle
from edge.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from edge.capture.signal_wire import Chunk
    from edge.inputs import SignalLayout


_NS = 1_000_000_000


class _Part(NamedTuple):
    """Samples that wait to be cut into windows, the rest of a chunk."""

    first: int
    samples: npt.NDArray[np.float32]
    end: int
    begins: bool
    refusal: str
    now: int


class Transport(Protocol):
    """What chunks come in by; used by one thread."""

    paced: bool
    """Whether samples come in real time."""

    def open(self) -> None:
        """Connect.

        Raises:
            CaptureError: the place is missing; the message names it and the cure.
        """

    def read(self) -> Sequence[Chunk] | None:
        """Wait for a tenth of a second at most; return what came, perhaps nothing; None at the end of a file.

        Raises:
            CaptureError: the connection is lost, or what comes is not of the format.
        """

    def close(self) -> None:
        """Let go; may be called twice."""

    @property
    def broken(self) -> int:
        """Lines or messages that could not be read."""


class SignalSource:
    """Windows of a signal, as a :class:`edge.capture.sources.Source`.

    Args:
        transport: brings the chunks.
        layout: of the bundle that judges.
        channels: names of the stream's channels where it does not say; the layout's in their order where empty.
        scale: that values are multiplied by.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        transport: Transport,
        layout: SignalLayout,
        *,
        channels: Sequence[str] = (),
        scale: float = 1.0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._transport, self._layout, self._clock = transport, layout, clock
        self._names, self._scale = tuple(channels), np.float32(scale)
        self._windows = Windows(
            channels=len(layout.channels), window=layout.window, hop=layout.hop, max_lost=layout.max_lost
        )
        self._rate = RateCheck(layout.rate_hz, paced=transport.paced)
        self._ready: deque[Grab] = deque()
        self._waiting: deque[_Part] = deque()
        self._refusal = ""
        # Windows that begin before this number hold samples of another rate, for this reason.
        self._refused_to, self._reason = 0, ""
        self._captured_ns = 0
        self._ended = False
        self._picked: tuple[tuple[str, ...], int, npt.NDArray[np.int64] | None] | None = None

    def open(self) -> None:
        """Connect the transport.

        Raises:
            CaptureError: as the transport's.
        """
        self._rate.forget()
        self._windows.reconnected()
        self._ended = False
        self._transport.open()

    def read(self) -> Grab | Idle | None:
        """Return the next window; ALIVE where samples came that complete none, IDLE where none came.

        Raises:
            CaptureError: the transport is broken, or its channels are not those of the bundle.
        """
        if self._ready or self._take():
            return self._ready.popleft()
        if self._ended:
            return None
        chunks = self._transport.read()
        if chunks is None:
            self._ended = True
            self._give(self._windows.finish(), self._clock())
            return self._ready.popleft() if self._ready else None
        now = self._clock()
        for chunk in chunks:
            samples, end = self._arranged(chunk), chunk.first + len(chunk.samples)
            if chunk.repeated:
                self._windows.counts.repeated += len(samples)
                continue
            refusal = self._rate.declared(chunk.rate_hz)
            self._waiting.append(_Part(chunk.first, samples, end, chunk.begins, refusal, now))
            self._rate.saw(end, now)
        if self._take():
            return self._ready.popleft()
        return ALIVE if chunks else IDLE

    def close(self) -> None:
        """Let go of the transport; windows begun go on with the next connection, by the numbers of their samples."""
        self._transport.close()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an operator should know."""
        return tuple(text for text in (self._rate.remark, self._refusal) if text)

    @property
    def counts(self) -> dict[str, int]:
        """Of samples, as :class:`~edge.capture.signal_windows.SampleCounts` has them, and ``broken`` lines."""
        return {**asdict(self._windows.counts), "pending": self._windows.pending, "broken": self._transport.broken}

    def _take(self) -> bool:
        """Cut what came into windows until there is one: a long chunk makes many, which would fill the memory."""
        while self._waiting and not self._ready:
            part = self._waiting.popleft()
            first, samples, end, begins, self._refusal, now = part
            hop, restarts = self._layout.hop, self._windows.counts.restarts
            if len(samples) > hop:
                self._waiting.appendleft(part._replace(first=first + hop, samples=samples[hop:], begins=False))
            if begins:
                self._give(self._windows.finish(), now)
            self._give(self._windows.push(first, samples[:hop], chunk_end=end), now, first, len(samples))
            if self._windows.counts.restarts > restarts:
                self._refused_to = 0
            if self._refusal:
                self._refused_to, self._reason = first + min(hop, len(samples)), self._refusal
        return bool(self._ready)

    def _give(self, windows: Sequence[Window], now: int, first: int = 0, count: int = 0) -> None:
        """Make windows frames; of ``count`` samples from number ``first`` on, the last one came now."""
        for window in windows:
            behind = window.first + self._layout.window + window.more * self._layout.hop
            # A chunk's samples came one after the other before it was sent, those of a gap before all of them.
            later = min(max(0, first + count - behind), count) if self._transport.paced else 0
            self._captured_ns = max(self._captured_ns, now - round(later * _NS / self._layout.rate_hz))
            refusal = self._refusal or (self._reason if window.first < self._refused_to else "")
            if window.more:
                refusal = refusal or f"{window.more + 1} windows lost too much to one gap; see the link to the sensor"
            self._ready.append(Grab(window.values, f"samples {window.first}-{behind - 1}", self._captured_ns, refusal))

    def _arranged(self, chunk: Chunk) -> npt.NDArray[np.float32]:
        """The bundle's channels in the bundle's order and unit."""
        names, count = chunk.channels or self._names, chunk.samples.shape[1]
        if self._picked is None or self._picked[:2] != (names, count):
            self._picked = (names, count, self._pick(names, count))
        order = self._picked[2]
        samples = chunk.samples if order is None else chunk.samples[:, order]
        # What is too large becomes an infinity, and its window is refused.
        with np.errstate(over="ignore"):
            return samples if self._scale == 1 else samples * self._scale

    def _pick(self, names: tuple[str, ...], count: int) -> npt.NDArray[np.int64] | None:
        wanted = self._layout.channels
        if not names:
            if count != len(wanted):
                raise CaptureError(
                    f"the stream has {count} channels, the bundle judges {len(wanted)}; name the stream's channels in "
                    "signal.channels, or see which bundle is set"
                )
            return None
        if len(names) != count:
            raise CaptureError(f"the stream has {count} channels, signal.channels names {len(names)}; correct it")
        missing = [name for name in wanted if name not in names]
        if missing:
            raise CaptureError(f"the stream lacks channel {', '.join(missing)}; it has {', '.join(names)}")
        return None if names == wanted else np.array([names.index(name) for name in wanted], np.int64)
