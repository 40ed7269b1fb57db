"""The gradient of an embedding that is the head too, added up in the order of micro-batches that pass one after the other.

There, the gradient of each micro-batch is (head + embedding), and these sums are added one after the other. Where all of them pass the head
before any comes back to the embedding, that order is kept by this: rows that no token of the step looks up have no
part from the embedding and are added up at once; of the others, what the head gives is kept for each micro-batch.

Shapes: V vocabulary, D width, R rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class TiedRows:
    """The rows of a tied weight [V,D] that the tokens of a step look up."""

    def __init__(self, weight: nn.Parameter, input_ids: Sequence[Tensor]) -> None:
        self._weight = weight
        self._rows_r = torch.unique(torch.cat([ids.reshape(-1) for ids in input_ids]))
        self._of_head: list[Tensor] = []
        self._sum_rd = self._taken()

    def note_head(self) -> None:
        """After a micro-batch's gradient was added by way of the head."""
        taken = self._taken()
        assert taken is not None
        self._of_head.append(taken)

    def add_embedding(self, backward: Callable[[], None]) -> None:
        """Add what `backward` finds by way of the embedding of the next micro-batch, in the order of `note_head`."""
        head_sum, self._weight.grad = self._weight.grad, None
        backward()
        found, self._weight.grad = self._weight.grad, head_sum
        assert found is not None
        pair_rd = self._of_head.pop(0).add_(found.index_select(0, self._rows_r))
        self._sum_rd = pair_rd if self._sum_rd is None else self._sum_rd.add_(pair_rd)

    def finish(self) -> None:
        """Put the sums where the optimizer looks for them."""
        assert self._weight.grad is not None
        assert self._sum_rd is not None
        self._weight.grad.index_copy_(0, self._rows_r, self._sum_rd)

    def _taken(self) -> Tensor | None:
        """The rows of the gradient, which are zero from then on; None if there is none yet."""
        gradient = self._weight.grad
        if gradient is None:
            return None
        rows = gradient.index_select(0, self._rows_r)
        gradient.index_fill_(0, self._rows_r, 0.0)
        return rows
