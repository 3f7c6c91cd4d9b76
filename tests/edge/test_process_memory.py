"""The allocator keeps little of what threads freed; in processes of their own, since it cannot be set back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="arenas are glibc's; this C library is another"
)

# Threads that are all in the allocator at once each get an arena of their own, which keeps small blocks that it freed.
_THREADS = """
import ctypes, re, sys, threading
from edge.process_memory import use_few_arenas
if sys.argv[1] == "few":
    assert use_few_arenas()
gate = threading.Barrier(8)
def work():
    gate.wait()
    kept = [bytearray(5000) for _ in range(200)]
    gate.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
assert libc.malloc_info(0, file) == 0
libc.fclose(file)
print(len(set(re.findall(r'<heap nr="(\\d+)">', open(sys.argv[2]).read()))))
"""
_TRIM = """
from edge.process_memory import give_back_freed
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
kept = [bytearray(50_000) for _ in range(1000)]
last = bytearray(50_000)  # above them on the heap: what lies below is kept until it is trimmed
del kept
before = rss()
assert give_back_freed()
print(before - rss())
"""


def _run(code: str, *words: str) -> int:
    process = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return int(process.stdout)


def test_threads_share_two_arenas(tmp_path: object) -> None:
    assert _run(_THREADS, "few", f"{tmp_path}/few.xml") <= 2
    assert _run(_THREADS, "many", f"{tmp_path}/many.xml") > 2


def test_freed_memory_goes_back() -> None:
    assert _run(_TRIM) > 30_000_000
