"""The environment that keeps Flower from calling home. It must not know Flower: it is looked at before Flower runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edge.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",  # else every process reports its start and end to telemetry.flower.ai
    "FLWR_DISABLE_UPDATE_CHECK": "1",  # else the command line asks api.flower.ai for news
}
"""What every Flower process needs in its environment; ``deploy/flower/flower.env`` has the same for systemd."""


def require_quiet(environ: Mapping[str, str] | None = None) -> None:
    """Refuse to take part in a run whose processes call home.

    Apps inherit the environment of the SuperLink or SuperNode that starts them, so what is missing here was missing
    there.

    Args:
        environ: default: this process's.

    Raises:
        SettingsError: a switch is not as in :data:`QUIET`, or ``FLWR_HOME`` is not set, so that Flower would write to
            the home folder of whoever runs it.
    """
    found = os.environ if environ is None else environ
    for name, value in QUIET.items():
        if found.get(name) != value:
            raise SettingsError(f"{name}: must be {value} in the environment of SuperLink and SuperNode (flower.env)")
    if not found.get("FLWR_HOME"):
        raise SettingsError("FLWR_HOME: must name a folder for Flower's own files, for SuperLink and SuperNode")
