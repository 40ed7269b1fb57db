"""The heaps of glibc's malloc."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_ARENA_MAX = -8


def share_one_heap() -> None:
    """Have all threads of this process allocate from one heap: what one frees, any other gets.

    By itself glibc gives each thread a heap. Called when there are several already, it would only deal threads out to those,
    each of which would grow as large as the largest needs. So it is called before libraries that start threads are imported.
    """
    try:
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    except (AttributeError, OSError, TypeError):
        return  # another C library, which has no such heaps
