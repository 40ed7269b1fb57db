"""The machine as people look at it: how busy the processor is, memory, disk and GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

_NVIDIA_SMI_SECONDS = 5.0
_GPU_FIELDS = ("index", "name", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu", "power.draw")


def machine_figures(folder: Path, *, cpu_seconds: float | None) -> dict[str, Any]:
    """All figures now. `disk_free_bytes` is that of the disk on which `folder` lies, None if it cannot be asked.

    How busy a processor is can only be told over a span of time: of so many seconds, or with None since the last look.
    """
    memory = psutil.virtual_memory()
    return {
        "cpu_percent": psutil.cpu_percent(cpu_seconds),
        "num_cores": psutil.cpu_count(),
        "load": os.getloadavg()[0],
        "memory_used_bytes": memory.total - memory.available,
        "memory_total_bytes": memory.total,
        "disk_free_bytes": _disk_free(folder),
        "gpus": list_gpus(),
    }


def _disk_free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def list_gpus() -> list[dict[str, Any]]:
    """What nvidia-smi says of each GPU; none where that tool is missing or does not answer in time."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return [found for line in done.stdout.splitlines() if (found := _gpu(line)) is not None]


def _gpu(line: str) -> dict[str, Any] | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_GPU_FIELDS) or not parts[0].isdigit():
        return None
    index, name, busy, used, total, warmth, power = parts
    return {
        "index": int(index),
        "name": name,
        "busy_percent": _float(busy),
        "memory_used_bytes": _mebibytes(used),
        "memory_total_bytes": _mebibytes(total),
        "celsius": _float(warmth),
        "watts": _float(power),
    }


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", where a GPU does not say
        return None


def _mebibytes(text: str) -> int | None:
    value = _float(text)
    return None if value is None else int(value * 2**20)
