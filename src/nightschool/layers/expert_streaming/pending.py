"""AdamW of experts, put off: what an update does to all of them is written down once, and done to each when it is next loaded.

By then the norm of all gradients is known, and so is whether the step was skipped: the numbers are those of an update at
once. An expert that no token was sent to has a gradient of zeros, by which its weights still decay and its moments fade.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nightschool.layers.expert_streaming.record import FIRST_MOMENT, GRADIENT, SECOND_MOMENT, WEIGHTS, Record


@dataclass(frozen=True)
class Update:
    """One update of all experts.

    `window` numbers the gradients that it uses. `unscale` and `clip_factor` are what these are multiplied by, one after the other; None
    for not at all.
    """

    window: int
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    unscale: float | None
    clip_factor: Tensor | None


class PendingUpdates:
    """The updates of `num_records` experts that were made, and how many of them each has seen."""

    def __init__(self, num_records: int, numbers: int) -> None:
        self._num_records, self._numbers = num_records, numbers
        self.begin(0)

    def begin(self, num_updates: int) -> None:
        """All experts have seen `num_updates`, and nothing is put off."""
        self._before = num_updates
        self._updates: list[Update] = []
        self._counts: list[Tensor] = []
        self._seen = [0] * self._num_records
        self._window_of: list[int | None] = [None] * self._num_records
        self._zeros: Tensor | None = None
        self._scratch: Tensor | None = None

    @property
    def num_updates(self) -> int:
        """How many there were, of each expert, put off or not."""
        return self._before + len(self._updates)

    def add(self, update: Update) -> None:
        self._updates.append(update)
        self._counts.append(torch.tensor(float(self.num_updates)))

    def behind(self, index: int) -> bool:
        """Whether an update of this expert is still to be done."""
        return self._seen[index] < len(self._updates)

    def note_gradient(self, index: int, window: int) -> None:
        """The gradient in the record is now that of this window."""
        self._window_of[index] = window

    def has_gradient(self, index: int, window: int) -> bool:
        return self._window_of[index] == window

    def catch_up(self, index: int, record: Record) -> None:
        """Do what is still to be done to a record that is there in full."""
        for number in range(self._seen[index], len(self._updates)):
            update = self._updates[number]
            has_gradient = self._window_of[index] == update.window
            gradient = self._scaled(record[GRADIENT], update) if has_gradient else self._no_gradient()
            torch._fused_adamw_(
                [record[WEIGHTS]],
                [gradient],
                [record[FIRST_MOMENT]],
                [record[SECOND_MOMENT]],
                [],
                [self._counts[number]],
                lr=update.learning_rate,
                beta1=update.beta1,
                beta2=update.beta2,
                weight_decay=update.weight_decay,
                eps=update.epsilon,
                amsgrad=False,
                maximize=False,
            )
        self._seen[index] = len(self._updates)

    def all_seen(self) -> None:
        """Every expert has caught up, so that nothing has to be kept."""
        self.begin(self.num_updates)

    def _scaled(self, gradient: Tensor, update: Update) -> Tensor:
        """The gradient as it is used. The one in the record stays as it is: what is not changed is not written."""
        for factor in (update.unscale, update.clip_factor):
            if factor is not None:
                if self._scratch is None:
                    self._scratch = torch.empty(self._numbers)
                gradient = torch.mul(gradient, factor, out=self._scratch)
        return gradient

    def _no_gradient(self) -> Tensor:
        if self._zeros is None:
            self._zeros = torch.zeros(self._numbers)
        return self._zeros
