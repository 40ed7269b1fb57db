"""What a section of a record holds of an expert: the numbers of its two matrices, or codes that stand for them.

Shapes: D width of the model, E of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nightschool.layers.packed_weights import Packing

# Parts of a packed matrix begin at multiples of so many bytes.
_ALIGNED_BYTES = 64


class Content(Protocol):
    """How the two matrices of an expert, `gate_up` [2E, D] and `down` [D, E], lie in a flat section.

    `dtype` is that of products; a section has `numbers` elements of `stored_dtype`.
    """

    dtype: torch.dtype

    @property
    def stored_dtype(self) -> torch.dtype: ...

    @property
    def numbers(self) -> int: ...

    def cut(self, section: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices, of plain numbers without a copy."""
        ...

    def stored_shape(self, which: int) -> tuple[int, ...]:
        """Of what one of the two matrices is kept as."""
        ...

    def put(self, section: Tensor, which: int, matrix: Tensor) -> None:
        """Let one of the two matrices be this."""
        ...

    def stored(self, section: Tensor, which: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What one of the two matrices is kept as, and the scales and tables of codes."""
        ...


class PlainContent(Content):
    """The numbers themselves, one matrix after the other."""

    def __init__(self, hidden_size: int, expert_size: int, dtype: torch.dtype) -> None:
        self._hidden_size, self._expert_size, self.dtype = hidden_size, expert_size, dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def numbers(self) -> int:
        return 3 * self._hidden_size * self._expert_size

    def cut(self, section: Tensor) -> tuple[Tensor, Tensor]:
        d, e = self._hidden_size, self._expert_size
        return section[: 2 * e * d].view(2 * e, d), section[2 * e * d :].view(d, e)

    def stored_shape(self, which: int) -> tuple[int, ...]:
        d, e = self._hidden_size, self._expert_size
        return (2 * e, d) if which == 0 else (d, e)

    def put(self, section: Tensor, which: int, matrix: Tensor) -> None:
        self.cut(section)[which].copy_(matrix)

    def stored(self, section: Tensor, which: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.cut(section)[which], {}


class PackedContent(Content):
    """Codes and scales of each matrix, as `layers.packed_experts` has those of all experts."""

    def __init__(self, label: str, hidden_size: int, expert_size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._packing = Packing(label)
        d, e = hidden_size, expert_size
        self._shapes = torch.Size((2 * e, d)), torch.Size((d, e))
        self._places: list[dict[str, tuple[int, Tensor]]] = []
        self._tables: dict[str, Tensor] = {}
        self._numbers = 0
        for shape in self._shapes:
            codes, parts = self._packing.pack(torch.zeros(shape))
            places = {}
            for name, part in ({"": codes} | parts).items():
                if self._packing.is_table(name):
                    self._tables[name] = part
                    continue
                # A shell of it, which says of which shape and format it is.
                places[name] = self._numbers, part.to("meta")
                self._numbers += part.nbytes + -part.nbytes % _ALIGNED_BYTES
            self._places.append(places)

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def numbers(self) -> int:
        return self._numbers

    def cut(self, section: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, down = (self._unpack(section, which) for which in (0, 1))
        return gate_up, down

    def stored_shape(self, which: int) -> tuple[int, ...]:
        return tuple(self._places[which][""][1].shape)

    def put(self, section: Tensor, which: int, matrix: Tensor) -> None:
        codes, parts = self._packing.pack(matrix.contiguous())
        views = self._views(section, which)
        for name, view in views.items():
            view.copy_(codes if name == "" else parts[name])

    def stored(self, section: Tensor, which: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts = self._views(section, which)
        codes = parts.pop("")
        order: Sequence[str] = ("absmax", "code", "offset", "scale_of_scales", "code_of_scales")
        every = parts | self._tables
        return codes, {name: every[name] for name in order if name in every}

    def _unpack(self, section: Tensor, which: int) -> Tensor:
        parts = self._views(section, which)
        tables = self._tables_on(section.device)
        scales = self._packing.whole_scales(parts | tables, self.dtype)
        return self._packing.unpack(parts[""], scales, tables.get("code"), self._shapes[which], self.dtype)

    def _views(self, section: Tensor, which: int) -> dict[str, Tensor]:
        return {
            name: section[place : place + shell.nbytes].view(shell.dtype).view(shell.shape)
            for name, (place, shell) in self._places[which].items()
        }

    def _tables_on(self, device: torch.device) -> dict[str, Tensor]:
        if any(table.device != device for table in self._tables.values()):
            self._tables = {name: table.to(device) for name, table in self._tables.items()}
        return self._tables
