"""A real mosquitto for tests: own process, free port, own folder, to be killed and restarted at will."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

HOST = "127.0.0.1"
FIRST_PORT = 10_000
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port that nobody listens on, for a server that starts later or again.

    It lies below those that the system gives to outgoing connections (ip(7), ``ip_local_port_range``): one of these
    could take it meanwhile, or, from and to the same port, connect to itself.
    """
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(FIRST_PORT, _first_outgoing())
        with socket.socket() as probe:
            # As a server does: connections of one before it that linger are no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port


def _first_outgoing() -> int:
    try:
        first = int(OUTGOING_PORTS.read_text(encoding="ascii").split()[0])
    except OSError:
        first = 32768
    # Somebody may have given all of them to outgoing connections.
    return max(first, FIRST_PORT + 4096)


class Mosquitto:
    """``autosave_s``: persistence saved by time; ``users``: name -> password; ``acl``: lines of an ACL file."""

    def __init__(
        self,
        folder: Path,
        *,
        autosave_s: int | None = None,
        users: dict[str, str] | None = None,
        acl: str = "",
        extra: str = "",
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        # Started by root, mosquitto would give up its rights and then not read its own files here.
        lines = [f"listener {self.port} {HOST}", f"user {getpass.getuser()}", "set_tcp_nodelay true"]
        lines += ["max_queued_messages 0", f"allow_anonymous {'false' if users else 'true'}", extra]
        if autosave_s is not None:
            lines += ["persistence true", f"persistence_location {folder}/", f"autosave_interval {autosave_s}"]
        if users:
            (folder / "passwords").touch(mode=0o600)
            for name, password in users.items():
                self.set_password(name, password)
            lines.append(f"password_file {folder / 'passwords'}")
        if acl:
            (folder / "acl").write_text(acl)
            (folder / "acl").chmod(0o600)
            lines.append(f"acl_file {folder / 'acl'}")
        self.config = folder / "mosquitto.conf"
        self.config.write_text("\n".join(lines) + "\n")

    @property
    def url(self) -> str:
        return f"mqtt://{HOST}:{self.port}"

    def set_password(self, name: str, password: str) -> None:
        """Known to the broker after a reload or restart."""
        program = shutil.which("mosquitto_passwd")
        assert program is not None
        passwords = str(self.folder / "passwords")
        subprocess.run([program, "-b", passwords, name, password], check=True, capture_output=True)

    def start(self) -> None:
        program = shutil.which("mosquitto")
        assert program is not None
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.process = subprocess.Popen([program, "-c", str(self.config)], stdout=log, stderr=log)
        self._wait_for_answer()

    def kill(self) -> None:
        """SIGKILL: nothing is saved."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(5)

    def restart(self) -> None:
        self.kill()
        self.start()

    def reload(self) -> None:
        """Read the password and access files again."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGHUP)

    def save(self) -> None:
        """Write the persistence file now and wait for it."""
        assert self.process is not None
        stored = self.folder / "mosquitto.db"
        before = stored.stat().st_mtime_ns if stored.exists() else 0
        os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not stored.exists() or stored.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, "mosquitto does not save"
            time.sleep(0.02)  # a file of another process: nothing to await

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + 10
        while not self._answers():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"mosquitto does not start: {(self.folder / 'mosquitto.log').read_text()}")
            time.sleep(0.02)  # another process's port: nothing to await

    def _answers(self) -> bool:
        try:
            socket.create_connection((HOST, self.port), timeout=0.5).close()
        except OSError:
            return False
        return True
