"""Cross-entropy over large vocabularies without ever holding all logits.

Shapes: N tokens of a batch, M of them trained, D hidden size, V vocabulary, K tokens of a chunk.

At 151,936 words one fp32 copy of the logits of 1,024 tokens is 0.62 GB, and the plain path holds three. Here at most one
chunk of logits exists at a time, and only for tokens that carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# fp32 logits of one chunk. Fewer tokens make thin products and add to the weight's gradient too often. Measured on one
# core with matrix tiles, 2,700 tokens of width 256, milliseconds forward and backward, with 32 / 128 / 512 tokens a chunk:
# 8,192 words: fp32 362 / 290 / 254, bf16 274 / 135 / 131 (all logits at once: 329 and 142); 32,768 words: fp32
# 1,870 / 1,211 / 1,129, bf16 1,811 / 777 / 511 (2,175 and 596). From 512 tokens on nothing is gained.
CHUNK_BYTES = 16 * 2**20
_FEWEST_TOKENS, _MOST_TOKENS = 256, 1024


def chunk_tokens_for(vocab_size: int) -> int:
    """Tokens in a chunk so that its fp32 logits take about `CHUNK_BYTES`; at least 256, at most 1024."""
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, CHUNK_BYTES // (4 * vocab_size)))


def chunked_cross_entropy(
    hidden_nd: Tensor,
    head: nn.Module,
    labels_n: Tensor,
    weights_n: Tensor,
    chunk_tokens: int | None = None,
    likeliest: Tensor | None = None,
) -> tuple[Tensor, int]:
    """The weighted sum of the losses in nats, and the number of tokens that carry loss.

    To the scalar `likeliest` the number of those tokens is added whose label has the largest logit; ties count.

    Positions whose weight is 0 or whose label is negative are not computed at all. Gradients equal those of
    `F.cross_entropy` over all logits. A plain `nn.Linear` head computes its gradients in the forward pass, where the
    logits are; any other head (wrapped, quantised) is recomputed chunk by chunk in the backward pass.
    The softmax is taken in fp32 (in fp64 for fp64), whatever autocast does to the matrix products.
    """
    kept = ((weights_n > 0) & (labels_n >= 0)).nonzero().squeeze(1)
    tokens = kept.numel()
    labels, weights = labels_n[kept], weights_n[kept]
    if type(head) is nn.Linear:
        return linear_loss(hidden_nd, head, kept, _CrossEntropy(labels, weights, likeliest), chunk_tokens), tokens
    losses_m = chunked_token_losses(hidden_nd[kept], head, labels, chunk_tokens, likeliest)
    return (losses_m * weights).sum(), tokens


def cross_entropy_of_parts(
    hidden_nd: Tensor, head: nn.Linear, labels_n: Tensor, weights_n: Tensor, sizes: Sequence[int], likeliest_p: Tensor
) -> Tensor:
    """What `chunked_cross_entropy` sums up, for each of the parts that lie end to end, of `sizes` tokens: [P].

    The products run over all of them, and no number of one part reaches another one's sum or gradient. The head is frozen.
    """
    kept = ((weights_n > 0) & (labels_n >= 0)).nonzero().squeeze(1)
    ends = torch.tensor(sizes, device=kept.device).cumsum(0)
    parts_m = torch.searchsorted(ends, kept, right=True)
    of_logits = _CrossEntropy(labels_n[kept], weights_n[kept], likeliest_p, parts_m)
    return linear_loss(hidden_nd, head, kept, of_logits, parts_m=parts_m, num_parts=len(sizes))


def chunked_token_losses(
    hidden_md: Tensor,
    head: nn.Module,
    labels_m: Tensor,
    chunk_tokens: int | None = None,
    likeliest: Tensor | None = None,
) -> Tensor:
    """The loss of each token [M] in nats; the logits of a chunk are computed again for its backward pass.

    `likeliest` as in `chunked_cross_entropy`.
    """
    chunk = chunk_tokens or chunk_tokens_for(getattr(head, "out_features", 32_768))
    parts = []
    for start in range(0, len(labels_m), chunk):
        part = slice(start, start + chunk)
        losses, is_likeliest = checkpoint(
            _head_losses, head, hidden_md[part], labels_m[part], likeliest is not None, use_reentrant=False
        )
        parts.append(losses)
        if likeliest is not None:
            likeliest += is_likeliest.sum()
    return torch.cat(parts) if parts else hidden_md.sum(dim=-1).to(_softmax_dtype(hidden_md))


def token_losses(logits_mv: Tensor, labels_m: Tensor) -> Tensor:
    """The loss of each token [M] in nats, of logits that are there already."""
    return F.cross_entropy(logits_mv.to(_softmax_dtype(logits_mv)), labels_m, reduction="none")


@torch.no_grad()
def labels_likeliest(logits_mv: Tensor, labels_m: Tensor) -> Tensor:
    """Whether the label of each token [M] has the largest logit."""
    return logits_mv.gather(1, labels_m[:, None])[:, 0] >= logits_mv.amax(dim=1)


def _head_losses(
    head: nn.Module,
    hidden_md: Tensor,
    labels_m: Tensor,
    counted: bool,  # noqa: FBT001 - what is checkpointed takes positions only
) -> tuple[Tensor, Tensor | None]:
    logits_mv = head(hidden_md)
    return token_losses(logits_mv, labels_m), labels_likeliest(logits_mv, labels_m) if counted else None


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _CrossEntropy:
    """The weighted cross-entropy of logits; `likeliest` counts labels that are the likeliest, for each part where parts are given."""

    def __init__(
        self, labels_m: Tensor, weights_m: Tensor, likeliest: Tensor | None = None, parts_m: Tensor | None = None
    ) -> None:
        self._labels_m, self._weights_m, self._likeliest, self._parts_m = labels_m, weights_m, likeliest, parts_m

    def __call__(self, part: slice, logits: Tensor, *, with_gradient: bool) -> Tensor:
        labels, scale = self._labels_m[part], self._weights_m[part].to(logits.dtype)
        chosen = logits.gather(1, labels[:, None])
        peak = logits.amax(dim=1, keepdim=True)
        if self._likeliest is not None:
            of_part = None if self._parts_m is None else self._parts_m[part]
            _count(self._likeliest, (chosen >= peak).squeeze(1), of_part)
        partition = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
        losses = (partition.log() + peak - chosen).squeeze(1) * scale
        if with_gradient:
            logits.mul_(scale[:, None] / partition)  # the gradient of the logits, but for the labels' own part
            logits[torch.arange(len(labels), device=logits.device), labels] -= scale
        return losses


class OfLogits(Protocol):
    """A loss that is known chunk by chunk."""

    def __call__(self, part: slice, logits: Tensor, *, with_gradient: bool) -> Tensor:
        """The losses [K] of the places `part` of all M, of their logits [K,V], in whose place the gradient is written if it is wanted."""
        ...


def linear_loss(
    hidden_nd: Tensor,
    head: nn.Linear,
    kept_m: Tensor,
    of_logits: OfLogits,
    chunk_tokens: int | None = None,
    *,
    parts_m: Tensor | None = None,
    num_parts: int | None = None,
) -> Tensor:
    """The sum of a loss over places `kept_m` of the hidden states: a scalar, or one for each of `num_parts`, the part of each place being given.

    Gradients are found in the forward pass, where the logits are. All chunks have their logits in the same memory: blocks of that size,
    freed and asked for again among smaller ones, leave holes that a process grows by.
    """
    chunk = chunk_tokens or chunk_tokens_for(head.out_features)
    total: Tensor = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        hidden_nd, head.weight, head.bias, kept_m, of_logits, chunk, torch.is_grad_enabled(), parts_m, num_parts
    )
    return total


class _LinearLoss(torch.autograd.Function):
    """Σ loss(hidden · Wᵀ + b) with gradients taken while the logits exist: see `linear_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        kept_m: Tensor,
        of_logits: OfLogits,
        chunk: int,
        with_gradient: bool,  # noqa: FBT001 - autograd functions take positions only
        parts_m: Tensor | None,
        num_parts: int | None,
    ) -> Tensor:
        device = hidden_nd.device.type
        accurate = _softmax_dtype(hidden_nd)
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype
        wants_hidden, wants_weight, wants_bias = (with_gradient and wanted for wanted in ctx.needs_input_grad[:3])
        wants_any = wants_hidden or wants_weight or wants_bias
        with torch.autocast(device, enabled=False):
            hidden_md = hidden_nd.index_select(0, kept_m).to(product)
            weight = weight_vd.to(product)
            grad_hidden_md = torch.empty_like(hidden_md) if wants_hidden else None
            grad_weight = torch.zeros_like(weight_vd, dtype=accurate) if wants_weight else None
            grad_bias = torch.zeros_like(bias_v, dtype=accurate) if wants_bias and bias_v is not None else None
            total = hidden_nd.new_zeros(() if num_parts is None else num_parts, dtype=accurate)
            room_kv = hidden_md.new_empty(min(chunk, len(kept_m)), len(weight))
            accurate_kv = room_kv if product == accurate else torch.empty_like(room_kv, dtype=accurate)
            for start in range(0, len(kept_m), chunk):
                part = slice(start, start + chunk)
                hidden = hidden_md[part]
                products, logits = room_kv[: len(hidden)], accurate_kv[: len(hidden)]
                torch.mm(hidden, weight.T, out=products)
                if product != accurate:
                    logits.copy_(products)
                if bias_v is not None:
                    logits += bias_v
                losses = of_logits(part, logits, with_gradient=wants_any)
                _count(total, losses, None if parts_m is None else parts_m[part])
                if not wants_any:
                    continue
                gradient = products if product == accurate else products.copy_(logits)
                if grad_hidden_md is not None:
                    torch.mm(gradient, weight, out=grad_hidden_md[part])
                if grad_weight is not None:
                    if product == accurate:
                        grad_weight.addmm_(gradient.T, hidden)
                    else:
                        grad_weight += gradient.T @ hidden
                if grad_bias is not None:
                    grad_bias += logits.sum(dim=0)
        ctx.save_for_backward(grad_hidden_md, grad_weight, grad_bias, kept_m, parts_m)
        ctx.shape_and_dtypes = (
            hidden_nd.shape,
            hidden_nd.dtype,
            weight_vd.dtype,
            bias_v.dtype if bias_v is not None else None,
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_md, grad_weight, grad_bias, kept_m, parts_m = ctx.saved_tensors
        shape, hidden_dtype, weight_dtype, bias_dtype = ctx.shape_and_dtypes
        grad_hidden = None
        if grad_hidden_md is not None:
            grad_hidden = torch.zeros(shape, dtype=hidden_dtype, device=grad_hidden_md.device)
            of_rows = grad if parts_m is None else grad[parts_m][:, None]
            grad_hidden.index_copy_(0, kept_m, (grad_hidden_md * of_rows).to(hidden_dtype))
        return (
            grad_hidden,
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


def _count(sums: Tensor, values_k: Tensor, parts_k: Tensor | None) -> None:
    """Add values to a scalar, or each to the sum of its part."""
    if parts_k is None:
        sums += values_k.sum()
    else:
        sums.index_add_(0, parts_k, values_k.to(sums.dtype))
