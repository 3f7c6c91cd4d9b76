"""A whole box as an operator runs it, that alerts with every frame: its settings, its process, its namespace.

Good and defective frames take turns, and every one begins or ends an event.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import yaml

from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from tests.faults.recorded_box import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edge.bundle import Bundle

ROOT = Path(__file__).parents[2]
SITE, BOX = "plant", "box1"
RECORDED = [sys.executable, "-m", "tests.faults.recorded_box", "run", "--config"]


def make_line(folder: Path, *, size: int = 96) -> tuple[Bundle, Path]:
    """A bundle, and a folder of twelve frames of which every other is defective."""
    images = folder / "images"
    images.mkdir()
    for index in range(12):
        make = defective_frame if index % 2 else good_frame
        cv2.imwrite(str(images / f"{index:02d}.png"), make(3000 + index, height=size, width=size))
    return make_tiny_bundle(folder / "bundle"), images


def write_settings(
    folder: Path, bundle: Bundle, images: Path, url: str, *, fps: float | None, cameras: int = 1,
    state_dir: Path | None = None, **box: Any,
) -> Path:  # fmt: skip
    """Settings of a box whose cameras alert with every frame; ``fps`` None: as fast as it judges."""
    pace = {} if fps is None else {"fps": fps}
    settings = {
        "site": SITE, "box": BOX, "state_dir": str(state_dir or folder / "state"), "bundle": str(bundle.path),
        "engine": "onnxruntime", "threads": 1, "status_every_s": 0.5,
        "broker": {"url": url, "backoff_min_s": 0.05, "backoff_max_s": 0.5, "keepalive_s": 5},
        "cameras": [
            {
                "name": f"cam{number}",
                "source": {"kind": "folder", "path": str(images), "loop": True, **pace},
                "events": {"enter_hits": 1, "enter_window": 1, "leave_calm": 1},
            }
            for number in range(cameras)
        ],
        **box,
    }  # fmt: skip
    path = folder / "box.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@contextmanager
def running_box(
    config: Path, history: Path, *, before: Sequence[str] = (), environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a box that notes what it accepts; its log goes to ``box.log`` beside the settings.

    ``before``: a command that runs it, ``environment``: more of it.

    Killed at the end where it has not ended.
    """
    variables = os.environ | {VARIABLE: str(history)} | (environment or {})
    with (config.parent / "box.log").open("ab") as log:
        process = subprocess.Popen([*before, *RECORDED, str(config)], cwd=ROOT, env=variables, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def log_of(config: Path) -> str:
    """The end of a box's log, for a failure's message."""
    return (config.parent / "box.log").read_text(encoding="utf-8", errors="replace")[-3000:]


class SmallDisk:
    """A file system of its own for one process, to be filled: ``before`` runs a command that sees it at ``path``.

    A tmpfs in a user and mount namespace: it needs no rights, but a kernel that gives such namespaces to users.
    """

    def __init__(self, path: Path, *, size_mb: int) -> None:
        path.mkdir(parents=True)
        self._path = path
        script = f'mount -t tmpfs -o size={size_mb}m,mode=700 none "{path}" && exec "$@"'
        self.before = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]

    @staticmethod
    def missing() -> str:
        """Why there can be none here; empty where there can."""
        if shutil.which("unshare") is None:
            return "no unshare: apt-get install util-linux"
        probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /tmp"]
        found = subprocess.run(probe, capture_output=True, text=True, check=False)
        return f"no user namespaces here: {found.stderr.strip()}" if found.returncode else ""

    def inside(self, pid: int) -> Path:
        """Where the file system lies, as seen from outside by way of a process that has it."""
        return Path(f"/proc/{pid}/root{self._path}")

    def fill(self, pid: int) -> int:
        """Leave not a byte; returns how many were taken."""
        taken = 0
        with (self.inside(pid) / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                taken += file.write(bytes(1 << 16))  # the last piece is written in part
        return taken

    def free(self, pid: int) -> None:
        """Give it all back."""
        (self.inside(pid) / "filler").unlink(missing_ok=True)
