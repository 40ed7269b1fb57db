"""The machine that a run trains on: its choices, its memory, and what is written down about it."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nightschool.config.recipe import Recipe
from nightschool.models.dtype import DtypeChoice, num_threads_here, resolve_device
from nightschool.store.atomic import read_json
from nightschool.training.checkpoint import rng
from nightschool.training.distributed.world import World
from nightschool.work.heap import return_free_memory

_PACKAGES = ("nightschool", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pydantic")

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0


@dataclass(frozen=True)
class Rerun:
    """What a resumed run takes from its checkpoint instead of measuring it again."""

    compute_dtype: str
    num_threads: int
    world_size: int = 1

    @classmethod
    def of(cls, checkpoint: Path) -> Rerun:
        """What a run that resumes from this checkpoint must not measure anew. Raises Damaged if state.json is broken."""
        plain = read_json(checkpoint / "state.json")
        others = sum(1 for _ in checkpoint.glob(f"{rng.group_of(1)[:-1]}*.json"))
        return cls(str(plain["dtype"]), int(plain["num_threads"]), world_size=1 + others)


def set_up_machine(recipe: Recipe, rerun: Rerun | None, world: World) -> tuple[torch.device, int]:
    """Choose device and threads, seed all generators, and ask a CPU for the same numbers every time."""
    device, num_threads = resolve_device(recipe.train.device), _threads_of(recipe, rerun, world)
    torch.set_num_threads(num_threads)
    rng.seed_everything(recipe.train.seed)
    if device.type == "cpu":
        rng.require_determinism()
    return device, num_threads


def _threads_of(recipe: Recipe, rerun: Rerun | None, world: World) -> int:
    """CPU threads of this process: what the recipe or the checkpoint says, else its part of the cores."""
    if recipe.train.num_threads is not None:
        return recipe.train.num_threads
    if rerun is not None and rerun.world_size == world.size:
        return rerun.num_threads
    return max(1, num_threads_here() // world.local_size)


def keep_freed_memory(recipe: Recipe) -> bool:
    """Have the C library keep for the next step what a step frees, until the process ends. For runs on a CPU.

    A step frees hundreds of megabytes and asks for them again. By itself glibc gives each large block back to the
    kernel, which must then find and clear every page anew: 41,000 page faults a step for `neox-30m` in place of 1,600,
    an eighth to a third of its time. What the process holds at most stays the same within some per cent; it no longer falls in between.
    What is free already, as loading and asking left it, is given back first: it lies in pieces that no step would use again.

    Returns whether it does so: a run on a GPU, or with another C library than glibc, is left as it is.

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.
    """
    if resolve_device(recipe.train.device).type != "cpu":
        return False
    return_free_memory()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(bool(mallopt(which, value)) for which, value in ((_MMAP_MAX, _NONE), (_TRIM_THRESHOLD, _NEVER)))


def describe_environment(
    device: torch.device, dtype: DtypeChoice, *, num_threads: int, num_processes: int
) -> dict[str, Any]:
    """Versions, processor, threads, device and dtype: what else a run's outcome depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "processes": num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype.why,
        "packages": {name: _version(name) for name in _PACKAGES},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "MALLOC_")) or name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
