"""What the machine itself has to offer: disk, clock, memory, ports, and files that hold secrets."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import sqlite3
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge.alerts.settings import check_readable, check_secret_file
from edge.box_contents import OUTBOX_FILE
from edge.doctor.findings import doubt, fine, wrong
from edge.federation.keys import read_key_pair, read_public_key
from edge.health.watchdog import clock_synchronised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.doctor.findings import Finding
    from edge.settings import BoxSettings

MIB = 2**20
SYNCS = 100
# An alert's way has 50 ms in all; one disk sync is a part of it.
SYNC_P99_MS = 25.0
FREE_MIB = 512
MEMORY_MIB = 400
# Nothing was exported before this program was written.
EARLIEST = datetime(2026, 1, 1, tzinfo=timezone.utc)
_VOLATILE = frozenset({"tmpfs", "ramfs", "overlay"})
_PRIVILEGED_PORTS = 1024


def box_is_running(settings: BoxSettings) -> bool:
    """Whether a box holds the outbox now: then its cameras and ports are taken, and rightly so."""
    path = settings.state_dir / OUTBOX_FILE
    if not path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0)) as db:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        return "locked" in str(error)
    return False


def look_at_disk(settings: BoxSettings) -> Iterator[Finding]:
    """Room, speed and permanence of the state folder."""
    subject, folder = str(settings.state_dir), settings.state_dir
    if not folder.exists():
        # Not made here: it would belong to whoever calls the doctor.
        folder = next(parent for parent in folder.resolve().parents if parent.exists())
        subject = f"{folder} (for {settings.state_dir.name})"
    try:
        took = _sync_times(folder)
    except OSError as error:
        cure = "give the folder to the user of the box, as StateDirectory= of the systemd unit does"
        yield wrong("disk", subject, f"cannot be written ({error.strerror})", cure)
        return
    p99 = float(np.percentile(took, 99))
    text = f"a sync of 4 KiB takes {np.median(took):.1f} ms, p99 {p99:.1f} ms"
    figures = {"sync_p50_ms": round(float(np.median(took)), 2), "sync_p99_ms": round(p99, 2)}
    if p99 > SYNC_P99_MS:
        yield doubt("disk", subject, f"{text}: every alert waits for one", "put state_dir on a faster disk", **figures)
    else:
        yield fine("disk", subject, text, **figures)
    wanted = settings.outbox_max_mb + (0 if settings.evidence is None else settings.evidence.max_mb) + FREE_MIB
    free = shutil.disk_usage(folder).free // MIB
    if free < wanted:
        yield wrong(
            "disk",
            subject,
            f"{free} MiB are free, {wanted} MiB may be needed",
            "free space, or lower outbox_max_mb and evidence.max_mb",
            free_mib=free,
            wanted_mib=wanted,
        )
    else:
        yield fine("disk", subject, f"{free} MiB are free, {wanted} MiB may be needed", free_mib=free)
    kind = _file_system(folder)
    if kind in _VOLATILE:
        yield doubt(
            "disk", subject, f"is on {kind}, which a power cut or a new container empties", "put state_dir on a disk"
        )


def look_at_clock(made: datetime | None) -> Iterator[Finding]:
    """Whether the clock can be believed.

    Args:
        made: when the bundle was exported, if there is one.
    """
    now = datetime.now(timezone.utc)
    shown = now.strftime("%Y-%m-%d %H:%M:%S UTC")
    earliest = max(EARLIEST, made) if made is not None else EARLIEST
    if now < earliest:
        yield wrong(
            "clock",
            "",
            f"it is {shown}, which is before {earliest:%Y-%m-%d}",
            "set it: timedatectl set-ntp true, and a battery for the hardware clock",
        )
        return
    synchronised = clock_synchronised()
    if synchronised is None:
        yield doubt(
            "clock", "", f"{shown}; the system does not say whether it follows a time server", "see: timedatectl"
        )
    elif not synchronised:
        yield doubt(
            "clock",
            "",
            f"{shown}, and it follows no time server: alerts may bear a wrong time",
            "run: timedatectl set-ntp true",
        )
    else:
        yield fine("clock", "", f"{shown}, follows a time server")


def look_at_memory() -> Iterator[Finding]:
    """Room for a box."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines}
    free, total = values["MemAvailable"], values["MemTotal"]
    text = f"{free} of {total} MiB are available"
    if free < MEMORY_MIB:
        yield doubt(
            "memory",
            "",
            f"{text}, a box needs about {MEMORY_MIB}",
            "end other programs, or add memory",
            available_mib=free,
        )
    else:
        yield fine("memory", "", text, available_mib=free)


def look_at_ports(settings: BoxSettings, *, running: bool) -> Iterator[Finding]:
    """Whether the addresses that the box listens on are free.

    Args:
        settings: of the box.
        running: a box holds them now, perhaps.
    """
    for name, section in (("metrics", settings.metrics), ("modbus", settings.modbus)):
        if section is None or section.port == 0:
            continue
        where = f"{section.host}:{section.port}"
        try:
            with socket.create_server((section.host, section.port)):
                pass
        except OSError as error:
            if error.errno == errno.EADDRINUSE and running:
                yield fine("port", name, f"{where} is taken, and a box is running")
            elif error.errno == errno.EACCES and section.port < _PRIVILEGED_PORTS:
                yield doubt(
                    "port",
                    name,
                    f"{where} needs a privilege that this user has not",
                    "the shipped systemd unit gives it; else choose a port from 1024 on",
                )
            else:
                yield wrong(
                    "port",
                    name,
                    f"{where} cannot be listened on ({error.strerror})",
                    "end the program that has it (ss -ltnp), or choose another port or address",
                )
        else:
            yield fine("port", name, f"{where} is free")


def look_at_keys(settings: BoxSettings) -> Iterator[Finding]:
    """Files that hold secrets: readable for this user, closed to others.

    Raises:
        SettingsError: one is not.
    """
    broker, federation = settings.broker, settings.federation
    if broker.password_file is not None:
        broker.read_password()
        yield fine("key", "broker", f"{broker.password_file} can be read by this user and not by everybody")
    if broker.key_file is not None:
        check_readable("key_file", broker.key_file)
        check_secret_file(broker.key_file)
        yield fine("key", "broker", f"{broker.key_file} can be read by this user and not by everybody")
    if federation is not None and federation.key_file is not None and federation.aggregator_key_file is not None:
        pair = read_key_pair(federation.key_file)
        read_public_key(federation.aggregator_key_file)
        yield fine("key", "fleet", f"this box is {pair.public}; enrol it under this key")


def _sync_times(folder: Path) -> list[float]:
    found = []
    with tempfile.TemporaryFile(dir=folder) as probe:
        for _ in range(SYNCS):
            began = time.perf_counter()
            os.pwrite(probe.fileno(), bytes(4096), 0)
            os.fdatasync(probe.fileno())
            found.append(1e3 * (time.perf_counter() - began))
    return found


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, by the longest mount point above it (proc(5))."""
    real, best, kind = folder.resolve(), -1, ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, where, found, *_ = line.split()
            point = Path(where.replace("\\040", " "))
            if (point == real or point in real.parents) and len(point.parts) > best:
                best, kind = len(point.parts), found
    return kind
