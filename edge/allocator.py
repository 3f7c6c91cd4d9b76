"""How the C library hands out memory in a process of many threads that runs for months. Knows nothing of who asks."""

from __future__ import annotations

import ctypes

# mallopt(3), malloc.h: the parameter for the most arenas. By default glibc makes up to eight per core.
_M_ARENA_MAX = -8
ARENAS = 2


def share_arenas(count: int = ARENAS) -> bool:
    """Let all threads share a few arenas of malloc from now on; to be called before there are threads.

    Memory that one thread has freed is then used again by any other. With an arena for nearly every thread a box kept
    10 MB more, and went on growing while cameras came and went: each arena kept what its thread had once needed. Where
    threads mostly wait or compute outside malloc, as they do here, sharing costs no measurable time.

    Args:
        count: of arenas.

    Returns:
        Whether the C library has taken it; only glibc knows the parameter.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, count))
    except (OSError, AttributeError):
        return False
