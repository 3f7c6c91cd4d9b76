"""What glibc's allocator keeps of memory that was freed: as little as a box can do with. Elsewhere, nothing."""

from __future__ import annotations

import ctypes

# Of mallopt(3), as malloc.h has it.
_M_ARENA_MAX = -8
ARENAS = 2


def use_few_arenas() -> bool:
    """Let all threads allocate from two arenas; to be called before there are threads.

    glibc makes up to eight arenas per core, and each keeps what the frames of its threads once needed: a box of one
    camera, 14 threads and 1080p frames was 252 MB with them and 207 to 237 MB with two.

    Returns:
        Whether the C library has arenas and took it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, ARENAS) == 1


def give_back_freed() -> bool:
    """Return free pages to the system, malloc_trim(3): after a graph was compiled, some megabytes.

    Returns:
        Whether any were.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1
