"""What the adapters of one layer add to a few rows each, on any device and in any format, in calls of torch.

The rows of a step are cut into pieces of equal length, each of one adapter, the last one of an adapter filled up. Two batched
products then take all pieces through the factors of theirs: as many calls for one adapter as for hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor

# Rows of a piece; and as how many rows it counts to fetch the factors for one.
_LENGTHS = (1, 2, 4, 8, 16, 32, 64)
_PIECE_ROWS = 16


@dataclass(frozen=True)
class Pieces:
    """The pieces of a step, for every layer alike.

    `numbers` are the adapters of the step. `whose` [P] says which of them a piece belongs to, by its place in `numbers`;
    None where each has one piece, in their order. `rows_pc` [P, C] are the rows; `filled_pc` [P, C, 1] is 0 where a row
    only fills a piece up (with one of its own), or None where none does.
    """

    numbers: tuple[int, ...]
    whose: Tensor | None
    rows_pc: Tensor
    filled_pc: Tensor | None


def pieces(rows_of: Sequence[tuple[int, Sequence[int]]], like: Tensor) -> Pieces | None:
    """Cut up the rows of each adapter of a step; None without any. `like` says on which device, and in which format."""
    if not rows_of:
        return None
    rows_of = sorted(rows_of)
    counts = [len(rows) for _, rows in rows_of]
    length = min(_LENGTHS, key=lambda length: sum(-(-count // length) for count in counts) * (length + _PIECE_ROWS))
    whose, cut, filled = [], [], []
    for place, (_, rows) in enumerate(rows_of):
        for start in range(0, len(rows), length):
            few = list(rows[start : start + length])
            missing = length - len(few)
            whose.append(place)
            filled.append([1.0] * len(few) + [0.0] * missing)
            cut.append(few + few[-1:] * missing)
    device = like.device
    return Pieces(
        tuple(number for number, _ in rows_of),
        None if len(whose) == len(rows_of) else torch.tensor(whose, device=device),
        torch.tensor(cut, device=device),
        None if all(map(all, filled)) else torch.tensor(filled, device=device, dtype=like.dtype).unsqueeze(-1),
    )


class StepPieces(Protocol):
    """What of a step this way looks at."""

    @property
    def pieces(self) -> Pieces | None: ...


class TorchFactors:
    """The factors of the adapters of a layer: [in, r] and [r, out]."""

    def __init__(self) -> None:
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        # Those of the last step, side by side: the next one has mostly the same adapters.
        self._stacked: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def put(self, number: int, down: Tensor, up: Tensor) -> None:
        """Keep [in, r] and [r, out]."""
        self._factors[number] = down, up
        self._stacked = None

    def drop(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Forget an adapter, and return what was put; None if it is not there."""
        self._stacked = None
        return self._factors.pop(number, None)

    def __len__(self) -> int:
        return len(self._factors)

    def add(self, x_rc: Tensor, out_rc: Tensor, rows: StepPieces) -> None:
        """Add to `out_rc` [rows, out] what the adapters give for `x_rc` [rows, in]."""
        step = rows.pieces
        if step is None or not self._factors.keys() & set(step.numbers):
            return
        down, up = self._side_by_side(step.numbers)
        if step.whose is not None:
            down, up = down.index_select(0, step.whose), up.index_select(0, step.whose)
        index = step.rows_pc.flatten()
        between = torch.bmm(x_rc.index_select(0, index).view(*step.rows_pc.shape, -1), down)
        if step.filled_pc is not None:
            between = between * step.filled_pc
        out_rc.index_add_(0, index, torch.bmm(between, up).flatten(0, 1))

    def _side_by_side(self, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """[N, in, r] and [N, r, out]; smaller ranks are filled up with zeros, and who doesn't reach this layer is all zeros."""
        if self._stacked is None or self._stacked[0] != numbers:
            found = [self._factors.get(number) for number in numbers]
            some = [one for one in found if one is not None]
            rank = max(down.shape[1] for down, _ in some)
            nothing = some[0][0].new_zeros(some[0][0].shape[0], rank), some[0][1].new_zeros(rank, some[0][1].shape[1])
            filled = [nothing if one is None else _filled(*one, rank) for one in found]
            self._stacked = (
                numbers,
                torch.stack([down for down, _ in filled]),
                torch.stack([up for _, up in filled]),
            )
        return self._stacked[1], self._stacked[2]


def _filled(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - down.shape[1]
    return (down, up) if not missing else (F.pad(down, (0, missing)), F.pad(up, (0, 0, 0, missing)))
