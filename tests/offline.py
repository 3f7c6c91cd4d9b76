"""Runs pytest where there is no network but loopback: ``python tests/offline.py [options of pytest]`` (Linux)."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import struct
import sys

INSIDE = "LINEWARD_TESTS_OFFLINE"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # netdevice(7)


def raise_loopback() -> None:
    """Switch on the one interface that a new network namespace has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack_from("16sh", request)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def check_alone() -> None:
    """End where there is a way out: the run would prove nothing."""
    names = {name for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        code = probe.connect_ex(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737); nothing is sent
    if names != {"lo"} or code != errno.ENETUNREACH:
        sys.exit(f"this is no network namespace with loopback only: {sorted(names)}, {errno.errorcode.get(code, code)}")


def main(arguments: list[str]) -> None:
    """Enter the namespace, or run pytest in it."""
    if os.environ.get(INSIDE) != "1":
        program = shutil.which("unshare")
        if program is None:
            sys.exit("no unshare on the path: apt-get install util-linux")
        command = [program, "--map-root-user", "--net", sys.executable, __file__, *arguments]
        os.execve(program, command, os.environ | {INSIDE: "1"})
    raise_loopback()
    check_alone()
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
