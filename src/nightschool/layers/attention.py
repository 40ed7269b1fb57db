"""Attention over documents that lie end to end in one row, each alone with itself.

Shapes: N tokens of the row, D documents, T length of a document, B documents of a bucket, H heads, G key/value heads,
C channels per head.

Padding wastes the work of every padded position in every layer; laying documents end to end wastes none, if no document
sees another. `lay_out` sorts the documents of a batch by length and cuts them into buckets; inside a bucket one
attention call serves all documents at once. Documents of one length need no padding at all; where lengths differ a
little, the shorter ones are padded on the right inside attention only, which causal attention never looks at. Isolation
is therefore exact: no mask hides the neighbours, they are not there.

The layout travels to every layer as the keyword argument `document_layout` of the model's forward, which all
`transformers` models that use its attention interface hand down. A model that drops it is found by the probe in
`nightschool.layers.forward`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "nightschool_packed"

# What one more attention call costs, in tokens of a short document (measured, fp32, 8 heads of 32: 3 µs a token,
# 0.02 µs a token squared, 100 µs a call with its slices and autograd nodes). On a GPU a call costs kernel launches.
_CALL_COST_TOKENS = {"cpu": 33.0}
_CALL_COST_TOKENS_GPU = 4000.0
_SQUARE_COST = 1 / 150

# On CPUs the fused kernel's backward in bf16 is 4 times slower than plain matrix products at 60 tokens and even at 1024
# (measured: 81 ms against 18 ms for 68 documents of 60 tokens); in fp32 both are equal up to 128 tokens.
_PLAIN_UP_TO_TOKENS = {torch.float32: 0, torch.bfloat16: 1024, torch.float16: 1024}


@dataclass(frozen=True)
class Bucket:
    """Documents that share one attention call: `num_documents` of at most `length` tokens, side by side in the row.

    `gather` [B*T] and `scatter` [tokens] translate between the row and the padded block; None when all are equally long.
    """

    length: int
    num_documents: int
    num_tokens: int
    gather: Tensor | None
    scatter: Tensor | None


@dataclass(frozen=True)
class DocumentLayout:
    """How the documents of one batch are grouped. Made once a batch, used by every layer.

    `order` [N] puts the row's tokens into the order of the buckets and `restore` [N] undoes it; both are None when the
    documents came in that order. The model must be fed tokens in bucket order.
    """

    buckets: tuple[Bucket, ...]
    num_tokens: int
    order: Tensor | None
    restore: Tensor | None

    @property
    def bucket_sizes(self) -> list[int]:
        return [bucket.num_tokens for bucket in self.buckets]


def lay_out(cu_seqlens: Tensor | Sequence[int], device: torch.device | str = "cpu") -> DocumentLayout:
    """Group the documents whose boundaries are `cu_seqlens` [D+1] (0, end of the first, …, N).

    Raises:
        ValueError: If the boundaries do not rise from 0.
    """
    device = torch.device(device)
    bounds = np.asarray(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens, dtype=np.int64)
    lengths = np.diff(bounds)
    if len(bounds) < 2 or bounds[0] != 0 or (lengths <= 0).any():
        raise ValueError(f"document boundaries rise from 0, and these do not: {bounds.tolist()[:8]}")
    documents = np.argsort(lengths, kind="stable")
    order = restore = None
    if (documents != np.arange(len(documents))).any():
        order_n = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in documents])
        restore_n = np.empty_like(order_n)
        restore_n[order_n] = np.arange(len(order_n))
        order, restore = torch.from_numpy(order_n).to(device), torch.from_numpy(restore_n).to(device)
    call_cost = _CALL_COST_TOKENS.get(device.type, _CALL_COST_TOKENS_GPU)
    buckets = tuple(_bucket(group, device) for group in _group(lengths[documents], call_cost))
    return DocumentLayout(buckets, int(bounds[-1]), order, restore)


def side_by_side(layouts: Sequence[DocumentLayout]) -> DocumentLayout:
    """The layout of several batches end to end, each grouped as it is alone: no bucket holds documents of two."""
    starts = list(itertools.accumulate((layout.num_tokens for layout in layouts), initial=0))
    order = restore = None
    if any(layout.order is not None for layout in layouts):
        order, restore = (
            torch.cat(
                [
                    start + (torch.arange(layout.num_tokens) if places is None else places)
                    for start, layout, places in zip(starts, layouts, of_each, strict=False)
                ]
            )
            for of_each in ([layout.order for layout in layouts], [layout.restore for layout in layouts])
        )
    buckets = tuple(bucket for layout in layouts for bucket in layout.buckets)
    return DocumentLayout(buckets, starts[-1], order, restore)


def _group(lengths: np.ndarray, call_cost: float) -> list[np.ndarray]:
    """Cut ascending `lengths` [D] into runs so that calls and padding together cost least (exact, over run ends)."""
    values, counts = np.unique(lengths, return_counts=True)
    document_cost = values + _SQUARE_COST * values.astype(np.float64) ** 2
    documents_before = np.concatenate([[0], np.cumsum(counts)])
    best, cut = np.zeros(len(values) + 1), np.zeros(len(values) + 1, dtype=np.int64)
    for end in range(1, len(values) + 1):
        runs = best[:end] + call_cost + (documents_before[end] - documents_before[:end]) * document_cost[end - 1]
        cut[end] = int(runs.argmin())
        best[end] = runs[cut[end]]
    ends = [len(values)]
    while ends[-1] > 0:
        ends.append(int(cut[ends[-1]]))
    ends.reverse()
    return [lengths[documents_before[a] : documents_before[b]] for a, b in itertools.pairwise(ends)]


def _bucket(lengths: np.ndarray, device: torch.device) -> Bucket:
    length, count, tokens = int(lengths[-1]), len(lengths), int(lengths.sum())
    if int(lengths[0]) == length:
        return Bucket(length, count, tokens, None, None)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    place = np.arange(length)
    # A padded place repeats the document's own last token, so that not even a NaN of a neighbour can reach it.
    gather = (starts[:, None] + np.minimum(place[None, :], lengths[:, None] - 1)).reshape(-1)
    scatter = np.flatnonzero((place[None, :] < lengths[:, None]).reshape(-1))
    return Bucket(length, count, tokens, torch.from_numpy(gather).to(device), torch.from_numpy(scatter).to(device))


class _Pad(torch.autograd.Function):
    """Rows of a bucket → its padded block. Padded places carry no gradient, so backward is a plain selection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scatter,) = ctx.saved_tensors
        return grad.index_select(0, scatter), None, None


def _plain_attention(
    q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor, mask_tt: Tensor, scale: float, dropout: float
) -> Tensor:
    """softmax(QKᵀ·scale + mask)V by matrix products that hold the T×T weights. → [B,H,T,C]."""
    B, H, T, C = q_bhtc.shape  # noqa: N806 - the legend's letters
    repeat = H // k_bgtc.shape[1]
    if repeat > 1:
        k_bgtc, v_bgtc = k_bgtc.repeat_interleave(repeat, dim=1), v_bgtc.repeat_interleave(repeat, dim=1)
    q, k, v = (x.reshape(B * H, T, C) for x in (q_bhtc, k_bgtc, v_bgtc))
    weights = torch.baddbmm(mask_tt, q, k.transpose(1, 2), alpha=scale).softmax(-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v).view(B, H, T, C)


@lru_cache(maxsize=64)
def _additive_mask(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T,T]: 0 where a position may look (itself and at most `window - 1` before it), -inf elsewhere."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))


def _bucket_attention(
    q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, *, window: int | None, scale: float, dropout: float
) -> Tensor:
    """Attention of one bucket: q [tokens,H,C], k and v [tokens,G,C] → [tokens,H,C]."""
    if bucket.gather is not None and bucket.scatter is not None:
        q, k, v = (_Pad.apply(x, bucket.gather, bucket.scatter) for x in (q, k, v))  # type: ignore[no-untyped-call]
    q, k, v = (x.view(bucket.num_documents, bucket.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    if window is not None and window >= bucket.length:
        window = None
    if q.device.type == "cpu" and bucket.length <= _PLAIN_UP_TO_TOKENS.get(q.dtype, 0):
        out = _plain_attention(q, k, v, _additive_mask(bucket.length, window, q.dtype, q.device), scale, dropout)
    else:
        mask = None if window is None else _additive_mask(bucket.length, window, q.dtype, q.device)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if bucket.scatter is None else out.index_select(0, bucket.scatter)


# Compiled, every layout would be a new graph: the sizes of its buckets are constants (measured: 5 to 45 s a batch).
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_layout: DocumentLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that models call: query [1,H,N,C], key and value [1,G,N,C] → ([1,N,H,C], None).

    Without `document_layout` this is the `sdpa` attention of transformers.

    Raises:
        ValueError: If the model asks for something that this attention does not compute (soft-capped scores, sinks,
            position biases), because ignoring it would change the model.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"packed attention does not compute {', '.join(unknown)}")
    if document_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or query.shape[2] != document_layout.num_tokens:
        raise ValueError(f"the layout is for [1, {document_layout.num_tokens}] tokens, not {list(query.shape[:3:2])}")
    if torch.is_autocast_enabled(query.device.type):
        # The norms and rotations of most models leave queries in fp32 and values in bf16; one dtype for all.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sizes = document_layout.bucket_sizes
    # split, not slices: its backward is one concatenation, where each slice would fill a whole row with zeros.
    rows = zip(*(torch.split(x[0].transpose(0, 1), sizes) for x in (query, key, value)), strict=True)
    with torch.autocast(query.device.type, enabled=False):
        outs = [
            _bucket_attention(q, k, v, bucket, window=sliding_window, scale=scale, dropout=dropout)
            for (q, k, v), bucket in zip(rows, document_layout.buckets, strict=True)
        ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).unsqueeze(0), None


def packed_arguments(layout: DocumentLayout, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """The keyword arguments for a model's forward over `input_ids` and `position_ids` [1,N].

    Tokens are put into the order of the buckets; `layout.restore` brings hidden states back into the order of the row.
    """
    if layout.order is not None:
        input_ids, position_ids = input_ids.index_select(1, layout.order), position_ids.index_select(1, layout.order)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        # Four dimensions make transformers hand the mask down as it is; given None it would see the positions restart
        # and build an N×N mask that nobody reads.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        "use_cache": False,
        "document_layout": layout,
    }


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
