"""Keys and values of the rows that are being answered.

Shapes: S layers of one shape, R rows, G key/value heads, P places (tokens) of a row, C channels, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows grow by whole blocks, so that a long request does not make them grow at every token.
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps per token: `num_heads` keys of `key_channels` and values of `value_channels`."""

    layer: int
    num_heads: int
    key_channels: int
    value_channels: int

    @property
    def numbers_per_token(self) -> int:
        return self.num_heads * (self.key_channels + self.value_channels)


class RowCache:
    """One pool of memory per shape, [S, R, G, P, C], so that copying a row is one operation for all layers of a shape.

    Rows are as long as the neediest request and grow with it. Memory is zeroed when it is taken, and untouched zero
    pages cost nothing; a place that was never written must not hold a NaN, because attention multiplies it by zero.

    Args:
        shapes: One per attention layer.
        num_rows: At most.
        budget_tokens: Rows times places, at most, unless one row needs more.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        num_rows: int,
        budget_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shapes = tuple(shapes)
        self._num_rows = num_rows
        self._budget_tokens = budget_tokens
        self._dtype = dtype
        self._device = device
        self.rows = 0
        self.places = 0
        self._pools: list[Tensor] = []
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Of one row, over all layers."""
        return sum(shape.numbers_per_token for shape in self._shapes) * self._dtype.itemsize

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [R,G,P,C] of one layer."""
        return self._layers[layer]

    def ensure(self, rows: int, places: int) -> None:
        """Make room for `rows` rows of `places` tokens; what the first `rows` rows hold stays."""
        if rows <= self.rows and places <= self.places:
            return
        places = -(-places // BLOCK_TOKENS) * BLOCK_TOKENS
        # Twice as long at once, while that is within the budget: growing copies everything.
        for roomy in (max(self.places, 1 << (places - 1).bit_length()), max(self.places, places)):
            if rows * roomy <= self._budget_tokens:
                places = roomy
                break
        self._replace(max(rows, min(self._num_rows, self._budget_tokens // places)), places)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a row to another one."""
        for pool in self._pools:
            pool[:, target, :, :tokens].copy_(pool[:, source, :, :tokens])

    def clear(self, row: int) -> None:
        """Zero a row, because something in it is not finite."""
        for pool in self._pools:
            pool[:, row].zero_()

    def read(self, row: int, start: int, end: int) -> list[Tensor]:
        """A copy of places `start` … `end - 1` of a row, one tensor [S, G, end - start, C] per pool."""
        return [pool[:, row, :, start:end].clone(memory_format=torch.contiguous_format) for pool in self._pools]

    def write(self, row: int, start: int, pieces: Sequence[Tensor]) -> None:
        """Put what `read` returned into a row, at `start`."""
        for pool, piece in zip(self._pools, pieces, strict=True):
            pool[:, row, :, start : start + piece.shape[2]].copy_(piece)

    def release(self) -> None:
        """Give all memory back; nothing is held any more."""
        self._pools, self._layers = [], {}
        self.rows = self.places = 0

    def _replace(self, rows: int, places: int) -> None:
        before, old_rows, old_places = self._pools, self.rows, self.places
        self._pools, self._layers = [], {}
        for (num_heads, channels), members in self._groups().items():
            pool = torch.zeros(len(members), rows, num_heads, places, channels, dtype=self._dtype, device=self._device)
            if old_rows:
                kept, held = min(rows, old_rows), min(places, old_places)
                pool[:, :kept, :, :held].copy_(before[len(self._pools)][:, :kept, :, :held])
            self._pools.append(pool)
            for place, (layer, is_value) in enumerate(members):
                keys, values = self._layers.get(layer, (pool[place], pool[place]))
                self._layers[layer] = (keys, pool[place]) if is_value else (pool[place], values)
        self.rows, self.places = rows, places

    def _groups(self) -> dict[tuple[int, int], list[tuple[int, bool]]]:
        """Keys and values that share a pool, by heads and channels, in the order of the layers."""
        groups: dict[tuple[int, int], list[tuple[int, bool]]] = {}
        for shape in self._shapes:
            groups.setdefault((shape.num_heads, shape.key_channels), []).append((shape.layer, False))
            groups.setdefault((shape.num_heads, shape.value_channels), []).append((shape.layer, True))
        return groups
