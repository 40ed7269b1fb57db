"""What an update of the weights will take, found without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

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


def cost_of_update(
    updates: Callable[[nn.Parameter], Callable[[], object]], numbers: int, moment_bytes: int, device: torch.device
) -> UpdateCost:
    """What `numbers` parameters in memory take: as one that is made for it, in proportion.

    `updates` gets it, and returns what updates it by its gradient and waits for that; `moment_bytes` are kept of each number.
    """
    if not numbers:
        return UpdateCost()
    tried = max(_ROWS, min(numbers, _TRIED_NUMBERS))
    parameter = nn.Parameter(torch.zeros(_ROWS, tried // _ROWS, device=device))
    update = updates(parameter)
    best = float("inf")
    for attempt in range(_ATTEMPTS + 1):
        parameter.grad = torch.zeros_like(parameter)
        started = time.perf_counter()
        update()
        if attempt:  # the first one makes the moments
            best = min(best, time.perf_counter() - started)
    return UpdateCost(best * numbers / parameter.numel(), 0.0, moment_bytes * numbers)
