"""Threads share arenas once they were told to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Threads that hold memory of their own at the same time, then what glibc says of its arenas (malloc_info(3)).
SCRIPT = """
import ctypes, sys, threading
from edge.allocator import share_arenas
if sys.argv[1] == "shared":
    assert share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
gate = threading.Barrier(9)
def work():
    for _ in range(100):
        libc.malloc(ctypes.c_size_t(20_000))
    gate.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
gate.wait()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
@pytest.mark.parametrize(("mode", "few"), [("own", False), ("shared", True)])
def test_threads_share_two_arenas(mode: str, *, few: bool) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=60, check=True)
    arenas = done.stdout.count("<heap nr=")

    assert arenas > 0
    assert (arenas <= 2) == few
