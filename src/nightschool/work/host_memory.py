"""How much memory this process may take: the machine's, or that of its control group, whichever is less."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

# What a machine needs besides: without it a copy that just fits would make everything else swap.
_RESERVE_SHARE = 0.05
_GROUP = Path("/sys/fs/cgroup")
# Limit, usage, statistics, and the line there of what the kernel can take back: version 2, then version 1.
_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


class HostBytes(NamedTuple):
    """Bytes that processes here may hold in all, and those that are free; something is left for everything else."""

    total: int
    free: int


def host_bytes() -> HostBytes:
    """What this machine, or its control group, has now."""
    machine = psutil.virtual_memory()
    ceiling, free = int(machine.total), int(machine.available)
    for files in _CONTROL_GROUPS:
        try:
            limit, used = (int((_GROUP / name).read_text()) for name in files[:2])
            lines = (_GROUP / files[2]).read_text().splitlines()
        except (OSError, ValueError):  # no such group, or `max`: no limit
            continue
        reclaimable = next((int(line.split()[1]) for line in lines if line.split()[0] == files[3]), 0)
        ceiling, free = min(ceiling, limit), min(free, limit - used + reclaimable)
    reserve = int(_RESERVE_SHARE * ceiling)
    return HostBytes(ceiling - reserve, max(0, free - reserve))
