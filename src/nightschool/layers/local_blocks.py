"""Local learning: a model in blocks of layers that no gradient crosses, each with a loss of its own. Experimental.

A block gets what the one before it gave, without its history, and learns from the next word as it is read by an auxiliary head of
that block: a norm, and a low-rank change of the model's own head, which itself learns from the last block only. As soon as a block
is through, its gradients are found and its activations let go. The loss that is reported is that of the last block.

A block of one layer gets no credit for what only the next layer could use of it, such as a head that looks at the word before, so
blocks have two layers or more: copying from the context was learned by 0.21 in place of 0.995 with blocks of one.

Shapes: N tokens of a row, D width, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from nightschool.errors import ModelError
from nightschool.layers.attention import lay_out
from nightschool.layers.forward import Documents, ForwardPath, document_loss, output_head
from nightschool.layers.loss import chunked_cross_entropy
from nightschool.layers.stack import last_norm, stacked_layers

FEWEST_LAYERS = 2
_RANK = 8


class LocalBlocks:
    """The blocks of a model. One block is ordinary backpropagation: nothing is cut, and nothing added."""

    def __init__(self, model: nn.Module, path: ForwardPath, num_blocks: int) -> None:
        """Cut the layers into contiguous blocks, the last ones longer by one where they do not divide.

        Raises:
            ModelError: If the blocks would be of less than two layers, or the model is not run in a way that can be cut.
        """
        self._firsts: list[nn.Module] = []
        self.heads = nn.ModuleList()
        self._sums: list[Tensor] = []
        self._batch: Documents | None = None
        if num_blocks == 1:
            return
        layers = stacked_layers(model)
        if not (path.packed and path.fused_head) or layers is None:
            raise ModelError(
                f"train.local_blocks is {num_blocks}, and this model is not a plain stack of layers with a head on top. "
                "Write train.local_blocks: 1."
            )
        if len(layers) < FEWEST_LAYERS * num_blocks:
            most = max(1, len(layers) // FEWEST_LAYERS)
            raise ModelError(
                f"train.local_blocks is {num_blocks}, and the {len(layers)} layers of this model make at most {most} blocks of "
                f"{FEWEST_LAYERS} or more. Write train.local_blocks: {most}."
            )
        self._firsts = [layers[len(layers) * block // num_blocks] for block in range(1, num_blocks)]
        norm, head = last_norm(model), output_head(model)
        if norm is None:
            raise ModelError("train.local_blocks needs a norm before the head, and this model has none. Write 1.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same in all processes, and nobody else draws other numbers for it
            self.heads.extend(_AuxiliaryHead(norm, head) for _ in self._firsts)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns besides the model, by name; it is no part of a version."""
        return {f"local_heads.{name}": parameter for name, parameter in self.heads.named_parameters()}

    @contextmanager
    def learning(self, scaled: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A block of code in which a pass finds the gradients of all blocks but the last, whose loss `loss` returns.

        `scaled` is what is done to the sum of a micro-batch's losses before gradients are taken of it.
        """
        self._sums = []
        handles = [
            first.register_forward_pre_hook(self._cut(head, scaled), with_kwargs=True)
            for first, head in zip(self._firsts, self.heads, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, model: nn.Module, path: ForwardPath, batch: Documents, likeliest: Tensor) -> tuple[Tensor, int]:
        """As `layers.forward.document_loss`, of the last block."""
        self._batch = batch
        try:
            return document_loss(model, path, batch, likeliest=likeliest)
        finally:
            self._batch = None

    def figures(self, units: int) -> dict[str, Tensor]:
        """The loss of each block but the last since `learning` began, in nats per unit of the window."""
        blocks = len(self._firsts)
        return {
            f"local_loss_{block + 1}": torch.stack(self._sums[block::blocks]).sum() / units
            for block in range(blocks)
            if self._sums
        }

    def _cut(self, head: nn.Module, scaled: Callable[[Tensor], Tensor]) -> Any:
        def cut(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:  # noqa: ARG001
            hidden = cast(Tensor, given[0] if given else named["hidden_states"])
            batch = self._batch
            if batch is None or not (torch.is_grad_enabled() and hidden.requires_grad):
                return None
            labels, weights = batch.labels[0], batch.weights[0]
            layout = lay_out(batch.cu_seqlens, hidden.device)
            if layout.order is not None:
                labels, weights = labels.index_select(0, layout.order), weights.index_select(0, layout.order)
            total, _ = chunked_cross_entropy(head(hidden[0]), cast(Any, head).shared, labels, weights)
            self._sums.append(total.detach())
            with torch.autocast(hidden.device.type, enabled=False):
                scaled(total).backward()  # type: ignore[no-untyped-call]
            stopped = hidden.detach()
            return ((stopped, *given[1:]), named) if given else (given, named | {"hidden_states": stopped})

        return cut


class _AuxiliaryHead(nn.Module):
    """From what a block gives to what the model's head reads: [N, D] → [N, D]. `shared` is that head, which does not learn here."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        weight = cast(Tensor, head.weight)
        self.norm = copy.deepcopy(norm).requires_grad_()
        self.down = nn.Linear(weight.shape[1], _RANK, bias=False, device=weight.device)
        self.up = nn.Linear(_RANK, weight.shape[1], bias=False, device=weight.device)
        nn.init.zeros_(self.up.weight)
        shared = nn.Linear(1, 1, bias=False, device="meta")
        shared.out_features, shared.in_features = weight.shape
        shared.weight = nn.Parameter(weight.detach(), requires_grad=False)  # the very numbers, as they change
        # Not a module of this one: it belongs to the model.
        object.__setattr__(self, "shared", shared)

    def forward(self, hidden_nd: Tensor) -> Tensor:
        normed = self.norm(hidden_nd)
        changed: Tensor = normed + self.up(self.down(normed))
        return changed
