"""The memory modules that stand on one base: requests read their entries as the tokens of a step pass the layers.

Any number of modules may stand on a base at once. In a step each request reads with those of its own version, or with none; what
nobody reads is computed to the bit as without them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from nightschool.engine.private_copy import private_copy
from nightschool.engine.step_context import SpanReading, StepContext
from nightschool.layers.attention import PACKED_ATTENTION
from nightschool.layers.forward import causal_lm
from nightschool.layers.memory_fusion import side_by_side
from nightschool.layers.memory_reading import MemoryReading, Prepared, TokenSource
from nightschool.models.memory_encoder import EntryEncoder
from nightschool.models.memory_modules import MemoryModules, check_fits, decoder_layers
from nightschool.models.memory_step import MemoryStep

Mix = Callable[[Tensor], Tensor]
# States of entries that are kept for each version: some 1,800 entries of sixteen tokens where the model is 576 wide, in fp32.
_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class MemoryOnBase:
    """A version that is its base with memory modules, as an engine of that base takes it."""

    ref: str
    tokenizer: PreTrainedTokenizerBase
    modules: MemoryModules

    @property
    def num_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.modules.parameters())


@dataclass(eq=False)
class _Standing:
    modules: MemoryModules
    encoder: EntryEncoder
    handles: list[RemovableHandle] = field(default_factory=list)
    prepared: WeakKeyDictionary[MemoryReading, Prepared] = field(default_factory=WeakKeyDictionary)
    latest: tuple[Sequence[MemoryReading], Prepared] | None = None

    def prepare(self, readings: Sequence[MemoryReading]) -> Prepared:
        """What those who read together compare themselves with. From one token to the next it is mostly the same."""
        known = self.latest
        if known is None or known[0] != readings:
            with torch.inference_mode():
                together = side_by_side([self.prepared[reading] for reading in readings])
            known = self.latest = (list(readings), together)
        return known[1]


class MemoryTable:
    """Memory modules by number.

    Args:
        running: The model whose layers run the steps.
        base: The same weights as transformers calls them; entries go through its first layers.
    """

    def __init__(self, running: nn.Module, base: nn.Module) -> None:
        self._running, self._base = running, base
        self._packed: nn.Module | None = None
        self._standing: dict[int, _Standing] = {}
        self._numbers = itertools.count(1)
        self._steps: dict[int, MemoryStep] = {}

    def add(self, modules: MemoryModules) -> int:
        """Let modules stand on the base. Raises ModelError if they were made for another one."""
        check_fits(self._base, modules.shape)
        number = next(self._numbers)
        modules = modules.to(next(self._running.parameters()).device).eval().requires_grad_(requires_grad=False)
        if self._packed is None:
            # Entries are packed; to say so at each pass, and to take it back, would cost a tenth of a short one.
            self._packed = private_copy(self._base)
            causal_lm(self._packed).set_attn_implementation(PACKED_ATTENTION)
        standing = _Standing(modules, EntryEncoder(self._packed, modules, most_bytes=_KEPT_BYTES))
        layers = decoder_layers(self._running)
        for index in modules.shape.layers:
            hook = partial(self._after_layer, number, index)
            standing.handles.append(layers[index].register_forward_hook(hook))
        self._standing[number] = standing
        return number

    def remove(self, number: int) -> MemoryModules:
        """Take modules off the base again that no step reads with any more."""
        standing = self._standing.pop(number)
        for handle in standing.handles:
            handle.remove()
        return standing.modules

    def forget(self) -> None:
        """Let go of all states of entries but those of requests that are being answered."""
        for standing in self._standing.values():
            standing.encoder.states.clear()
            standing.latest = None

    def encode(self, readings: Sequence[SpanReading]) -> None:
        """Take the entries of new requests through the first layers, those of all requests together, and prepare them once."""
        of_number: dict[int, list[MemoryReading]] = defaultdict(list)
        for one in readings:
            of_number[one.modules].append(one.reading)
        for number, own in of_number.items():
            standing = self._standing[number]
            standing.encoder.encode(own)
            with torch.inference_mode():
                prepare = standing.modules.reader.prepare
                standing.prepared.update((one, prepare(one)) for one in own if not one.is_closed)

    def standing(self, number: int) -> MemoryModules:
        """The modules of a number."""
        return self._standing[number].modules

    @contextmanager
    def reading(self, context: StepContext | None, wanted: Sequence[int] | None) -> Iterator[Mix]:
        """Let the spans of a step read while the block computes it; yields what is to be made of its logits.

        The context learns how to say where a token came from, for each span that reads and answers.
        """
        if context is None or not context.readings:
            for one in self._standing.values():
                one.latest = None
            yield _as_it_is
            return
        of_number: dict[int, list[tuple[slice, MemoryReading]]] = {}
        keys: dict[int, list[int]] = {}
        start = 0
        for span in context.spans:
            stop = start + span.length
            found = context.readings.get(span.key)
            if found is not None and not found.reading.is_closed and found.start < span.start + span.length:
                first = start + max(0, found.start - span.start)
                of_number.setdefault(found.modules, []).append((slice(first, stop), found.reading))
                keys.setdefault(found.modules, []).append(span.key)
            start = stop
        standing = self._standing
        self._steps = {
            n: MemoryStep(standing[n].modules, own, wanted, standing[n].prepare) for n, own in of_number.items()
        }
        try:
            yield self._mix
            for number, step in self._steps.items():
                for place, (key, (places, _)) in enumerate(zip(keys[number], of_number[number], strict=True)):
                    context.sources[key] = partial(_source, step, place, places.stop - places.start - 1)
        finally:
            self._steps = {}

    def _mix(self, logits_sv: Tensor) -> Tensor:
        for step in self._steps.values():
            logits_sv = step.mix(logits_sv)
        return logits_sv

    def _after_layer(self, number: int, index: int, _: nn.Module, __: Any, output: Any) -> Any:
        step = self._steps.get(number)
        if step is None:
            return None
        states = output[0] if isinstance(output, tuple) else output
        with torch.inference_mode():
            changed = step.after_layer(index, states[0])[None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _source(step: MemoryStep, number: int, place: int, token_id: int, log_prob: float) -> TokenSource:
    """Where the token after a place of a reading came from; nothing is looked for until somebody asks."""
    return step.trace(number).source(place, token_id, log_prob)


def _as_it_is(logits_sv: Tensor) -> Tensor:
    return logits_sv
