"""Certificates for tests, made by the openssl command when they are needed: an authority, and what it signs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Pair:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path


def openssl(*arguments: str) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl on the path to make certificates with: apt-get install openssl")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Authority:
    """A certificate authority in a folder of its own."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.cert, self._key = folder / "ca.pem", folder / "ca.key"
        usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        openssl("req", "-x509", *_KEY, "-days", "3650", "-subj", f"/CN={name}", *usage,
                "-keyout", str(self._key), "-out", str(self.cert))  # fmt: skip

    def issue(self, name: str, *, host: str = "localhost", days: int = 30) -> Pair:
        """A certificate whose common name is ``name``, slashes and all; one of -1 days has expired."""
        stem = name.replace("/", "_")
        pair = Pair(self.folder / f"{stem}.pem", self.folder / f"{stem}.key")
        request, extra = self.folder / f"{stem}.csr", self.folder / f"{stem}.ext"
        subject = name.replace("/", "\\/")
        openssl("req", "-new", *_KEY, "-subj", f"/CN={subject}", "-keyout", str(pair.key), "-out", str(request))
        address = "IP" if host.replace(".", "").isdigit() else "DNS"
        extra.write_text(f"subjectAltName={address}:{host}\nbasicConstraints=CA:FALSE\n")
        openssl("x509", "-req", "-in", str(request), "-CA", str(self.cert), "-CAkey", str(self._key), "-CAcreateserial",
                "-days", str(days), "-extfile", str(extra), "-out", str(pair.cert))  # fmt: skip
        pair.key.chmod(0o600)
        return pair
