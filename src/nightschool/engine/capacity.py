"""Whether a version fits into memory, asked before anything is loaded."""

from __future__ import annotations

import psutil
import torch

from nightschool.models.stored import stored_weights_of
from nightschool.store.home import Home
from nightschool.store.registry import Version

# Beside its weights a version needs keys and values of a few requests, and what a forward pass holds.
_ROOM = 1.15


def needed_bytes(version: Version, home: Home, dtype: torch.dtype, experts_resident: int | None = None) -> int:
    """What serving a version takes, with so many experts in memory. An adapter is merged, so it takes what its whole base takes.

    Raises:
        NotFound, ModelError, Damaged: If its base is not there, or cannot be read.
    """
    return int(_ROOM * stored_weights_of(version, home).loaded_bytes(dtype, experts_resident))


def free_bytes(device: torch.device | str) -> int:
    """Memory that is free where versions are loaded: the GPU's own, or the machine's."""
    device = torch.device(device)
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()  # what the allocator keeps for later counts as taken
    return int(torch.cuda.mem_get_info(device)[0])
