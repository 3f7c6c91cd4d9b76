"""A Flower federation for tests: SuperLink and SuperNodes as processes on loopback, with TLS and registered keys."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.flower.quiet import QUIET
from tests.mosquitto_process import HOST, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-flower"
_ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
_LOOPBACK = re.compile(r"127\.|::1$|::ffff:127\.")
_DEADLINE_S = 60


def outside_connects(trace: str) -> list[str]:
    """Lines of a trace (strace -e trace=connect,sendto,sendmsg) that address another machine."""
    outside = []
    for line in trace.splitlines():
        addresses = [first or second for first, second in _ADDRESS.findall(line)]
        if any(not _LOOPBACK.match(address) for address in addresses):
            outside.append(line)
    return outside


class Federation:
    """Starts and ends the processes; each has a ``FLWR_HOME`` of its own under ``folder``.

    ``boxes``: node name by box name. Each box has its exchange folder ``folder/<node>/exchange``. With ``traced`` every
    connect of every process is written down; ``isolated`` processes have no network, not even that of this machine.
    """

    def __init__(self, folder: Path, boxes: dict[str, str], *, traced: bool = False, isolated: bool = False) -> None:
        self.folder, self.boxes, self.port = folder, boxes, free_port()
        self._keys = folder / "keys"
        self._traced, self._isolated = traced, isolated
        self._extra: dict[str, str] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._keys.mkdir()
        for node in boxes.values():
            self.exchange(node).mkdir(parents=True)
        script = ROOT / "tests" / "deploy" / "flower_keys.py"
        maker = self._spawn("keys", ["python", script, self._keys, *boxes.values()])
        assert maker.wait(timeout=_DEADLINE_S) == 0, self.log("keys")

    def exchange(self, node: str) -> Path:
        return self.folder / node / "exchange"

    def start_superlink(self, **environment: str) -> subprocess.Popen[bytes]:
        self._extra = environment
        keys = self._keys
        options = {
            "--ssl-certfile": keys / "server.pem",
            "--ssl-keyfile": keys / "server.key",
            "--ssl-ca-certfile": keys / "ca.pem",
            "--host": HOST,
            "--port": self.port,
            "--database": self.folder / "superlink" / "state.db",
        }
        flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        process = self._start("superlink", ["flower-superlink", *itertools.chain(*options.items()), *flags])
        if self._isolated:
            return process
        self._wait_for_port(process)
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{HOST}:{self.port}"\n'
            f'root-certificates = "{keys / "ca.pem"}"\n'
        )
        return process

    def register(self) -> None:
        commands = [
            self._spawn("flwr", ["flwr", "supernode", "register", "--name", box, self._keys / f"{node}.pub"])
            for box, node in self.boxes.items()
        ]
        for command in commands:
            assert command.wait(timeout=_DEADLINE_S) == 0, self.log("flwr")

    def start_node(self, node: str) -> subprocess.Popen[bytes]:
        options = {
            "--root-certificates": self._keys / "ca.pem",
            "--superlink": f"{HOST}:{self.port}",
            "--auth-supernode-private-key": self._keys / node,
            "--host": HOST,
            "--port": free_port(),
            "--node-config": f'exchange="{self.exchange(node)}"',
        }
        return self._start(node, ["flower-supernode", *itertools.chain(*options.items())])

    def submit(self, settings: Path, *, wait: bool = True) -> int | None:
        """Run until one round has ended; returns the exit code."""
        words = [
            "python",
            "-m",
            "deploy.flower.submit",
            "--settings",
            settings,
            "--answer-seconds",
            30,
            "--tell-seconds",
            60,
        ]
        run = self._start("flwr", words)
        return run.wait(timeout=_DEADLINE_S * 3) if wait else None

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while not what():
            assert time.monotonic() < deadline, self.log("superlink")
            time.sleep(0.2)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def trace(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.folder.glob("*.trace*"))

    def stop(self) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 15
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def kill_superlink(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL; what it started in sessions of their own finds out by itself, as after a crash."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # A traced program outlives its tracer by a moment, and would be taken for the one that is started next.
        self.wait_for(lambda: not self._answers())

    def _start(self, name: str, command: Sequence[object]) -> subprocess.Popen[bytes]:
        process = self._spawn(name, command)
        self._processes.append(process)
        return process

    def _spawn(self, name: str, command: Sequence[object]) -> subprocess.Popen[bytes]:
        program = str(ENVIRONMENT / "bin" / str(command[0]))
        words = [*(["unshare", "-rn"] if self._isolated else []), program, *map(str, command[1:])]
        if self._traced:
            target = self.folder / f"{name}.trace"
            strace = ["strace", "-f", "-ff", "-qq", "-s", "0", "-e", "trace=connect,sendto,sendmsg,sendmmsg"]
            words = [*strace, "-o", str(target), *words]
        environment = {
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / name),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **QUIET,
            **self._extra,
        }
        (self.folder / name).mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _wait_for_port(self, process: subprocess.Popen[bytes]) -> None:
        def answers() -> bool:
            assert process.poll() is None, self.log("superlink")
            return self._answers()

        self.wait_for(answers)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            return True
        return False


def missing() -> str:
    """What a run lacks, or nothing."""
    if not (ENVIRONMENT / "bin" / "flower-superlink").exists():
        return f"{ENVIRONMENT.name} is missing: run `make flower-env`"
    return ""


def can_trace() -> bool:
    return shutil.which("strace") is not None


def can_isolate() -> bool:
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0
    )
