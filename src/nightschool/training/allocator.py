"""What becomes of the memory that a training step frees on a CPU."""

from __future__ import annotations

import ctypes

from nightschool.config.recipe import Recipe
from nightschool.models.dtype import resolve_device

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0


def keep_freed_memory(recipe: Recipe) -> bool:
    """Have the C library keep for the next step what a step frees, until the process ends. For runs on a CPU.

    A step frees hundreds of megabytes and asks for them again. By itself glibc gives each large block back to the
    kernel, which must then find and clear every page anew: 41,000 page faults a step for `neox-30m` in place of 1,600,
    an eighth to a third of its time. What the process holds at most stays the same within some per cent; it no longer falls in between.

    Returns whether it does so: a run on a GPU, or with another C library than glibc, is left as it is.

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    if resolve_device(recipe.train.device).type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(bool(mallopt(which, value)) for which, value in ((_MMAP_MAX, _NONE), (_TRIM_THRESHOLD, _NEVER)))
