"""Entries of a memory as the states that a base has of them after its first layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nightschool.layers.attention import PACKED_ATTENTION, lay_out, packed_arguments
from nightschool.layers.forward import causal_lm
from nightschool.layers.memory_fit import PaddedTexts
from nightschool.layers.memory_gate import GateFeatures
from nightschool.layers.memory_reading import EncodedEntries, MemoryReading
from nightschool.models.memory_modules import (
    MemoryModules,
    decoder_layers,
)
from nightschool.models.memory_states import EntryStates


class _DeepEnough(Exception):
    """No error: ends a forward pass whose rest nobody needs. Carries the states after the layer that was asked for."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def states_of_output(output: Any) -> Tensor:
    """The hidden states among what a decoder layer returns."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


class EntryEncoder:
    """Entries through the first layers of a base, each alone, without gradients: those that fit their question.

    Args:
        model: A base that `layers.forward.prepare` found able to keep packed documents apart.
        modules: What reads; says where to stop, and what fits.
        most_bytes: How much of states is kept for later readings of the same entries; 0 computes them anew each time.
    """

    def __init__(self, model: nn.Module, modules: MemoryModules, *, most_bytes: int = 0) -> None:
        self.states = EntryStates(most_bytes)
        self._model = causal_lm(model)
        self._fit, self._shape = modules.reader.fit, modules.shape
        self._last = decoder_layers(model)[self._shape.encoder_layers - 1]
        self.device: torch.device = next(model.parameters()).device

    @cached_property
    def _features(self) -> GateFeatures:
        return GateFeatures(cast(Any, self._model).get_input_embeddings().weight)

    def encode(self, readings: Sequence[MemoryReading]) -> None:
        """Fill `encoded` of the readings that lack it; an entry that is in several of them, or still kept, is not computed again.

        Those that lack `fits`, too, get them, and then hold nothing of entries that do not fit.
        """
        waiting = [reading for reading in readings if len(reading) and reading.encoded is None]
        opened = [self._opened(reading) for reading in waiting]
        own = [
            [text for text, is_open in zip(r.texts(), o, strict=True) if is_open]
            for r, o in zip(waiting, opened, strict=True)
        ]
        texts = sorted({text for texts in own for text in texts})
        states = self._kept_or_computed(texts)
        nothing = torch.empty(0, self._shape.hidden_size, device=self.device)
        for reading, open_k, mine in zip(waiting, opened, own, strict=True):
            parts = [states[text] for text in mine]
            numbers = torch.tensor([n for n, is_open in enumerate(open_k) if is_open], dtype=torch.int64)
            counts = torch.tensor([len(text) for text in mine], dtype=torch.int64)
            reading.encoded = EncodedEntries(
                before=torch.cat([part[:-1] for part in parts]) if parts else nothing,
                at=torch.cat([part[1:] for part in parts]) if parts else nothing,
                token_ids=torch.tensor([token for text in mine for token in text], dtype=torch.int64).to(self.device),
                entry=torch.repeat_interleave(numbers, counts).to(self.device),
            )

    def _opened(self, reading: MemoryReading) -> list[bool]:
        """Which entries are read. Fills `fits` if it was not: an entry without an address fits as far as anybody knows."""
        if reading.fits is not None:
            return [True] * len(reading)
        reading.fits = torch.zeros(len(reading), device=self.device)
        asked = {address.questions: None for address in reading.addresses if address is not None}
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for questions in asked:
                known = [(n, a) for n, a in enumerate(reading.addresses) if a is not None and a.questions == questions]
                texts = (
                    questions,
                    [address.subject for _, address in known],
                    [address.relation for _, address in known],
                )
                padded = [PaddedTexts.of(self._features, one, self.device) for one in texts]
                reading.fits[[n for n, _ in known]] = F.logsigmoid(self._fit(*padded).amax(0))
        return [fit >= math.log(max(self._shape.closed_below, 1e-30)) for fit in reading.fits.tolist()]

    def _kept_or_computed(self, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        states = {text: kept for text in texts if (kept := self.states.get(text)) is not None}
        missing = [text for text in texts if text not in states]
        if missing:
            for text, computed in zip(missing, self._states_of(missing), strict=True):
                states[text] = computed
                self.states.keep(text, computed)
        return states

    @torch.no_grad()
    def _states_of(self, texts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The states [tokens + 1, H] of each text and the anchor before it."""
        lengths = [len(text) + 1 for text in texts]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        layout = lay_out(ends, self.device)
        input_ids = torch.tensor([[t for text in texts for t in (self._shape.anchor_id, *text)]], device=self.device)
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(self.device)
        inner, before = self._model, self._model.config._attn_implementation
        backbone = getattr(inner, inner.base_model_prefix)

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise _DeepEnough(states_of_output(output)[0])

        handle = self._last.register_forward_hook(stop)
        try:
            if before != PACKED_ATTENTION:
                inner.set_attn_implementation(PACKED_ATTENTION)
            backbone(**packed_arguments(layout, input_ids, position_ids))
        except _DeepEnough as reached:
            states = reached.states
        finally:
            handle.remove()
            if before != PACKED_ATTENTION:
                inner.set_attn_implementation(before)
        states = states if layout.restore is None else states.index_select(0, layout.restore)
        return list(torch.split(states, lengths))
