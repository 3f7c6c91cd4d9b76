"""A small JSON file that a box keeps: read with checks, put aside where it is damaged. Knows nothing of its content."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pathlib import Path

Kept = TypeVar("Kept", bound=BaseModel)
MAX_BYTES = 2**20


def read_kept(path: Path, model: type[Kept]) -> Kept | None:
    """Read a file; None where there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged: larger than ``MAX_BYTES``, or not what the model says.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(str(part) for part in first['loc']) or 'file'}: {first['msg']}") from error


def put_damaged_aside(path: Path, error: Exception) -> Path:
    """Rename a damaged file (ValueError), so that nothing overwrites it; return where it lies now."""
    if isinstance(error, ValueError):
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        with contextlib.suppress(OSError):
            path.rename(aside)
            return aside
    return path
