"""The published protocol on PTB-XL: which records are learned from and which are judged, and how they are prepared.

For whoever has the set (Wagner et al., Scientific Data 7, 154, 2020; PhysioNet, CC BY 4.0). It must not know methods.
"""

from __future__ import annotations

import ast
import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError, MissingExtraError
from trainer.signals.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

TEST_FOLD = 10
NORMAL = "NORM"
RATE_HZ = 500.0
CROP = (100, 4900)
"""Samples that are kept: 4800, without the edges that filters disturb."""
WINDOW_S = (CROP[1] - CROP[0]) / RATE_HZ
"""A whole record, which is what the protocol judges at once."""
_HIGH_PASS_HZ, _NOTCH_HZ, _LOW_PASS_HZ = 1.0, 35.0, 25.0
_ORDER, _NOTCH_QUALITY = 2, 30.0
_DATABASE, _STATEMENTS = "ptbxl_database.csv", "scp_statements.csv"


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the set.

    Attributes:
        file: of the 500 Hz record, without ending, from the set's folder.
        fold: 1 to 10; patients are in one fold each.
        superclass: of the first statement that has one; empty where none has.
    """

    file: str
    fold: int
    superclass: str

    @property
    def learned(self) -> bool:
        """Whether it is learned from: normal, and not of the test fold."""
        return self.fold != TEST_FOLD and self.superclass == NORMAL

    @property
    def judged(self) -> bool:
        """Whether it is judged: of the test fold, and somebody has said what it is."""
        return self.fold == TEST_FOLD and bool(self.superclass)


def is_ptbxl(folder: Path) -> bool:
    """Whether a folder is that of the set."""
    return (folder / _DATABASE).is_file()


def read_entries(folder: Path) -> list[Entry]:
    """Read the set's two tables.

    Raises:
        DataError: one is missing or damaged.
    """
    try:
        with (folder / _STATEMENTS).open(newline="", encoding="utf-8") as file:
            classes = {row[""]: row["diagnostic_class"] for row in csv.DictReader(file)}
        with (folder / _DATABASE).open(newline="", encoding="utf-8") as file:
            return [
                Entry(row["filename_hr"], int(row["strat_fold"]), superclass(row["scp_codes"], classes))
                for row in csv.DictReader(file)
            ]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); give the folder of PTB-XL") from error
    except (KeyError, ValueError, TypeError, SyntaxError, csv.Error) as error:
        why = f"they lack the column {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{folder}: its tables are not those of PTB-XL ({why}); fetch the set again") from error


def superclass(codes: str, classes: Mapping[str, str]) -> str:
    """Return the superclass of the first statement that has one, in the order in which the set lists them.

    Args:
        codes: a dictionary from statement to likelihood, as text.
        classes: superclass of each statement; empty for those that are no diagnosis.
    """
    stated = ast.literal_eval(codes)
    return next((classes[one] for one in stated if classes.get(one)), "")


def prepare(samples: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Filter one record and bring each lead to -1 to 1, training and test records alike.

    High-pass 1 Hz, notch 35 Hz, low-pass 25 Hz, each forwards and backwards, then samples 100 to 4899, as the
    published benchmark does; it leaves out the last step for the test set of detection, which is taken for a mistake.

    Args:
        samples: float [K, 5000] at 500 Hz.

    Returns:
        float32 [K, 4800]; a lead that never changes is zero.

    Raises:
        DataError: the record is too short.
        MissingExtraError: scipy is missing.
    """
    try:
        from scipy import signal  # noqa: PLC0415 (filters alone need it)
    except ImportError as error:
        raise MissingExtraError("PTB-XL is filtered by scipy; run: pip install 'lineward[trainer]'") from error
    if samples.shape[-1] < CROP[1]:
        raise DataError(f"a record of {samples.shape[-1]} samples is shorter than 10 s at 500 Hz; take filename_hr")
    high = signal.butter(_ORDER, _HIGH_PASS_HZ, "highpass", fs=RATE_HZ)
    notch = signal.iirnotch(_NOTCH_HZ, _NOTCH_QUALITY, fs=RATE_HZ)
    low = signal.butter(_ORDER, _LOW_PASS_HZ, "lowpass", fs=RATE_HZ)
    filtered = np.asarray(samples, np.float64)
    for b, a in (high, notch, low):
        filtered = signal.filtfilt(b, a, filtered, axis=-1)
    kept = filtered[:, CROP[0] : CROP[1]]
    least, most = kept.min(1, keepdims=True), kept.max(1, keepdims=True)
    span = most - least
    return np.where(span > 0, 2 * (kept - least) / np.where(span > 0, span, 1) - 1, 0).astype(np.float32)


def records(
    folder: Path, wanted: Callable[[Entry], bool], read: Callable[[Path], Recording]
) -> Iterator[tuple[Entry, Recording]]:
    """Yield prepared records in the order of folds, each one window; labels are of the whole record.

    So of the records to learn from, the last ones, which validate, are of other patients but in one fold.

    Args:
        folder: of the set.
        wanted: such as ``lambda entry: entry.learned``.
        read: from a header's path to a recording, such as :func:`trainer.signals.reading.read_recordings`' first.

    Raises:
        DataError: a table or a record cannot be used, or none is wanted.
    """
    entries = sorted(filter(wanted, read_entries(folder)), key=lambda entry: entry.fold)
    if not entries:
        raise DataError(
            f"{folder}: no record of the folds and superclasses that the protocol takes; fetch the set again"
        )
    for entry in entries:
        path = folder / f"{entry.file}.hea"
        if not path.is_file():
            raise DataError(f"{path}: missing; the protocol takes the records of 500 Hz, fetch records500/")
        raw = read(path)
        if raw.rate_hz != RATE_HZ:
            raise DataError(
                f"{path}: {raw.rate_hz:g} Hz; the protocol takes records of {RATE_HZ:g} Hz, fetch records500/"
            )
        if not np.isfinite(raw.samples).all():
            raise DataError(f"{path}: lacks samples, which filters would spread over the record; fetch it again")
        values = prepare(raw.samples)
        labels = np.full(values.shape[1], entry.superclass != NORMAL)
        yield entry, Recording(raw.name, values, RATE_HZ, raw.channels, "of range", labels, placed=False)
