"""One pass over tokens of which some read entries, and what was read at each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from nightschool.errors import ModelError
from nightschool.layers.memory_fusion import Fused, Pointed, mix, of_one_length
from nightschool.layers.memory_reading import EntryWeight, MemoryReading, Prepared, TokenSource
from nightschool.models.memory_modules import (
    MemoryModules,
)

Places = slice | Tensor
"""Which tokens of a step belong to a reading."""

# Below this share of a token an entry is not named.
_LEAST_WEIGHT = 0.01


class Trace:
    """What was read at the tokens of one reading in one step: the row `number` of the `step`, without what only pads."""

    def __init__(self, step: MemoryStep, number: int, reading: MemoryReading, num_tokens: int) -> None:
        assert reading.encoded is not None
        self.reading = reading
        self.token_ids = reading.encoded.token_ids
        self._step, self._number = step, number
        self._there = (number, slice(num_tokens), slice(len(self.token_ids)))

    @property
    def pointed(self) -> Pointed:
        """Of T tokens of the reading: log-probabilities of the sentinel [T] and of the entries' tokens [T, M]."""
        pointed = self._step.pointed
        assert pointed is not None, "the layer that points has run"
        return Pointed(pointed.sentinel[self._there[:2]], pointed.tokens[self._there])

    @property
    def fused(self) -> list[Tensor]:
        """How much of each entry token went into each fusion layer [T, M]."""
        return [fused.weights[self._there] for fused in self._step.fused]

    def source(self, place: int, token_id: int, log_prob: float) -> TokenSource:
        """Where the token after `place` came from, which was chosen with this log-probability."""
        assert self.reading.encoded is not None
        weights = self.pointed.tokens[place].exp()
        copied = torch.where(self.token_ids == token_id, weights, 0.0)
        share = min(1.0, float(copied.sum()) / max(float(torch.tensor(log_prob).exp()), 1e-9))
        layers = [layer[place] for layer in self.fused]
        # The layer that read most, whole: the most of each token over all layers would be more than all of it.
        fused = max(layers, key=lambda layer: float(layer.sum()), default=torch.zeros_like(weights))
        kind = "copied" if share >= 0.5 else "fused" if float(fused.sum()) >= 0.5 else "weights"
        heavy = copied / copied.sum().clamp_min(1e-9) * share if kind == "copied" else fused
        per_entry = heavy.new_zeros(len(self.reading)).index_add(0, self.reading.encoded.entry, heavy)
        order = per_entry.argsort(descending=True, stable=True).tolist()
        named = tuple(
            EntryWeight(self.reading.entries[n], self.reading.rows[n], float(per_entry[n]))
            for n in order
            if float(per_entry[n]) >= _LEAST_WEIGHT
        )
        return TokenSource(cast(Any, kind), named if kind != "weights" else (), share)


class MemoryStep:
    """One forward pass over a packed row of tokens, some of which read. Hand it what comes out of layers, and the logits.

    All that read are computed together: B spans of T tokens each, padded to the longest.

    Args:
        modules: What reads.
        spans: Which tokens read what. Tokens in no span, or with nothing found, stay what the base alone makes of them.
        wanted: The tokens that logits are computed for, in their order; None for all.
        prepare: Makes of the readings what is compared with, side by side; without it, the reader does so anew.

    Raises:
        ModelError: If entries of a reading were not encoded.
    """

    def __init__(
        self,
        modules: MemoryModules,
        spans: Sequence[tuple[Places, MemoryReading]],
        wanted: Sequence[int] | None = None,
        prepare: Callable[[Sequence[MemoryReading]], Prepared] | None = None,
    ) -> None:
        self._reader, self._shape = modules.reader, modules.shape
        spans = [(places, reading) for places, reading in spans if not reading.is_closed]
        if any(reading.encoded is None for _, reading in spans):
            raise ModelError("Entries are read before they were encoded. Call EntryEncoder.encode first.")
        self.pointed: Pointed | None = None
        self.fused: list[Fused] = []
        self._readings = [reading for _, reading in spans]
        if not spans:
            return
        self._entries = (prepare or self._reader.prepare_all)(self._readings)
        self._own = [
            range(places.start, places.stop) if isinstance(places, slice) else places.tolist() for places, _ in spans
        ]
        self._wanted = wanted
        self._size = (len(spans), max(map(len, self._own)))
        # As most steps of an engine are: one token of each, in their order, and all of them answer.
        self._is_plain = wanted is None and self._size[1] == 1 and [own[0] for own in self._own] == [*range(len(spans))]

    def __len__(self) -> int:
        """How many readings are read."""
        return len(self._readings)

    def trace(self, number: int) -> Trace:
        """What was read at the tokens of a reading, once it was, by its number among those that have something to read."""
        return Trace(self, number, self._readings[number], len(self._own[number]))

    @property
    def traces(self) -> list[Trace]:
        """Those of all."""
        return [self.trace(number) for number in range(len(self))]

    @cached_property
    def _places(self) -> _Places:
        return _Places(self._own, self._size[1], self._wanted, self._entries.ids.device)

    def after_layer(self, index: int, states_th: Tensor) -> Tensor:
        """What layer `index` gives to the next one [tokens, H]: call it with the output of each of `MemoryShape.layers`."""
        if not len(self):
            return states_th
        device = states_th.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return self._after_layer(index, states_th)

    def _after_layer(self, index: int, states_th: Tensor) -> Tensor:
        is_whole = self._is_plain and len(states_th) == len(self)
        states_bth = (states_th if is_whole else states_th.index_select(0, self._places.padded)).view(*self._size, -1)
        unit_bth = of_one_length(states_bth)
        if index == self._shape.encoder_layers - 1:
            self.pointed = self._reader.point(unit_bth, self._entries)
        if index not in self._shape.fusion_layers:
            return states_th
        fused = self._reader.fuse(self._shape.fusion_layers.index(index), states_bth, unit_bth, self._entries)
        self.fused.append(fused)
        changed = fused.states.flatten(0, 1)
        if is_whole:
            return changed
        return states_th.index_copy(0, self._places.tokens, self._places.unpadded(changed))

    def mix(self, logits_sv: Tensor) -> Tensor:
        """Logits [S, V] of the wanted tokens, those that read as log-probabilities with what the pointer copies."""
        if not len(self):
            return logits_sv
        pointed, entries = cast(Pointed, self.pointed), self._entries
        there = Pointed(pointed.sentinel.flatten(), pointed.tokens.flatten(0, 1))
        if self._is_plain and len(logits_sv) == len(self):
            return mix(logits_sv, there, entries.ids, entries.place, entries.absent).to(logits_sv.dtype)
        if not self._places.num_rows:
            return logits_sv
        rows, found = self._places.rows, self._places.found
        there, whose = Pointed(*(one[found] for one in there)), found // self._size[1]
        absent = None if entries.absent is None else entries.absent[whose]
        mixed = mix(logits_sv[rows], there, entries.ids[whose], entries.place[whose], absent)
        return logits_sv.index_copy(0, rows, mixed.to(logits_sv.dtype))


class _Places:
    """Where each token of the spans lies among the padded ones, and which of the logits are its own: most steps of an engine use none of it.

    Lists become tensors when they are first used.
    """

    def __init__(
        self, own: Sequence[Sequence[int]], longest: int, wanted: Sequence[int] | None, device: torch.device
    ) -> None:
        padded = [token for places in own for token in (*places, *[places[-1]] * (longest - len(places)))]
        tokens = [token for places in own for token in places]
        there = [number * longest + k for number, places in enumerate(own) for k in range(len(places))]
        if wanted is None:
            rows, found = tokens, there
        else:
            place_of = dict(zip(tokens, there, strict=True))
            rows = [row for row, token in enumerate(wanted) if token in place_of]
            found = [place_of[wanted[row]] for row in rows]
        self.num_rows = len(rows)
        self._lists = (padded, tokens, there, rows, found)
        self._device = device

    @cached_property
    def padded(self) -> Tensor:
        """The token of the row at each of the padded places."""
        return self._tensor(0)

    @cached_property
    def tokens(self) -> Tensor:
        """The tokens of the row that read."""
        return self._tensor(1)

    @cached_property
    def rows(self) -> Tensor:
        """The rows of logits that belong to them."""
        return self._tensor(3)

    @cached_property
    def found(self) -> Tensor:
        """The padded place of each of these rows."""
        return self._tensor(4)

    def unpadded(self, states: Tensor) -> Tensor:
        """The padded states without what only pads."""
        return states if len(self._lists[2]) == len(self._lists[0]) else states.index_select(0, self._tensor(2))

    def _tensor(self, which: int) -> Tensor:
        return torch.tensor(self._lists[which], dtype=torch.int64, device=self._device)
