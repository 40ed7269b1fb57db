"""The most memory that this process held at once."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"


def peak_resident_bytes() -> int:
    """The most that was resident since the process began, or since `forget_peak`."""
    found = _stated("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """What is resident now; 0 where the system does not say."""
    return _stated("VmRSS") or 0


def _stated(name: str) -> int | None:
    """The bytes that Linux states under a name; None on another system."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def forget_peak() -> bool:
    """Count anew from what is resident now. False where the system does not let a process do so."""
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:
        return False
    return True
