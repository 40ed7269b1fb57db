"""Entries of a memory as the states that a base has of them after its first layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from itertools import compress
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nightschool.layers.attention import PACKED_ATTENTION, lay_out, packed_arguments
from nightschool.layers.forward import causal_lm
from nightschool.layers.memory_fit import PaddedTexts
from nightschool.layers.memory_gate import GateFeatures
from nightschool.layers.memory_reading import Address, EncodedEntries, MemoryReading
from nightschool.layers.memory_relation import ASKED_TOKENS, Told, places_asked, places_told
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
        self._reader, self._shape = modules.reader, modules.shape
        self._last = decoder_layers(model)[self._shape.encoder_layers - 1]
        self.device: torch.device = next(model.parameters()).device

    @cached_property
    def _features(self) -> GateFeatures:
        return GateFeatures(cast(Any, self._model).get_input_embeddings().weight)

    def encode(self, readings: Sequence[MemoryReading], known: Mapping[tuple[int, ...], Tensor] | None = None) -> None:
        """Fill `encoded` of the readings that lack it; an entry that is in several of them, or still kept, is not computed again.

        Those that lack `fits`, too, get them, and then hold nothing of entries that do not fit. `known` are states of texts, as
        `states_of` gives them, which are then not computed.
        """
        waiting = [reading for reading in readings if len(reading) and reading.encoded is None]
        judged = {reading for reading in waiting if reading.fits is None}
        opened = {reading: self._named(reading) if reading in judged else [True] * len(reading) for reading in waiting}
        entries = {text for reading, open_k in opened.items() for text in compress(reading.texts(), open_k)}
        questions = {asked for reading in judged for _, _, asked in _pairs(reading, opened[reading])}
        states = self._kept_or_computed(entries, questions, known or {})
        for reading in judged:
            opened[reading] = self._meant(reading, opened[reading], states)
        for reading, open_k in opened.items():
            reading.encoded = self._encoded(list(compress(reading.texts(), open_k)), open_k, states)

    def _encoded(
        self, texts: Sequence[tuple[int, ...]], open_k: Sequence[bool], states: Mapping[tuple[int, ...], Tensor]
    ) -> EncodedEntries:
        parts = [states[text] for text in texts]
        nothing = torch.empty(0, self._shape.hidden_size, device=self.device)
        numbers = torch.tensor([n for n, is_open in enumerate(open_k) if is_open], dtype=torch.int64)
        counts = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        return EncodedEntries(
            before=torch.cat([part[:-1] for part in parts]) if parts else nothing,
            at=torch.cat([part[1:] for part in parts]) if parts else nothing,
            token_ids=torch.tensor([token for text in texts for token in text], dtype=torch.int64).to(self.device),
            entry=torch.repeat_interleave(numbers, counts).to(self.device),
        )

    def _named(self, reading: MemoryReading) -> list[bool]:
        """Whether the question names the subject of each entry. Fills `fits` with the logarithm of how likely that is.

        An entry without an address fits as far as anybody knows.
        """
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
                reading.fits[[n for n, _ in known]] = F.logsigmoid(self._reader.subject_fit(*padded).amax(0))
        return _likely(reading.fits, self._shape.subject_closed_below)

    def _meant(
        self, reading: MemoryReading, named: Sequence[bool], states: Mapping[tuple[int, ...], Tensor]
    ) -> list[bool]:
        """Which of those whose subject is named tell what is asked. Adds the logarithm of how likely that is to `fits`."""
        pairs = _pairs(reading, named)
        if not pairs:
            return list(named)
        texts = reading.texts()
        # Of most requests all entries are of one subject, asked for in one way: each question is looked at once.
        asked_of = {
            key: n for n, key in enumerate(dict.fromkeys((asked, address.subject) for _, address, asked in pairs))
        }
        questions = [(states[asked][1:], places_asked(asked, subject)) for asked, subject in asked_of]
        place_of = {number: n for n, number in enumerate(dict.fromkeys(number for number, _, _ in pairs))}
        known = [(texts[number], cast(Address, reading.addresses[number])) for number in place_of]
        entries = [(states[text][1:], places_told(text, address.subject, address.told)) for text, address in known]
        of_pairs = [(asked_of[asked, address.subject], place_of[number]) for number, address, asked in pairs]
        which, numbers = torch.tensor(of_pairs, device=self.device).T, torch.tensor(list(place_of), device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            logits = self._reader.relation_fit(*(Told.of(*zip(*one, strict=True)) for one in (questions, entries)))
            best = torch.full((len(reading),), -torch.inf, device=self.device)
            best = best.scatter_reduce(0, numbers[which[1]], F.logsigmoid(logits[which[0], which[1]]), "amax")
            meant = torch.where(best.isinf(), 0.0, best)
        assert reading.fits is not None
        reading.fits = reading.fits + meant
        likely = _likely(meant, self._shape.relation_closed_below)
        return [a and b for a, b in zip(named, likely, strict=True)]

    def _kept_or_computed(
        self,
        entries: Set[tuple[int, ...]],
        questions: Set[tuple[int, ...]],
        known: Mapping[tuple[int, ...], Tensor],
    ) -> dict[tuple[int, ...], Tensor]:
        """States of all texts, those that are not there in one pass. Those of questions are not kept: they come once."""
        states = dict(known)
        for text in entries - states.keys():
            if (kept := self.states.get(text)) is not None:
                states[text] = kept
        missing = sorted((entries | questions) - states.keys())
        if missing:
            for text, computed in zip(missing, self.states_of(missing), strict=True):
                states[text] = computed
                if text in entries:
                    self.states.keep(text, computed)
        return states

    @torch.no_grad()
    def states_of(self, texts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The states [tokens + 1, H] of each text and the anchor before it, after the layers that entries go through."""
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


def _likely(log_probs: Tensor, closed_below: float) -> list[bool]:
    return [value >= math.log(max(closed_below, 1e-30)) for value in log_probs.tolist()]


def _pairs(reading: MemoryReading, named: Sequence[bool]) -> list[tuple[int, Address, tuple[int, ...]]]:
    """Each entry whose subject is named, by its number, with each spelling of what was asked: the last tokens of it."""
    return [
        (number, address, question[-ASKED_TOKENS:])
        for number, (address, is_named) in enumerate(zip(reading.addresses, named, strict=True))
        if address is not None and is_named
        for question in address.questions
        if question
    ]
