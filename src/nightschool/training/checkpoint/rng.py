"""The random state of a process: seeding it, taking it, and putting it back, without pickle."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nightschool.errors import StateMismatch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def require_determinism() -> None:
    """Make torch choose operations whose result does not depend on the order of threads.

    Operations that have no such form only warn: on a CPU with a fixed number of threads there are none among
    those that we use; on a GPU, exact resume is not promised.
    """
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Filling fresh tensors with NaN finds reads of unset bytes, and costs a pass over all of them.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def group_of(rank: int) -> str:
    """The name under which a checkpoint holds the random state of a process."""
    return "rng" if rank == 0 else f"rng-rank{rank}"


@dataclass(frozen=True)
class RandomState:
    """The random state of a process at a moment, as Python, NumPy and torch have it."""

    python: Any
    numpy: Any
    tensors: dict[str, Tensor]


def take() -> RandomState:
    """The random state as it is now, in some 20 µs: for every step."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return RandomState(random.getstate(), np.random.get_state(legacy=True), tensors)


def capture(taken: RandomState | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the random state as JSON-able values and as byte tensors (`torch`, and `cuda.0` … per device); that of now, or one that was taken."""
    taken = taken or take()
    version, words, gauss = taken.python
    algorithm, keys, position, has_gauss, cached_gauss = taken.numpy
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [algorithm, [int(key) for key in keys], int(position), int(has_gauss), float(cached_gauss)],
    }
    return plain, taken.tensors


def restore(plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put back what `capture` returned.

    Raises:
        StateMismatch: If the state is incomplete, or is of another number of GPUs.
    """
    cuda = sorted(name for name in tensors if name.startswith("cuda."))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not {"python", "numpy"} <= plain.keys() or "torch" not in tensors:
        raise StateMismatch(
            "The random state of the checkpoint lacks python, numpy or torch. Resume from another checkpoint."
        )
    if cuda and devices and len(cuda) != devices:
        raise StateMismatch(
            f"The checkpoint holds the random state of {len(cuda)} GPUs, and this machine shows {devices}. "
            "Resume with as many visible GPUs (CUDA_VISIBLE_DEVICES)."
        )
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, keys, position, has_gauss, cached_gauss = plain["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(tensors["torch"])
    if cuda and devices:
        torch.cuda.set_rng_state_all([tensors[f"cuda.{index}"] for index in range(devices)])
