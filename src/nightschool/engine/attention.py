"""Attention over rows of a cache: tokens of many requests lie end to end, and each looks only at its own row.

Shapes: T tokens of a step, of which the first N are one each of N answering rows; H heads, G key/value heads, C channels;
R rows and P places of the cache, L places that are looked at.

One forward pass of the model serves all: its linear layers see T tokens, and this attention sends each token to its row.
What a step needs travels to every layer as the keyword argument `row_step`, which all `transformers` models that use
its attention interface hand down. A model that drops it is found out when the engine starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name under which everybody knows it
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nightschool.engine.cache import LayerShape, RowCache
from nightschool.engine.scheduler import Span

ROW_ATTENTION = "nightschool_rows"


@dataclass
class RowStep:
    """Where the tokens of one step belong. Made once a step, used by every layer.

    With `cache` None nothing is kept: the shapes of the layers are noted in `shapes`, and the step is one prompt.
    """

    cache: RowCache | None
    decode: Sequence[Span] = ()
    prefill: Sequence[Span] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [span.row for span in self.decode]
        self.first_row = rows[0] if rows else 0
        self.end_row = rows[-1] + 1 if rows else 0
        self.lengths = [span.start + 1 for span in self.decode]
        self.longest = max(self.lengths, default=0)
        self.gathered: Tensor | None = None
        if len(rows) != self.end_row - self.first_row:
            self.gathered = torch.tensor(rows, device=self.device) - self.first_row
        self._write: dict[int, Tensor] = {}
        self._decode_masks: dict[int | None, Tensor | None] = {}
        self._prefill_masks: dict[tuple[int, int, int | None], Tensor] = {}

    def write_index(self, num_heads: int) -> Tensor:
        """[T*G]: where in the cache, seen as [R*G*P, C], the heads of each token go."""
        index = self._write.get(num_heads)
        if index is None:
            assert self.cache is not None
            row_places = self.cache.places * num_heads
            firsts = [span.row * row_places + span.start for span in self.decode]
            for span in self.prefill:
                first = span.row * row_places + span.start
                firsts.extend(range(first, first + span.length))
            heads = torch.arange(0, row_places, self.cache.places, device=self.device)
            index = (torch.tensor(firsts, device=self.device)[:, None] + heads).view(-1)
            self._write[num_heads] = index
        return index

    def decode_mask(self, window: int | None) -> Tensor | None:
        """[rows,1,1,L] to be added to the scores, or None where all rows look at all L places."""
        if window not in self._decode_masks:
            self._decode_masks[window] = self._make_decode_mask(window)
        return self._decode_masks[window]

    def first_place(self, window: int | None) -> int:
        """The first place that any answering row looks at."""
        return 0 if window is None else max(0, min(self.lengths) - window)

    def _make_decode_mask(self, window: int | None) -> Tensor | None:
        begin = self.first_place(window)
        if min(self.lengths) == self.longest and self.gathered is None:
            return None  # equally long rows see the same places, windowed or not
        lengths = [0] * (self.end_row - self.first_row)
        for span, length in zip(self.decode, self.lengths, strict=True):
            lengths[span.row - self.first_row] = length
        ends = torch.tensor([max(length, begin + 1) for length in lengths], device=self.device)[:, None]
        places = torch.arange(begin, self.longest, device=self.device)
        hidden = places >= ends
        if window is not None:
            hidden |= places < ends - window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def prefill_mask(self, start: int, length: int, window: int | None) -> Tensor:
        """[1,1,length,L] for a chunk that begins at `start`: a place looks at itself and at those before it."""
        key = (start, length, window)
        mask = self._prefill_masks.get(key)
        if mask is None:
            distance = torch.arange(start, start + length, device=self.device)[:, None] - torch.arange(
                start + length, device=self.device
            )
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            mask = self._prefill_masks[key] = mask.masked_fill_(hidden, float("-inf"))[None, None]
        return mask


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_step: RowStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that models call: query [1,H,T,C], key and value [1,G,T,C] → ([1,T,H,C], None).

    Without `row_step` this is the `sdpa` attention of transformers.

    Raises:
        ValueError: If the model asks for something that this attention does not compute (soft-capped scores, sinks,
            position biases), because ignoring it would change the answers.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"row attention does not compute {', '.join(unknown)}")
    if row_step is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if row_step.cache is None:
        row_step.shapes[layer] = LayerShape(layer, key.shape[1], key.shape[-1], value.shape[-1])
        return _prompt(query, key, value, row_step, 0, sliding_window, scale).transpose(0, 1)[None], None
    keys, values = row_step.cache.layer(layer)
    index = row_step.write_index(key.shape[1])
    keys.view(-1, keys.shape[-1]).index_copy_(0, index, key.transpose(1, 2).reshape(-1, key.shape[-1]))
    values.view(-1, values.shape[-1]).index_copy_(0, index, value.transpose(1, 2).reshape(-1, value.shape[-1]))
    count = len(row_step.decode)
    outs = []
    if count:
        outs.append(_answering(query[0, :, :count].transpose(0, 1), keys, values, row_step, sliding_window, scale))
    for span in row_step.prefill:
        here, end = slice(count, count + span.length), span.start + span.length
        if span.start == 0:
            out = _prompt(query[:, :, here], key[:, :, here], value[:, :, here], row_step, 0, sliding_window, scale)
        else:
            row_keys, row_values = keys[span.row, None, :, :end], values[span.row, None, :, :end]
            out = _prompt(query[:, :, here], row_keys, row_values, row_step, span.start, sliding_window, scale)
        outs.append(out.transpose(0, 1))
        count += span.length
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None


def _answering(
    q_nhc: Tensor, k_rgpc: Tensor, v_rgpc: Tensor, step: RowStep, window: int | None, scale: float
) -> Tensor:
    """One token each of the answering rows → [N,H,C]. The heads that share keys lie side by side as if they were tokens."""
    heads, groups = q_nhc.shape[1], k_rgpc.shape[1]
    rows = slice(step.first_row, step.end_row)
    places = slice(step.first_place(window), step.longest)
    q = q_nhc.reshape(q_nhc.shape[0], groups, heads // groups, q_nhc.shape[2])
    if step.gathered is not None:
        q = q.new_zeros(step.end_row - step.first_row, *q.shape[1:]).index_copy_(0, step.gathered, q)
    out = F.scaled_dot_product_attention(
        q, k_rgpc[rows, :, places], v_rgpc[rows, :, places], step.decode_mask(window), scale=scale
    )
    if step.gathered is not None:
        out = out.index_select(0, step.gathered)
    return out.reshape(out.shape[0], heads, out.shape[3])


def _prompt(
    query: Tensor, key: Tensor, value: Tensor, step: RowStep, start: int, window: int | None, scale: float
) -> Tensor:
    """A chunk of one prompt over its row: query [1,H,T,C], key and value [1,G,L,C] → [H,T,C]."""
    heads, length = query.shape[1:3]
    groups, end = key.shape[1:3]
    # Heads that share keys become heads of one batch entry over the same memory, so that keys are never repeated.
    q = query[0].reshape(groups, heads // groups, length, query.shape[3])
    k = key[0][:, None].expand(-1, heads // groups, -1, -1)
    v = value[0][:, None].expand(-1, heads // groups, -1, -1)
    if start == 0 and (window is None or window >= end):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, step.prefill_mask(start, length, window), scale=scale)
    return out.reshape(heads, length, value.shape[3])


AttentionInterface.register(ROW_ATTENTION, row_attention)
