"""Recordings from files: npz of our own, npz of beat-annotated records, and WFDB through its kept package.

It must not know what is learned from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge.bundle import load_arrays
from edge.errors import BundleError, DataError, MissingExtraError
from trainer.signals.beats import labels_of_beats
from trainer.signals.ptbxl import is_ptbxl, records
from trainer.signals.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

TRAIN_SHARE = 0.66
"""Share of each recording, from its begin, that is learned from where a folder does not say."""
_SUFFIXES = (".npz", ".hea")


def read_recordings(path: Path) -> list[Recording]:
    """Read a recording, or every recording of a folder in the order of names.

    An npz holds ``signal`` float32 [K, n], ``rate_hz``, ``channels`` unicode [K], ``unit`` and, where it is known,
    ``anomalous`` bool [n]; or ``adc``, ``gain``, ``baseline``, ``fs``, ``leads``, ``ann_sample`` and ``ann_symbol`` of
    a record with beats. A WFDB record is named by its header, NAME.hea; where NAME.atr lies beside it, its beats are
    labels. A record that is there as npz and as WFDB is read once.

    Raises:
        DataError: nothing is there, or a file cannot be used.
        MissingExtraError: a WFDB record without the package that reads it.
    """
    if path.is_file():
        return [_read(path)]
    files = sorted(file for file in path.glob("*") if file.suffix in _SUFFIXES) if path.is_dir() else []
    known = {file.stem for file in files if file.suffix == ".npz"}
    files = [file for file in files if file.suffix == ".npz" or file.stem not in known]
    if not files:
        raise DataError(f"{path}: no recording (.npz or .hea); give a folder of recordings, or one of them")
    return [_read(file) for file in files]


def training_part(path: Path) -> list[Recording]:
    """Return what may be learned from: ``path/train``, or the first 66 % of each recording; PTB-XL by its protocol.

    Raises:
        DataError: as :func:`read_recordings`.
    """
    if is_ptbxl(path):
        return [one for _, one in records(path, lambda entry: entry.learned, _read)]
    if (path / "train").is_dir():
        return read_recordings(path / "train")
    return [one.part(0, TRAIN_SHARE) for one in read_recordings(path)]


def test_part(path: Path) -> list[Recording]:
    """Return what is judged: ``path/test``, or what :func:`training_part` leaves of each recording; PTB-XL's fold 10.

    Raises:
        DataError: as :func:`read_recordings`, or nobody has labelled a recording.
    """
    if is_ptbxl(path):
        return [one for _, one in records(path, lambda entry: entry.judged, _read)]
    whole = (path / "train").is_dir() or (path / "test").is_dir()
    found = read_recordings(path / "test") if whole else [one.part(TRAIN_SHARE, 1) for one in read_recordings(path)]
    for one in found:
        if one.anomalous is None:
            raise DataError(f"{one.name}: has no labels; add `anomalous` to the npz, or an annotation file")
    return found


def write_recording(path: Path, recording: Recording) -> None:
    """Write a recording as npz.

    Raises:
        DataError: the file cannot be written.
    """
    labels = {} if recording.anomalous is None else {"anomalous": recording.anomalous}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            allow_pickle=False,
            signal=recording.samples,
            rate_hz=np.float64(recording.rate_hz),
            channels=np.array(recording.channels),
            unit=np.array(recording.unit),
            least=np.int64(recording.least),
            **labels,
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder") from error


def _read(path: Path) -> Recording:
    try:
        if path.suffix == ".hea":
            return _read_wfdb(path)
        arrays = load_arrays(path)
        return _from_counts(path.stem, arrays) if "adc" in arrays else _from_arrays(path.stem, arrays)
    # wfdb indexes and unpacks what a damaged header lacks.
    except (BundleError, LookupError, TypeError, AttributeError, ValueError, OSError) as error:
        why = f"it lacks {error.args[0]}" if isinstance(error, KeyError) and error.args else str(error)
        raise DataError(f"{path}: is no recording ({why}); see docs/signals.md for what it must hold") from error


def _from_arrays(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> Recording:
    return Recording(
        name,
        arrays["signal"].astype(np.float32),
        float(arrays["rate_hz"]),
        tuple(arrays["channels"].tolist()),
        str(arrays["unit"]),
        arrays.get("anomalous"),
        least=int(arrays["least"]) if "least" in arrays else 1,
    )


def _from_counts(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> Recording:
    counts, rate = arrays["adc"], float(arrays["fs"])
    values = (counts - arrays["baseline"][:, None]) / arrays["gain"][:, None]
    labels = labels_of_beats(arrays["ann_sample"], arrays["ann_symbol"], rate, counts.shape[1])
    return Recording(name, values.astype(np.float32), rate, tuple(arrays["leads"].tolist()), "mV", **labels)


def _read_wfdb(path: Path) -> Recording:
    try:
        import wfdb  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: WFDB records are read by wfdb; run: pip install 'lineward[signals]'"
        ) from error
    stem = str(path.with_suffix(""))
    record = wfdb.rdrecord(stem)
    units = sorted(set(record.units))
    if len(units) > 1:
        raise DataError(f"{path}: channels are in {', '.join(units)}; choose those of one unit")
    labels: dict[str, Any] = {}
    if path.with_suffix(".atr").exists():
        found = wfdb.rdann(stem, "atr")
        labels = labels_of_beats(found.sample, np.array(found.symbol), float(record.fs), record.sig_len)
    values = np.asarray(record.p_signal.T, np.float32)
    return Recording(path.stem, values, float(record.fs), _unique(record.sig_name), units[0], **labels)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Number the channels that share a name."""

    def numbered() -> Iterator[str]:
        for index, name in enumerate(names):
            yield name if names.count(name) == 1 else f"{name} {index + 1}"

    return tuple(numbered())
