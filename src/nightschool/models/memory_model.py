"""A decoder of transformers that reads an explicit memory: its memory modules, and how they are attached to its layers.

The base is never changed. With the memory off, or for tokens that nothing was found for, it computes to the bit what it does alone:
the hooks then do nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel

from nightschool.errors import ModelError
from nightschool.layers.attention import PACKED_ATTENTION, lay_out, packed_arguments
from nightschool.layers.forward import causal_lm
from nightschool.layers.memory_fit import PaddedTexts
from nightschool.layers.memory_fusion import Fused, MemoryReader, Pointed, mix
from nightschool.layers.memory_gate import GateFeatures, MemoryGate
from nightschool.layers.memory_reading import EncodedEntries, EntryWeight, MemoryReading, Prepared, TokenSource

Places = slice | Tensor
"""Which tokens of a step belong to a reading."""

CLOSED_BELOW = 0.5
"""An entry that is less likely than this to fit its question is not read, unless a shape says otherwise."""

# Below this share of a token an entry is not named.
_LEAST_WEIGHT = 0.01


@dataclass(frozen=True)
class MemoryShape:
    """What the memory modules of a model are made from. A rank of 0 means the full width.

    Entries are read as the states after the first `encoder_layers` layers of the base; `fusion_layers` are the layers, counted from 0,
    whose output the fusion adds to. `anchor_id` is put before each entry: the first token of a text is a sink of attention, and
    its state says little of it. An entry that fits the question with a probability below `closed_below` is not read.
    """

    hidden_size: int
    encoder_layers: int
    fusion_layers: tuple[int, ...]
    anchor_id: int
    knowledge_dim: int = 1536
    gate_rank: int = 128
    fusion_rank: int = 128
    closed_below: float = CLOSED_BELOW

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose output the memory looks at, or adds to."""
        return tuple(sorted({self.encoder_layers - 1, *self.fusion_layers}))

    def to_json(self) -> dict[str, Any]:
        """Plain values that `MemoryShape(**values)` takes back."""
        return asdict(self) | {"fusion_layers": list(self.fusion_layers)}


def shape_for(
    model: nn.Module,
    tokenizer: Any,
    *,
    encoder_layers: int | None = None,
    fusion_layers: Sequence[int] | None = None,
    knowledge_dim: int | None = None,
    gate_rank: int = 128,
    fusion_rank: int = 128,
) -> MemoryShape:
    """The shape for a base: entries are read after four fifths of its layers, and fused there and half-way from there to the end.

    Without `knowledge_dim` it is 1536, or twice the width of a base where that is less.

    Raises:
        ModelError: If a layer does not exist, or a fusion layer lies before the entries are read.
    """
    count = len(decoder_layers(model))
    depth = encoder_layers if encoder_layers is not None else max(1, round(0.8 * count))
    if not 1 <= depth <= count:
        raise ModelError(f"memory.encoder_layers is {depth}, and the base has {count} layers. Write 1 to {count}.")
    fused = tuple(fusion_layers) if fusion_layers is not None else (depth - 1, (depth + count) // 2 - 1)
    fused = tuple(sorted(set(fused)))
    if not fused or fused[0] < depth - 1 or fused[-1] >= count:
        raise ModelError(
            f"memory.fusion_layers is {list(fused)}: entries are read after {depth} layers, so fusion layers lie from {depth - 1} to "
            f"{count - 1}. Correct it, or leave it out."
        )
    anchors = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    width = int(causal_lm(model).config.get_text_config().hidden_size)
    return MemoryShape(
        hidden_size=width,
        encoder_layers=depth,
        fusion_layers=fused,
        anchor_id=next((int(token) for token in anchors if token is not None), 0),
        knowledge_dim=min(1536, 2 * width) if knowledge_dim is None else knowledge_dim,
        gate_rank=gate_rank,
        fusion_rank=fusion_rank,
    )


class MemoryModules(nn.Module):
    """All that learns: the gate, which finds entries, and the reader. The same seed gives the same weights."""

    def __init__(self, shape: MemoryShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gate = MemoryGate(shape.hidden_size, shape.knowledge_dim, shape.gate_rank)
            self.reader = MemoryReader(shape.hidden_size, shape.fusion_rank, len(shape.fusion_layers))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model of transformers.

    Raises:
        ModelError: If it has no such list.
    """
    inner = causal_lm(model)
    count = int(inner.config.get_text_config().num_hidden_layers)
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(inner).__name__} has no list of its {count} layers, so no memory can be attached to it.")


def check_fits(model: nn.Module, shape: MemoryShape) -> None:
    """Refuse a base that the modules were not made for. Raises ModelError with both sizes."""
    layers = decoder_layers(model)
    width = int(causal_lm(model).config.get_text_config().hidden_size)
    if shape.hidden_size != width:
        raise ModelError(
            f"The memory modules are made for a base of width {shape.hidden_size}, and this one has {width}. "
            "Load them on the base that they were trained on."
        )
    if max(shape.layers) >= len(layers):
        raise ModelError(
            f"The memory modules read at layer {max(shape.layers)}, and this base has {len(layers)} layers. "
            "Load them on the base that they were trained on."
        )


class _DeepEnough(Exception):
    """No error: ends a forward pass whose rest nobody needs. Carries the states after the layer that was asked for."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _states(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


class EntryEncoder:
    """Entries through the first layers of a base, each alone, without gradients: those that fit their question.

    Args:
        model: A base that `layers.forward.prepare` found able to keep packed documents apart.
        modules: What reads; says where to stop, and what fits.
    """

    def __init__(self, model: nn.Module, modules: MemoryModules) -> None:
        self._model = causal_lm(model)
        self._fit, self._shape = modules.reader.fit, modules.shape
        self._last = decoder_layers(model)[self._shape.encoder_layers - 1]
        self.device: torch.device = next(model.parameters()).device

    @cached_property
    def _features(self) -> GateFeatures:
        return GateFeatures(cast(Any, self._model).get_input_embeddings().weight)

    def encode(self, readings: Sequence[MemoryReading]) -> None:
        """Fill `encoded` of the readings that lack it; an entry that is in several of them is computed once.

        Those that lack `fits`, too, get them, and then hold nothing of entries that do not fit.
        """
        waiting = [reading for reading in readings if len(reading) and reading.encoded is None]
        opened = [self._opened(reading) for reading in waiting]
        own = [
            [text for text, is_open in zip(r.texts(), o, strict=True) if is_open]
            for r, o in zip(waiting, opened, strict=True)
        ]
        texts = sorted({text for texts in own for text in texts})
        states = dict(zip(texts, self._states_of(texts), strict=True)) if texts else {}
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
            raise _DeepEnough(_states(output)[0])

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
        self.traces: list[Trace] = []
        if not spans:
            return
        own = [
            list(range(places.start, places.stop)) if isinstance(places, slice) else places.tolist()
            for places, _ in spans
        ]
        self.traces = [
            Trace(self, number, reading, len(places))
            for number, ((_, reading), places) in enumerate(zip(spans, own, strict=True))
        ]
        self._entries = (prepare or self._reader.prepare_all)([reading for _, reading in spans])
        self._lay_out(own, wanted)

    def _lay_out(self, own: list[list[int]], wanted: Sequence[int] | None) -> None:
        """Where each token of the spans lies among the padded ones, and which of the logits are its own."""
        longest = max(map(len, own))
        self._size = (len(own), longest)
        padded = [token for places in own for token in (*places, *places[-1:] * (longest - len(places)))]
        tokens = [token for places in own for token in places]
        there = [number * longest + k for number, places in enumerate(own) for k in range(len(places))]
        self._from = self._indices(padded)
        # Without padding nothing needs to be left out again.
        self._there = self._indices(there) if len(there) < len(padded) else None
        self._to = self._from if self._there is None else self._indices(tokens)
        if wanted is None:
            rows, found = tokens, there
        else:
            place_of = dict(zip(tokens, there, strict=True))
            rows = [row for row, token in enumerate(wanted) if token in place_of]
            found = [place_of[wanted[row]] for row in rows]
        self._has_rows = bool(rows)
        self._rows, self._found = self._indices(rows), self._indices(found)
        # As most steps of an engine are: one token of each, in their order, and all of them answer.
        self._is_plain = longest == 1 and tokens == rows == found == list(range(len(own)))

    def _indices(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64, device=self._entries.ids.device)

    def after_layer(self, index: int, states_th: Tensor) -> Tensor:
        """What layer `index` gives to the next one [tokens, H]: call it with the output of each of `MemoryShape.layers`."""
        if not self.traces:
            return states_th
        with torch.autocast(states_th.device.type, enabled=False):
            is_whole = self._is_plain and len(states_th) == len(self._rows)
            states_bth = (states_th if is_whole else states_th.index_select(0, self._from)).view(*self._size, -1)
            if index == self._shape.encoder_layers - 1:
                self.pointed = self._reader.point(states_bth, self._entries)
            if index not in self._shape.fusion_layers:
                return states_th
            fused = self._reader.fuse(self._shape.fusion_layers.index(index), states_bth, self._entries)
            self.fused.append(fused)
            changed = fused.states.flatten(0, 1)
            if is_whole:
                return changed
            changed = changed if self._there is None else changed.index_select(0, self._there)
            return states_th.index_copy(0, self._to, changed)

    def mix(self, logits_sv: Tensor) -> Tensor:
        """Logits [S, V] of the wanted tokens, those that read as log-probabilities with what the pointer copies."""
        if not self.traces or not self._has_rows:
            return logits_sv
        pointed, entries = cast(Pointed, self.pointed), self._entries
        there = Pointed(pointed.sentinel.flatten(), pointed.tokens.flatten(0, 1))
        if self._is_plain and len(logits_sv) == len(self._rows):
            return mix(logits_sv, there, entries.ids, entries.place).to(logits_sv.dtype)
        there, whose = Pointed(*(one[self._found] for one in there)), self._found // self._size[1]
        mixed = mix(logits_sv[self._rows], there, entries.ids[whose], entries.place[whose])
        return logits_sv.index_copy(0, self._rows, mixed.to(logits_sv.dtype))


class MemoryAttachment:
    """The memory modules on the layers of a model, until `remove` is called. Does nothing outside of `reading`.

    Args:
        model: A causal language model of transformers: the base, or a copy of it that shares the weights.
        modules: What reads.

    Raises:
        ModelError: If they were made for another base.
    """

    def __init__(self, model: nn.Module, modules: MemoryModules) -> None:
        self._modules, shape = modules, modules.shape
        layers = decoder_layers(model)
        check_fits(model, shape)
        self._step: MemoryStep | None = None
        self._handles = [layers[index].register_forward_hook(self._hook(index)) for index in shape.layers]
        self._handles.append(causal_lm(model).register_forward_hook(self._mix))

    def remove(self) -> None:
        """Take the modules off again."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def reading(
        self, spans: Sequence[tuple[Places, MemoryReading]], wanted: Sequence[int] | None = None
    ) -> Iterator[list[Trace]]:
        """Let the tokens of one packed row [1, T] read; yields what was read, once it was. See `MemoryStep`.

        Raises:
            ModelError: If entries of a reading were not encoded.
        """
        step = MemoryStep(self._modules, spans, wanted)
        self._step = step if step.traces else None
        try:
            yield step.traces
        finally:
            self._step = None

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def after(_: nn.Module, __: Any, output: Any) -> Any:
            if self._step is None:
                return None
            changed = self._step.after_layer(index, _states(output)[0])[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return after

    def _mix(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._step is not None:
            output.logits = self._step.mix(output.logits[0])[None]


class MemoryModel(nn.Module):
    """A frozen base with memory modules, as it is trained and asked outside of an engine. Parameters of the base do not learn.

    Calling it is calling the base; within `reading` it reads.
    """

    def __init__(self, base: PreTrainedModel, memory: MemoryModules) -> None:
        super().__init__()
        self.base = base
        self.memory = memory.to(next(base.parameters()).device)
        for parameter in base.parameters():
            parameter.requires_grad_(False)  # noqa: FBT003 - its only argument
        self.attachment = MemoryAttachment(base, memory)
        self.encoder = EntryEncoder(base, memory)

    @property
    def config(self) -> Any:
        """That of the base."""
        return self.base.config

    def get_base_model(self) -> PreTrainedModel:
        """The base, whose layers read while a reading is on."""
        return self.base

    def get_input_embeddings(self) -> nn.Module:
        """Those of the base, which the gate reads."""
        return cast(nn.Module, cast(Any, self.base).get_input_embeddings())

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """As the base's."""
        return self.base(*arguments, **settings)

    @contextmanager
    def reading(
        self, spans: Sequence[tuple[Places, MemoryReading]], wanted: Sequence[int] | None = None
    ) -> Iterator[list[Trace]]:
        """Encode what is read, and read it: see `MemoryAttachment.reading`."""
        self.encoder.encode([reading for _, reading in spans])
        with self.attachment.reading(spans, wanted) as traces:
            yield traces


@torch.no_grad()
def generate_greedily(
    model: MemoryModel,
    prompt_ids: Sequence[int],
    reading: MemoryReading | None,
    max_new_tokens: int,
    *,
    stop_ids: frozenset[int] = frozenset(),
) -> tuple[list[int], list[TokenSource]]:
    """What the model answers, and where each token came from. With a KV cache; the reading stays what it is to the end.

    Only what predicts the answer reads: keys and values of the prompt are the base's own.
    """
    model.eval()
    cache = None
    feed = list(prompt_ids)
    answer: list[int] = []
    sources: list[TokenSource] = []
    device = next(model.parameters()).device
    while len(answer) < max_new_tokens:
        last = len(feed) - 1
        spans = [(slice(last, last + 1), reading)] if reading is not None else []
        with model.reading(spans, [last]) as traces:
            output = model(
                input_ids=torch.tensor([feed], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits = output.logits[0, -1].float()
            token = int(logits.argmax())
            log_prob = float(logits.log_softmax(-1)[token])
            sources.append(traces[0].source(0, token, log_prob) if traces else TokenSource("weights", (), 0.0))
        if token in stop_ids:
            sources.pop()
            break
        answer.append(token)
        cache, feed = output.past_key_values, [token]
    return answer, sources
