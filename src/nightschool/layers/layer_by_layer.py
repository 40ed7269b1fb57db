"""All micro-batches of a step pass one layer before the next, forward and on the way back, so that each expert is loaded once per pass.

Forward, the input of each layer and that of its experts are kept, for each micro-batch, and nothing else. On the way back, the experts of a
layer come first, for all micro-batches at once; then each micro-batch's layer is computed again with what they found. Micro-batches
add to each gradient in their order, so the numbers are those of micro-batches that pass one after the other, bit by bit on a
CPU. The schedule is GreedySnake's (2025, arXiv 2512.17570), for experts.

Layers are the model's own. A layer's forward stops where its experts are called: there, the layer of the next micro-batch begins, and the last
one computes the experts of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nightschool.layers.attention import DocumentLayout, lay_out, packed_arguments
from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.layers.expert_streaming.stream import ExpertStream
from nightschool.layers.expert_streaming.window import Routed, RoutedGradient, backward_together, forward_together
from nightschool.layers.forward import Documents, backbone, causal_lm, loss_of_hidden, output_head
from nightschool.layers.stack import last_norm, stacked_layers
from nightschool.layers.tied_rows import TiedRows

# Micro-batches whose layer has begun and not ended at a time; of more, each such group loads the experts once forward.
MOST_NESTED = 128
# Frames of Python that a layer takes down to its experts, with room to spare.
_FRAMES_OF_LAYER = 60


@dataclass
class _Pass:
    """One micro-batch: how each layer is called, and what is kept of it until it comes back."""

    batch: Documents
    layout: DocumentLayout
    arguments: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    routed: list[Routed | None] = field(default_factory=list)
    hidden: Tensor | None = None
    grad: Tensor | None = None


class LayerByLayer:
    """The layers of a packed mixture that learns in full and whose experts are streamed."""

    def __init__(self, model: nn.Module, stream: ExpertStream) -> None:
        layers, norm = stacked_layers(model), last_norm(model)
        assert layers is not None, "a mixture whose experts are streamed is a plain stack"
        assert norm is not None
        self._model, self._stream, self._layers, self._norm = model, stream, layers, norm
        embedding: Any = causal_lm(model).get_input_embeddings()
        is_tied = embedding.weight is cast(Any, output_head(model)).weight and embedding.weight.requires_grad
        self._tied: nn.Parameter | None = embedding.weight if is_tied else None

    @staticmethod
    def loads(micro_batches: int) -> int:
        """How many times each expert is loaded in a direction, at most."""
        return -(-micro_batches // MOST_NESTED)

    def kept_bytes(self, tokens: int) -> int:
        """About how many bytes stay of a micro-batch until it comes back."""
        config = backbone(self._model).config.get_text_config()
        numbers = 2 * config.hidden_size + 4 * config.num_experts_per_tok
        return int(tokens * len(self._layers) * numbers * next(self._model.parameters()).element_size())

    def gradients(
        self,
        batches: Sequence[Documents],
        part_of_loss: Callable[[Tensor], tuple[Tensor, Tensor]],
        computing: Callable[[], AbstractContextManager[object]],
        likeliest: Tensor,
    ) -> Tensor:
        """Find the gradients of all micro-batches; return the sum of their losses.

        Args:
            batches: On the model's device.
            part_of_loss: Makes of a micro-batch's summed loss its part of the loss, and what gradients are taken of.
            computing: The context that layers are computed in, such as autocast.
            likeliest: To which the number of tokens is added whose label had the largest logit.
        """
        with self._layers_run_once():
            passes = [_Pass(batch, lay_out(batch.cu_seqlens, batch.input_ids.device)) for batch in batches]
            ids = [batch.input_ids for batch in batches]
            tied = None if self._tied is None else TiedRows(self._tied, ids)
            with torch.no_grad(), computing():
                for one in passes:
                    one.hidden = self._first_input(one, note=True)
                for layer in self._layers:
                    self._forward(layer, passes)
            loss = self._head(passes, part_of_loss, computing, likeliest, tied)
            for place in reversed(range(len(self._layers))):
                self._backward(place, passes, computing)
            self._embedding(passes, computing, tied)
        return loss

    # --- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, layer: nn.Module, passes: Sequence[_Pass]) -> None:
        """Let all micro-batches pass a layer; nested, from where the first one reaches its experts."""
        place = len(passes[0].inputs)
        reached: list[Routed] = []
        results: list[Tensor] = []

        def run(number: int) -> None:
            one = passes[number]
            assert one.hidden is not None
            one.inputs.append(one.hidden)
            one.routed.append(None)
            one.hidden = layer(one.hidden, **one.arguments[place])

        def at_experts(experts: StreamedExperts, *given: Tensor) -> Tensor:
            mine, number = len(reached), begun[-1]
            reached.append(Routed(*given))
            passes[number].routed[place] = reached[-1]
            if number + 1 < len(passes) and len(reached) < MOST_NESTED:
                begun.append(number + 1)
                run(number + 1)
            else:
                results.extend(forward_together(experts, reached))
            return results[mine]

        begun: list[int] = []
        while len(begun) < len(passes):
            begun.append(len(begun))
            with self._experts_are(at_experts):
                run(begun[-1])
            reached.clear()
            results.clear()

    def _first_input(self, one: _Pass, *, note: bool = False) -> Tensor:
        """What the first layer gets; `note` how each of them is called."""
        inputs: list[Tensor] = []

        def of_layer(hidden: Tensor, **arguments: Any) -> Tensor:
            inputs.append(hidden)
            if note:
                one.arguments.append(arguments)
            return hidden

        # A module's attribute is looked for before its class's method, which stays as it is.
        for layer in self._layers:
            layer.__dict__["forward"] = of_layer
        try:
            backbone(self._model)(**packed_arguments(one.layout, one.batch.input_ids, one.batch.position_ids))
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]
        return inputs[0]

    # --- back -------------------------------------------------------------------------------------------------------

    def _head(
        self,
        passes: Sequence[_Pass],
        part_of_loss: Callable[[Tensor], tuple[Tensor, Tensor]],
        computing: Callable[[], AbstractContextManager[object]],
        likeliest: Tensor,
        tied: TiedRows | None,
    ) -> Tensor:
        parts: list[Tensor] = []
        for one in passes:
            assert one.hidden is not None
            hidden, one.hidden = one.hidden.requires_grad_(), None
            with computing():
                total, _ = loss_of_hidden(
                    self._model, self._norm(hidden)[0], one.layout, one.batch, likeliest=likeliest
                )
            part, scaled = part_of_loss(total)
            scaled.backward()  # type: ignore[no-untyped-call]
            parts.append(part.detach())
            one.grad = _gradient_of(hidden)
            if tied is not None:
                tied.note_head()
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        return loss

    def _backward(
        self, place: int, passes: Sequence[_Pass], computing: Callable[[], AbstractContextManager[object]]
    ) -> None:
        layer = self._layers[place]
        experts = next((module for module in layer.modules() if isinstance(module, StreamedExperts)), None)
        found: list[RoutedGradient] = []
        if experts is not None:
            routed = [cast(Routed, one.routed.pop()) for one in passes]
            grads = [cast(Tensor, one.grad).view_as(part.hidden_td) for one, part in zip(passes, routed, strict=True)]
            found = backward_together(experts, routed, grads)
        for number, one in enumerate(passes):
            hidden = one.inputs.pop().requires_grad_()

            with self._experts_are(partial(_as_found, gradient=found[number] if found else None)), computing():
                out = layer(hidden, **one.arguments[place])
            out.backward(one.grad)
            one.grad = _gradient_of(hidden)

    def _embedding(
        self, passes: Sequence[_Pass], computing: Callable[[], AbstractContextManager[object]], tied: TiedRows | None
    ) -> None:
        for one in passes:
            with computing():
                first = self._first_input(one)
            if not first.requires_grad:
                continue
            backward = partial(cast(Any, first).backward, one.grad)
            if tied is None:
                backward()
            else:
                tied.add_embedding(backward)
        if tied is not None:
            tied.finish()

    # --- the model meanwhile ----------------------------------------------------------------------------------------

    @contextmanager
    def _experts_are(self, instead: Callable[..., Tensor]) -> Iterator[None]:
        self._stream.instead = instead
        try:
            yield
        finally:
            self._stream.instead = None

    @contextmanager
    def _layers_run_once(self) -> Iterator[None]:
        """No layer computes itself again, as this does it already; and Python lets layers be nested."""
        layers: list[Any] = [layer for layer in self._layers if hasattr(layer, "gradient_checkpointing")]
        before = [(layer, bool(layer.gradient_checkpointing)) for layer in layers]
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + MOST_NESTED * _FRAMES_OF_LAYER)
        try:
            for layer, _ in before:
                layer.gradient_checkpointing = False
            yield
        finally:
            sys.setrecursionlimit(limit)
            for layer, was in before:
                layer.gradient_checkpointing = was


class _Found(torch.autograd.Function):
    """A layer's experts when the layer is computed again: what they return is not needed any more, and their gradients are known."""

    @staticmethod
    def forward(ctx: Any, hidden_td: Tensor, weights_tk: Tensor, found: RoutedGradient) -> Tensor:  # noqa: ARG004
        ctx.found = found
        return torch.zeros_like(hidden_td)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_td: Tensor) -> tuple[Tensor, Tensor, None]:
        found: RoutedGradient = ctx.found
        assert torch.equal(found.of_output_td, grad_td) or not bool(torch.isfinite(grad_td).all()), (
            "what a layer does with its experts' output changes the gradient on its way to them"
        )
        return found.hidden_td, found.weights_tk, None


def _as_found(
    experts: StreamedExperts,  # noqa: ARG001
    hidden_td: Tensor,
    index_tk: Tensor,  # noqa: ARG001
    weights_tk: Tensor,
    *,
    gradient: RoutedGradient | None,
) -> Tensor:
    return cast(Tensor, _Found.apply(hidden_td, weights_tk, gradient))  # type: ignore[no-untyped-call]


def _gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
