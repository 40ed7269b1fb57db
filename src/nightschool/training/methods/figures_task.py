"""Tasks that say more of each step than its loss: sums of figures, noted micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nightschool.data.batches import Batch
from nightschool.training.methods.finetune import FinetuneTask


class FiguresTask(FinetuneTask):
    """Examples whose micro-batches give figures. `_forward` calls `_note` with their sums over what the loss is a mean of."""

    names: ClassVar[tuple[str, ...]]
    """Of the figures, in the order of their sums."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._seen: list[Tensor] = []

    def _note(self, sums_f: Tensor) -> None:
        """Keep the sums of one micro-batch, one for each name."""
        self._seen.append(sums_f)

    def accumulate(self, window: Sequence[Batch], units: int, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        self._seen.clear()
        loss = super().accumulate(window, units, scaler)
        sums = torch.stack(self._seen).sum(dim=0) if self._seen else loss.new_zeros(len(self.names))
        self._figures = dict(zip(self.names, (sums / units).unbind(), strict=True))
        return loss

    def heldout_loss(self, batches: Any) -> tuple[float, int]:
        """Loss in nats per unit, and the units; their figures are then in `heldout_figures`."""
        self._seen.clear()
        loss, units = super().heldout_loss(batches)
        mine = torch.stack(self._seen).double().sum(dim=0).tolist() if self._seen else [0.0] * len(self.names)
        sums = self.world.float_sums(*mine)
        self.heldout_figures = {f"heldout_{name}": total / units for name, total in zip(self.names, sums, strict=True)}
        return loss, units
