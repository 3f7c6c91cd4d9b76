"""FollowerState: what a follower must know again after a restart, to bytes and back, checked; it must not know why.

The bytes are the SHA-256 of the rest, then a safetensors file: nothing in them can run.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge.errors import AdaptationError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.adaptation.moments import Reference

_DIGEST = 32
_ROWS = ("mean", "std", "force_mean", "force_std")
Count = Annotated[int, Field(ge=0)]


class ExpertHeader(BaseModel):
    """What is kept of one expert beside its rows.

    Attributes:
        version: of the moments in force, 0 for none.
        own: share of a frame's own moments in its correction.
        count: frames in the mean.
        settling: whether frames count though they alarm.
        touched: whether it ever followed anything.
        since: accepted frames since the snapshot in force.
        first: version from which frames count.
        former: the version in force before.
        outside: frames in a row beyond the bound.
        at_bound: whether the bound acted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Count = 0
    own: float = Field(0.0, ge=0, le=1)
    count: Count = 0
    settling: bool = False
    touched: bool = False
    since: Count = 0
    first: Count = 0
    former: Count = 0
    outside: Count = 0
    at_bound: bool = False


class Header(BaseModel):
    """What is kept of a camera.

    Attributes:
        fingerprint: of the reference that the rows belong to.
        version: of the last snapshot.
        recipe: that was asked for; empty for none.
        pinned: index of the recipe's expert; None where the router decides.
        expert: that frames begin with.
        other: another one that the last frames showed.
        seen: so many of them in a row.
        alarms: of the last judged frames.
        frozen: whether their rate was too high.
        drifting: whether the drift was told.
        counts: frames, by what became of them.
        experts: one entry each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    version: Count
    recipe: str
    pinned: int | None
    expert: Count
    other: Count
    seen: Count
    alarms: tuple[bool, ...]
    frozen: bool
    drifting: bool
    counts: dict[str, Count]
    experts: tuple[ExpertHeader, ...]


def fingerprint(reference: Reference) -> str:
    """Return a digest, 64 hex digits, of everything in a reference."""
    digest = hashlib.sha256(repr((reference.usual, reference.subclasses)).encode())
    for one in reference.moments:
        for part in (one.mean, one.std):
            for name in sorted(part):
                digest.update(name.encode() + b"\0" + np.ascontiguousarray(part[name], np.float32).tobytes())
    return digest.hexdigest()


def encode(header: Header, rows: dict[str, npt.NDArray[np.float64]]) -> bytes:
    """Return the bytes of a state.

    Args:
        header: its small values.
        rows: ``mean``, ``std``, ``force_mean``, ``force_std``, each float64 [experts, channels].
    """
    text = np.frombuffer(header.model_dump_json().encode(), np.uint8)
    body = save({"header": text, **{name: np.ascontiguousarray(rows[name], np.float64) for name in _ROWS}})
    return b"".join((hashlib.sha256(body).digest(), body))


def decode(kept: bytes, reference: Reference, channels: int) -> tuple[Header, dict[str, npt.NDArray[np.float64]]]:
    """Read the bytes of a state back.

    Args:
        kept: what :func:`encode` gave.
        reference: of the bundle that is in force now.
        channels: of all that it measures.

    Raises:
        AdaptationError: they are damaged, or belong to another bundle.
    """
    body = kept[_DIGEST:]
    if hashlib.sha256(body).digest() != kept[:_DIGEST]:
        raise AdaptationError("the kept moments are damaged: their digest does not fit; reset the camera")
    try:
        tensors = load(body)
        header = Header.model_validate_json(tensors["header"].tobytes())
        rows = {name: tensors[name] for name in _ROWS}
    except (SafetensorError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise AdaptationError(f"the kept moments are not readable ({error}); reset the camera") from error
    if header.fingerprint != fingerprint(reference):
        raise AdaptationError("the kept moments belong to another bundle; reset the camera")
    shape, experts = (len(reference.moments), channels), len(reference.moments)
    sound = all(one.dtype == np.float64 and one.shape == shape and np.isfinite(one).all() for one in rows.values())
    known = max(header.expert, header.other) < experts and (header.pinned is None or 0 <= header.pinned < experts)
    if not (sound and known and len(header.experts) == experts):
        raise AdaptationError("the kept moments do not fit the bundle; reset the camera")
    return header, rows
