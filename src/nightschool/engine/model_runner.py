"""The model, seen from an engine: spans of tokens in, logits out.

S spans that want an answer, V entries of the vocabulary, T tokens of a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nightschool.engine.adapters import AdapterTable
from nightschool.engine.attention import ROW_ATTENTION, RowStep
from nightschool.engine.binding import Binding
from nightschool.engine.cache import LayerShape, RowCache
from nightschool.engine.compute import COMPUTE
from nightschool.engine.memory_table import MemoryTable
from nightschool.engine.private_copy import private_copy
from nightschool.engine.scheduler import Span, StepPlan
from nightschool.engine.step_context import SpanReading, StepContext
from nightschool.engine.weights import lay_out
from nightschool.errors import ModelError
from nightschool.models.memory_modules import MemoryModules
from nightschool.models.unmerged import LoraWeights

# Logits of one pass over packed prompts against those of the model's own attention, as a share of the largest.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 0.1
# Of the prompt by which a new adapter is tried; more than the wanted one, so that the two are told apart.
_TRIED_TOKENS = 5

TokensOf = Callable[[Span], Sequence[int]]
# Gets what a layer gives to the next: [T,H], the tokens in the order of the context's spans. Runs within the step.
LayerHook = Callable[[StepContext, Tensor], None]


class ModelRunner:
    """Runs a private copy of a model, which shares the weights, so that nobody else's settings matter.

    Args:
        model: A causal language model of transformers, without adapters that are kept apart.
        layout_bytes: What further layouts of the weights, made for decoding, may take; see `engine.weights`.
        packed_folder: Where packed weights are kept for the next load.

    Raises:
        ModelError: If the model's attention is none that rows of a cache can serve, with the reason.
    """

    def __init__(self, model: nn.Module, *, layout_bytes: int = 0, packed_folder: Path | None = None) -> None:
        self._model: Any = private_copy(model)
        parameter = next(self._model.parameters())
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        # Four dimensions make transformers hand the mask down as it is instead of building one.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._context: StepContext | None = None
        self.layouts = lay_out(self._model, layout_bytes, packed_folder=packed_folder)
        self._adapters = AdapterTable(self._model)
        self._memories = MemoryTable(self._model, model)
        self.shapes = self._check()

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_output_embeddings().weight.shape[0])

    def make_cache(self, num_rows: int, budget_tokens: int) -> RowCache:
        """An empty cache for this model."""
        return RowCache(
            self.shapes, num_rows=num_rows, budget_tokens=budget_tokens, dtype=self.dtype, device=self.device
        )

    def capture(self, layer: str, hook: LayerHook) -> Callable[[], None]:
        """Call `hook` with what a layer (such as `model.layers.3`) computes in every step; return how to stop that.

        Raises:
            ModelError: If the model has no such layer.
        """
        try:
            module = self._model.get_submodule(layer)
        except AttributeError:
            names = [name for name, _ in self._model.named_modules() if name.count(".") <= 2 and name]
            raise ModelError(
                f"{type(self._model).__name__} has no layer {layer!r}. It has {', '.join(names[:40])}."
            ) from None

        def seen(_: nn.Module, __: Any, output: Any) -> None:
            if self._context is not None:
                hook(self._context, (output[0] if isinstance(output, tuple) else output)[0])

        return cast(Callable[[], None], COMPUTE.call(lambda: module.register_forward_hook(seen)).remove)

    def add_adapter(self, weights: LoraWeights) -> int:
        """Take an adapter in, after a look whether it runs; returns the number by which a `StepContext` names it.

        Raises:
            NeedsMerging: If the model has a layer that cannot have it unmerged, with the reason.
        """
        return COMPUTE.call(lambda: self._add_adapter(weights))

    def remove_adapter(self, number: int) -> LoraWeights:
        """Let an adapter go that no step names any more, and return what it was."""
        return COMPUTE.call(lambda: self._adapters.remove(number))

    def add_memory(self, modules: MemoryModules) -> int:
        """Take memory modules in; returns the number by which a `StepContext` names them.

        Raises:
            ModelError: If they were made for another base.
        """
        return COMPUTE.call(lambda: self._memories.add(modules))

    def remove_memory(self, number: int) -> MemoryModules:
        """Let memory modules go that no step names any more."""
        return COMPUTE.call(lambda: self._memories.remove(number))

    def memory(self, number: int) -> MemoryModules:
        """The memory modules of a number."""
        return self._memories.standing(number)

    def forget_entries(self) -> None:
        """Let go of what is kept of entries. On the compute thread."""
        self._memories.forget()

    def encode(self, readings: Sequence[SpanReading]) -> None:
        """Make entries ready to be read. On the compute thread."""
        self._memories.encode(readings)

    def log_probs(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], adapter: int) -> Tensor:
        """Log-probabilities [A] of A tokens that are given, with an adapter, or 0 for none. On the compute thread."""
        ids = [*prompt_ids, *answer_ids[:-1]]
        logits = self._alone(ids, range(len(prompt_ids) - 1, len(ids)), adapter)
        answered = torch.tensor(list(answer_ids), device=self.device)
        return logits.float().log_softmax(-1).gather(1, answered[:, None])[:, 0]

    def run(self, plan: StepPlan, cache: RowCache, tokens_of: TokensOf, context: StepContext | None = None) -> Tensor:
        """Read the tokens of all spans, keep their keys and values, and return logits [S,V] of the spans that answer.

        The order is that of `plan.spans`. Layers and hooks find `context` where they look for it.
        """
        self._context = context
        try:
            return self._run(plan, cache, tokens_of)
        finally:
            self._context = None

    def _add_adapter(self, weights: LoraWeights) -> int:
        number = self._adapters.add(weights)
        try:
            self._alone([0] * _TRIED_TOKENS, [_TRIED_TOKENS - 1], number)
        except BaseException:
            self._adapters.remove(number)
            raise
        return number

    def _alone(self, token_ids: Sequence[int], wanted: Sequence[int], adapter: int) -> Tensor:
        """Logits [S,V] of one prompt at the places `wanted`, of which nothing is kept."""
        span = Span(0, 0, 0, len(token_ids))
        self._context = StepContext((span,), (Binding(""),), (adapter,))
        try:
            step = RowStep(None, device=self.device, dtype=self.dtype)
            return self._forward(token_ids, range(len(token_ids)), step, wanted)
        finally:
            self._context = None

    def _run(self, plan: StepPlan, cache: RowCache, tokens_of: TokensOf) -> Tensor:
        token_ids: list[int] = []
        places: list[int] = []
        wanted: list[int] = []
        for span in plan.spans:
            token_ids.extend(tokens_of(span))
            places.extend(range(span.start, span.start + span.length))
            if span.answers:
                wanted.append(len(token_ids) - 1)
        step = RowStep(cache, plan.decode, plan.prefill, self.device, self.dtype)
        if not wanted:
            with self._memories.reading(self._context, [0]):
                self._forward(token_ids, places, step, [0])
            return torch.empty(0, self.vocab_size, device=self.device)
        asked = None if len(wanted) == len(token_ids) else wanted
        with self._memories.reading(self._context, asked) as mix:
            return mix(self._forward(token_ids, places, step, asked))

    def _forward(
        self, token_ids: Sequence[int], places: Sequence[int], step: RowStep, wanted: Sequence[int] | None
    ) -> Tensor:
        """Logits [S,V] of the tokens at `wanted`, or of all."""
        self._adapters.begin(self._context, wanted)
        output = self._model(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=torch.tensor([places], device=self.device),
            attention_mask=self._no_mask,
            use_cache=False,
            logits_to_keep=0 if wanted is None else torch.tensor(wanted, device=self.device),
            row_step=step,
        )
        return cast(Tensor, output.logits)[0]

    def _check(self) -> list[LayerShape]:
        """Compare one prompt with the model's own attention, read in chunks beside others; return the layers' shapes.

        Other engines take their turns between any two passes.

        Raises:
            ModelError: If the logits differ.
        """
        name = type(self._model).__name__
        limit = _TOLERANCE.get(self.dtype, _TOLERANCE_16_BIT)
        ids = torch.randint(0, self.vocab_size, (19,), generator=torch.Generator().manual_seed(0)).tolist()
        try:
            expected = COMPUTE.call(partial(self._own_logits, ids))
            self._model.set_attn_implementation(ROW_ATTENTION)
            note = RowStep(None, device=self.device, dtype=self.dtype)
            COMPUTE.call(partial(self._forward, ids, range(len(ids)), note, None))
            cache = RowCache(
                list(note.shapes.values()), num_rows=3, budget_tokens=1 << 20, dtype=self.dtype, device=self.device
            )
            cache.ensure(3, len(ids))
            plans = (
                StepPlan((), (Span(0, 0, 0, 10, answers=False), Span(1, 2, 0, 6, answers=False))),
                StepPlan((), (Span(0, 0, 10, 8, answers=False), Span(1, 2, 6, 9))),
                StepPlan((Span(0, 0, 18, 1), Span(1, 2, 15, 1)), ()),
            )

            def tokens_of(span: Span) -> Sequence[int]:
                return ids[span.start : span.start + span.length]

            logits = [COMPUTE.call(partial(self.run, plan, cache, tokens_of)) for plan in plans]
            actual = torch.cat(logits[1:])
            difference = float((actual - expected[[14, 18, 15]]).abs().max() / expected.abs().max().clamp_min(1e-6))
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
            raise ModelError(
                f"The engine cannot serve {name}: it does not run on rows of a cache ({error}). "
                "Serve a model whose layers are all ordinary attention."
            ) from error
        if not difference <= limit:
            raise ModelError(
                f"The engine cannot serve {name}: on rows of a cache its logits differ by {difference:.1e} of the largest, "
                f"and {limit:.0e} is allowed. Serve a model whose layers are all ordinary attention."
            )
        return list(note.shapes.values())

    def _own_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [T,V] by the attention that transformers would choose."""
        self._model.set_attn_implementation("sdpa" if getattr(self._model, "_supports_sdpa", False) else "eager")
        ids = torch.tensor([token_ids], device=self.device)
        return cast(Tensor, self._model(input_ids=ids, use_cache=False).logits)[0]


def exact_context(config: Any) -> int:
    """Tokens up to which a token's answer depends on its own row alone; practically endless for most models.

    Models with `longrope` turn all positions of a batch otherwise as soon as one of them is long (transformers decides by
    the largest position), so beyond the length that they were first trained on, one request would change another.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    limits = [
        kind.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=sys.maxsize)
