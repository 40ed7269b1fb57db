"""A decoder of transformers that reads an explicit memory: its memory modules, and how they are attached to its layers.

The base is never changed. With the memory off, or for tokens that nothing was found for, it computes to the bit what it does alone:
the hooks then do nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from nightschool.layers.forward import causal_lm
from nightschool.layers.memory_reading import MemoryReading, TokenSource
from nightschool.models.memory_encoder import EntryEncoder, states_of_output
from nightschool.models.memory_modules import (
    MemoryModules,
    check_fits,
    decoder_layers,
)
from nightschool.models.memory_step import MemoryStep, Places, Trace


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
        self._step = step if len(step) else None
        try:
            yield step.traces
        finally:
            self._step = None

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def after(_: nn.Module, __: Any, output: Any) -> Any:
            if self._step is None:
                return None
            changed = self._step.after_layer(index, states_of_output(output)[0])[None]
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
