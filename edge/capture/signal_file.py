"""A recording as a live signal, WFDB or npz: replayed at real time, faster, or as fast as windows are judged.

Knows nothing of windows.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.capture.signal_wire import Chunk
from edge.errors import CaptureError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable

_NS = 1_000_000_000
# Read ahead in blocks, given out in chunks as short as a sensor's.
_BLOCK_S, _CHUNK_S = 20.0, 0.02
_LONGEST_WAIT_S = 0.1
_CHANNELS_BY_SAMPLES = 2


class FileTransport:
    """The samples of one record, in physical units.

    Args:
        path: of a WFDB record, without suffix (``.hea`` is taken off), read in blocks; or of an npz with ``signal``
            float32 [channels, samples], ``rate_hz`` and ``channels`` (names), read whole.
        speed: samples come at so many times the record's rate; as fast as they are read where None.
        loop: begin again at its end; numbers go on, no window spans end and begin.
        clock: monotonic nanoseconds.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        path: str,
        *,
        speed: float | None = 1.0,
        loop: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path, self._speed, self._loop = path.removesuffix(".hea"), speed, loop
        self._clock, self._sleep = clock, sleep
        self.paced = speed == 1.0
        self.broken = 0
        self._rate, self._length, self._names = 0.0, 0, ()  # type: tuple[float, int, tuple[str, ...]]
        self._is_npz = path.endswith(".npz")
        self._whole: Any = np.empty((0, 0), np.float32)
        self._block: Any = np.empty((0, 0), np.float32)
        self._block_at = 0
        self._at = self._given = 0
        self._began: int | None = None

    def open(self) -> None:
        """Read the header.

        Raises:
            CaptureError: no such record, or its header cannot be read.
            MissingExtraError: wfdb is not installed.
        """
        self._rate, self._length, self._names = self._open_npz() if self._is_npz else self._open_wfdb()
        self._at, self._block, self._block_at, self._began = 0, self._block[:0], 0, None

    def read(self) -> list[Chunk] | None:
        """Return the samples that are due; None at the end.

        Raises:
            CaptureError: the record's signals cannot be read.
        """
        if self._at >= self._length:
            if not self._loop:
                return None
            self._at = 0
        due = self._due()
        if due <= 0:
            return []
        count = min(due, self._length - self._at)
        samples = self._samples(self._at, count)
        chunk = Chunk(self._given, samples, self._rate, self._names, begins=self._at == 0)
        self._at, self._given = self._at + len(samples), self._given + len(samples)
        return [chunk]

    def close(self) -> None:
        """Let go of what was read ahead."""
        self._block, self._whole = self._block[:0], self._whole[:0]

    def _due(self) -> int:
        """Samples to give now; waits a little where none is due."""
        step = max(1, round(_CHUNK_S * self._rate * (self._speed or 1.0)))
        if self._speed is None:
            return max(step, round(self._rate))
        now = self._clock()
        if self._began is None:
            self._began = now - round(self._given * _NS / (self._rate * self._speed))
        wanted = (self._given + step) * _NS / (self._rate * self._speed)
        wait = (self._began + wanted - now) / _NS
        if wait > 0:
            self._sleep(min(wait, _LONGEST_WAIT_S))
            if wait > _LONGEST_WAIT_S:
                return 0
            now = self._clock()
        # A consumer that was slow is given what it missed, a second at most at a time.
        due = int((now - self._began) * self._rate * self._speed / _NS) - self._given
        return min(max(due, 0), max(step, round(self._rate)))

    def _open_wfdb(self) -> tuple[float, int, tuple[str, ...]]:
        try:
            header = _wfdb().rdheader(self._path)
        except MissingExtraError:
            raise
        except Exception as error:
            raise CaptureError(f"{self._path}.hea: cannot be read ({error}); name a WFDB record") from error
        if not (header.sig_len and header.sig_name and 0 < (header.fs or 0) < np.inf):
            raise CaptureError(f"{self._path}.hea: says no length, rate or channels; name a WFDB record with signals")
        return float(header.fs), int(header.sig_len), tuple(str(name) for name in header.sig_name)

    def _open_npz(self) -> tuple[float, int, tuple[str, ...]]:
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                signal, rate = archive["signal"], float(archive["rate_hz"])
                names = tuple(str(name) for name in archive["channels"])
            whole = np.asarray(signal, np.float32)
        # A damaged archive fails wherever zipfile, numpy or a tokenizer stumbles over it.
        except Exception as error:
            raise CaptureError(f"{self._path}: no npz with signal, rate_hz and channels ({error})") from error
        if signal.ndim != _CHANNELS_BY_SAMPLES or not signal.size or len(names) != len(signal) or not 0 < rate < np.inf:
            raise CaptureError(f"{self._path}: signal is {list(signal.shape)} of {len(names)} channels at {rate:g} Hz")
        self._whole = np.ascontiguousarray(whole.T)
        return rate, len(self._whole), names

    def _samples(self, begin: int, count: int) -> Any:  # noqa: ANN401 (float32 [T, K]; numpy arrays of wfdb are untyped)
        if not self._block_at <= begin < self._block_at + len(self._block):
            end = min(self._length, begin + max(count, round(_BLOCK_S * self._rate)))
            if self._is_npz:
                return self._whole[begin : begin + count]
            try:
                record = _wfdb().rdrecord(self._path, sampfrom=begin, sampto=end)
            except Exception as error:
                raise CaptureError(
                    f"{self._path}: its signals cannot be read ({error}); copy the record again"
                ) from error
            block = np.asarray(record.p_signal, np.float32)
            if block.shape != (end - begin, len(self._names)):
                raise CaptureError(
                    f"{self._path}: holds {list(block.shape)} where its header says {[end - begin, len(self._names)]}; "
                    "copy the record again"
                )
            self._block, self._block_at = block, begin
        offset = begin - self._block_at
        return self._block[offset : offset + count]


def _wfdb() -> Any:  # noqa: ANN401 (a module without types)
    try:
        import wfdb  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingExtraError("kind signal_file needs wfdb; run: pip install 'lineward[signals]'") from error
    return wfdb
