"""All experts of a model that are streamed: in which order they are loaded, their gradients, and what was put off.

Shapes: L layers with experts, N experts of a layer, D width of the model, E of an expert. The two matrices of an expert are
`gate_up` [2E,D] and `down` [D,E]; a record has one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nightschool.layers.expert_streaming.content import Content
from nightschool.layers.expert_streaming.pending import PendingUpdates, Update
from nightschool.layers.expert_streaming.record import GRADIENT, LEARNING, UPDATED, WEIGHTS, Record
from nightschool.layers.expert_streaming.store import ExpertStore, Visit

_TRIED_RECORDS = 8


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a model. `layers` has the name of the module of each layer's experts."""

    layers: tuple[str, ...]
    num_experts: int
    hidden_size: int
    expert_size: int

    @property
    def num_records(self) -> int:
        return len(self.layers) * self.num_experts

    @property
    def numbers(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.expert_size

    def matrices(self, section: Tensor) -> tuple[Tensor, Tensor]:
        """A flat section as `gate_up` [2E,D] and `down` [D,E], without a copy."""
        d, e = self.hidden_size, self.expert_size
        return section[: 2 * e * d].view(2 * e, d), section[2 * e * d :].view(d, e)

    def stacked(self) -> dict[str, tuple[int, int]]:
        """The names of the stock model's tensors [N,…], with the layer and which of the two matrices it is."""
        return {
            f"{name}.{matrix}": (layer, which)
            for layer, name in enumerate(self.layers)
            for which, matrix in enumerate(("gate_up_proj", "down_proj"))
        }

    def stacked_shape(self, which: int) -> tuple[int, int, int]:
        d, e = self.hidden_size, self.expert_size
        return (self.num_experts, 2 * e, d) if which == 0 else (self.num_experts, d, e)

    def name_of(self, index: int) -> str:
        """What people call a record."""
        return f"expert {index % self.num_experts} of layer {self.layers[index // self.num_experts]}"


class ExpertStream:
    """The experts of a model in their store. What learns has all of `LEARNING` in its records, what is frozen only weights."""

    def __init__(self, shape: ExpertShape, store: ExpertStore, content: Content) -> None:
        self.shape, self.store, self.content = shape, store, content
        self.learns = GRADIENT in store.layout.sections
        self._pending = PendingUpdates(shape.num_records, shape.numbers)
        self._window = 0
        self._unscale: float | None = None
        self.norms_l2n = torch.zeros(len(shape.layers), 2, shape.num_experts)
        # What takes the place of a layer's experts for a while: gets the module and what its `forward` gets, and returns as that does.
        self.instead: Callable[..., Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertStream:
        """Itself: a copy of a model that shares its weights goes through the same experts."""
        return self

    def index(self, layer: int, expert: int) -> int:
        return layer * self.shape.num_experts + expert

    # --- the passes -------------------------------------------------------------------------------------------------

    def current(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Record]]:
        """These experts of a layer, one after the other, with weights to which all is done that was put off."""
        indices = [self.index(layer, expert) for expert in experts]
        visits = (Visit(i, LEARNING, UPDATED) if self._pending.behind(i) else Visit(i, (WEIGHTS,)) for i in indices)
        for index, record in self.store.walk(visits):
            self._pending.catch_up(index, record)
            yield index % self.shape.num_experts, record

    def backward(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Record, bool]]:
        """The same again on the way back, and whether `GRADIENT` has that of this window already, to be added to.

        Of experts that learn, it must be there when the next one is asked for. The norms of all are noted at the end.
        """
        indices = [self.index(layer, expert) for expert in experts]
        has = [self._pending.has_gradient(index, self._window) for index in indices]
        writes = (GRADIENT,) if self.learns else ()
        visits = (
            Visit(index, (WEIGHTS, GRADIENT) if added else (WEIGHTS,), writes)
            for index, added in zip(indices, has, strict=True)
        )
        norms: list[Tensor] = []
        for expert, added, (index, record) in zip(experts, has, self.store.walk(visits), strict=True):
            yield expert, record, added
            if self.learns:
                self._pending.note_gradient(index, self._window)
                gradients = record.matrices(GRADIENT)
                if self._unscale is not None:
                    gradients = self.shape.matrices(record[GRADIENT] * self._unscale)
                norms += torch._foreach_norm(gradients)
        if norms:
            self.norms_l2n[layer, :, list(experts)] = torch.stack(norms).view(-1, 2).T

    # --- the step ---------------------------------------------------------------------------------------------------

    def begin_window(self, unscale: float | None = None) -> None:
        """Gradients that were found before are none any more, unless an update used them.

        `norms_l2n` will be those of the new ones times `unscale`.
        """
        self._window += 1
        self._unscale = unscale
        self.norms_l2n.zero_()

    def put_off(self, make: Callable[[int], Update]) -> None:
        """Update all experts by the gradients of this window; `make` gets its number."""
        self._pending.add(make(self._window))
        self._window += 1

    def flush(self) -> None:
        """Do all that was put off."""
        behind = [index for index in range(self.shape.num_records) if self._pending.behind(index)]
        for index, record in self.store.walk(Visit(index, LEARNING, UPDATED) for index in behind):
            self._pending.catch_up(index, record)
        self._pending.all_seen()

    def tried_update(self, make: Callable[[int], Update]) -> tuple[float, float]:
        """Seconds that an update of all experts takes, and those of them to load and store; found on a few, which stay as they are."""
        tried = range(0, self.shape.num_records, -(-self.shape.num_records // _TRIED_RECORDS))
        pending = PendingUpdates(len(tried), self.shape.numbers)
        update, before, hot_seconds = make(0), self.store.moving_seconds, 0.0
        copies: list[Record] = []

        def timed() -> float:
            began = time.perf_counter()
            for number, record in enumerate(copies):
                pending.catch_up(number, record)
            return time.perf_counter() - began

        pending.add(update)
        for number, (_, record) in enumerate(self.store.walk(Visit(index, LEARNING, UPDATED) for index in tried)):
            pending.note_gradient(number, 0)
            copies.append(record.copy())
            hot_seconds += timed()
        moving_seconds = self.store.moving_seconds - before
        pending.add(update)
        # What is not moved before it is updated is in no cache.
        seconds = hot_seconds + moving_seconds if moving_seconds else timed()
        share = self.shape.num_records / len(tried)
        return seconds * share, moving_seconds * share

    # --- the state --------------------------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        return self._pending.num_updates

    def begin(self, num_updates: int) -> None:
        """What is in the records is the state after so many updates."""
        self._pending.begin(num_updates)
        self._window += 1

    def rows(self, section: str, layer: int, which: int) -> Iterator[Tensor]:
        """One matrix of each expert of a layer, in order, without what was put off; look at each before the next."""
        indices = range(self.index(layer, 0), self.index(layer + 1, 0))
        for _, record in self.store.walk(Visit(index, (section,)) for index in indices):
            yield self.content.cut(record[section])[which]

    def stored(self, layer: int, which: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """As what one matrix of each expert of a layer is kept, in order, see `Content.stored`; look at each before the next."""
        indices = range(self.index(layer, 0), self.index(layer + 1, 0))
        for _, record in self.store.walk(Visit(index, (WEIGHTS,)) for index in indices):
            yield self.content.stored(record[WEIGHTS], which)

    def fill(self, section: str, layer: int, which: int, rows: Iterator[Tensor]) -> None:
        """Let one matrix of each expert of a layer be what `rows` yields."""
        indices = range(self.index(layer, 0), self.index(layer + 1, 0))
        for _, record in self.store.walk(Visit(index, (section,), (section,)) for index in indices):
            self.content.put(record[section], which, next(rows))

    def fill_from(self, source: ExpertStore) -> None:
        """Let the weights of all experts be those of a store of plain numbers."""
        written = self.store.walk(Visit(index, (), (WEIGHTS,)) for index in range(self.shape.num_records))
        read = source.walk(Visit(index, (WEIGHTS,)) for index in range(self.shape.num_records))
        for (_, record), (_, given) in zip(written, read, strict=True):
            for which, matrix in enumerate(given.matrices(WEIGHTS)):
                self.content.put(record[WEIGHTS], which, matrix)

    def not_finite(self) -> str | None:
        """The first expert whose weights hold NaN or infinity; None if all are finite. Reads all of them."""
        visits = (Visit(index, (WEIGHTS,)) for index in range(self.shape.num_records))
        for index, record in self.store.walk(visits):
            if not bool(torch.isfinite(record[WEIGHTS]).all()):
                return self.shape.name_of(index)
        return None
