"""The heaps of glibc's malloc; another C library has none of what is asked for here, and is left as it is."""

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
        return


def return_free_memory() -> None:
    """Give the pages of this process that nobody uses back to the system, those amid used ones too.

    What comes and goes in pieces of many sizes leaves holes that the next piece does not fit into. Returned, they cost nothing until
    they are used again; then each page is made anew. Source: malloc_trim(3).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
