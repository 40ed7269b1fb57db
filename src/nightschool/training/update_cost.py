"""What an update of the weights will take, found without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from nightschool.training.optimizer import AdamW

# More than a cache holds, so that it is memory that decides, as in an update.
_TRIED_NUMBERS = 4 << 20
_ROWS = 1024
_ATTEMPTS = 3


@dataclass(frozen=True)
class UpdateCost:
    """Seconds of an update, `moving_seconds` of them to read and write experts; and bytes that the first one makes and keeps."""

    seconds: float = 0.0
    moving_seconds: float = 0.0
    new_bytes: int = 0

    def __add__(self, other: UpdateCost) -> UpdateCost:
        return UpdateCost(
            self.seconds + other.seconds, self.moving_seconds + other.moving_seconds, self.new_bytes + other.new_bytes
        )


def cost_of_update(new: Callable[[dict[str, nn.Parameter]], AdamW], numbers: int, device: torch.device) -> UpdateCost:
    """What `numbers` parameters in memory take: those of one that is made for it, and of its `new` optimizer, in proportion."""
    if not numbers:
        return UpdateCost()
    tried = max(_ROWS, min(numbers, _TRIED_NUMBERS))
    parameter = nn.Parameter(torch.zeros(_ROWS, tried // _ROWS, device=device))
    optimizer = new({"tried": parameter})
    best = float("inf")
    for attempt in range(_ATTEMPTS + 1):
        parameter.grad = torch.zeros_like(parameter)
        started = time.perf_counter()
        optimizer.step(optimizer.gradients_ready(), 0.0, 1.0, None).item()
        if attempt:  # the first one makes the moments
            best = min(best, time.perf_counter() - started)
    return UpdateCost(best * numbers / parameter.numel(), 0.0, optimizer.moment_bytes * numbers)
