"""From a batch of documents to hidden states and loss, for any causal language model of transformers.

Shapes: N tokens of the row, D documents, T the longest, V vocabulary.

`prepare` looks at a model once, with numbers instead of a list of names: does a document keep to itself when it is packed
with another, and do the last hidden states times the output head equal the model's own logits? What it finds decides how
`document_loss` and `forward_hidden` run. A model that leaks is padded; a model that caps or scales its logits is asked
for its own logits. The loss is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from nightschool.errors import ModelError
from nightschool.layers.attention import PACKED_ATTENTION, DocumentLayout, lay_out, packed_arguments, side_by_side
from nightschool.layers.loss import (
    chunked_cross_entropy,
    chunked_token_losses,
    cross_entropy_of_parts,
    labels_likeliest,
    token_losses,
)

# Of each document of the probe: what a convolution over 4 tokens reaches, and what lies beyond a window.
_BEGIN_TOKENS = 3
_END_TOKENS = 7


class Documents(Protocol):
    """What a batch must have: documents end to end in one row. `nightschool.data.batches.Batch` is one."""

    @property
    def input_ids(self) -> Tensor: ...  # [1,N] int64
    @property
    def position_ids(self) -> Tensor: ...  # [1,N], restarting at 0 with each document
    @property
    def labels(self) -> Tensor: ...  # [1,N], the id to be predicted AT each position, or -100
    @property
    def weights(self) -> Tensor: ...  # [1,N] float
    @property
    def cu_seqlens(self) -> Tensor: ...  # [D+1]


@dataclass(frozen=True)
class ForwardPath:
    """How this model is run. `why_*` is empty, or says in words why the faster way is not taken."""

    packed: bool
    fused_head: bool
    why_padded: str = ""
    why_own_logits: str = ""


@dataclass(frozen=True)
class PaddedDocuments:
    """The same documents, one a row, padded on the right: all [D,T] and on the batch's device."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    weights: Tensor


def prepare(model: nn.Module) -> ForwardPath:
    """Probe `model` (bare or wrapped by PEFT) and set its attention accordingly. Takes two tiny forward passes a question.

    Numbers must agree within 1e-4 of the largest in fp32, 5e-2 in 16-bit parameters.
    """
    packed, why_padded = supports_packing(model)
    causal_lm(model).set_attn_implementation(PACKED_ATTENTION if packed else _unpacked(model))
    fused, why_own = _head_is_everything(model)
    return ForwardPath(packed=packed, fused_head=fused, why_padded=why_padded, why_own_logits=why_own)


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the input of each layer; the backward pass computes the rest again, dropout included.

    Raises:
        ModelError: If the architecture cannot.
    """
    inner = causal_lm(model)
    if not inner.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(inner).__name__} cannot recompute activations. Write train.gradient_checkpointing=false."
        )
    # transformers renamed the method in 5.22, and warns of the old name.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, adapters included; a bare model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def document_loss(
    model: nn.Module,
    path: ForwardPath,
    batch: Documents,
    chunk_tokens: int | None = None,
    *,
    likeliest: Tensor | None = None,
) -> tuple[Tensor, int]:
    """The weighted loss summed over the batch, in nats, and the number of tokens that carry loss.

    To the scalar `likeliest` the number of those tokens is added whose label has the largest logit. The model and the batch are on one device. Gradients flow into whatever requires them.
    """
    labels, weights = batch.labels[0], batch.weights[0]
    if not path.fused_head:
        return _loss_of_own_logits(model, path, batch, likeliest)
    if not path.packed:
        hidden, head = forward_hidden(model, path, batch)
        return chunked_cross_entropy(hidden, head, labels, weights, chunk_tokens, likeliest)
    layout = lay_out(batch.cu_seqlens, batch.input_ids.device)
    hidden = backbone(model)(**packed_arguments(layout, batch.input_ids, batch.position_ids)).last_hidden_state[0]
    return loss_of_hidden(model, hidden, layout, batch, chunk_tokens, likeliest=likeliest)


def loss_of_hidden(
    model: nn.Module,
    hidden_nd: Tensor,
    layout: DocumentLayout,
    batch: Documents,
    chunk_tokens: int | None = None,
    *,
    likeliest: Tensor | None = None,
) -> tuple[Tensor, int]:
    """As `document_loss`, from the last hidden states in the order of the layout, where the head is everything."""
    labels, weights = batch.labels[0], batch.weights[0]
    if layout.order is not None:  # cheaper than restoring the order of the hidden states, and the sum is the same
        labels, weights = labels.index_select(0, layout.order), weights.index_select(0, layout.order)
    return chunked_cross_entropy(hidden_nd, output_head(model), labels, weights, chunk_tokens, likeliest)


def losses_of_batches(
    model: nn.Module,
    batches: Sequence[Documents],
    likeliest: Sequence[Tensor],
    at_head: AbstractContextManager[None] | None = None,
) -> Tensor:
    """What `document_loss` says of each batch, one number for each [P], from one pass over all of them.

    `likeliest` has the counter of each batch; products with the head are computed within `at_head`.

    For a path that is packed, and a plain frozen head that is everything. No number of one batch reaches another one, not even a NaN, as
    long as no layer of the model mixes tokens but by attention; tokens run in the order of the batches, each in its own order.
    """
    device = batches[0].input_ids.device
    layouts = [lay_out(batch.cu_seqlens, device) for batch in batches]
    whole = side_by_side(layouts)
    input_ids, position_ids = (
        torch.cat(rows, dim=1)
        for rows in ([batch.input_ids for batch in batches], [batch.position_ids for batch in batches])
    )
    hidden = backbone(model)(**packed_arguments(whole, input_ids, position_ids)).last_hidden_state[0]
    labels, weights = (
        torch.cat(rows) for rows in ([batch.labels[0] for batch in batches], [batch.weights[0] for batch in batches])
    )
    if whole.order is not None:
        labels, weights = labels.index_select(0, whole.order), weights.index_select(0, whole.order)
    counted = torch.zeros(len(batches), dtype=torch.int64, device=device)
    sizes = [layout.num_tokens for layout in layouts]
    with at_head or nullcontext():
        losses = cross_entropy_of_parts(hidden, cast(nn.Linear, output_head(model)), labels, weights, sizes, counted)
    for counter, number in zip(likeliest, counted, strict=True):
        counter += number
    return losses


def has_plain_head(model: nn.Module) -> bool:
    """Whether the output head is a linear layer with nothing around it."""
    return type(output_head(model)) is nn.Linear


@torch.no_grad()
def draws_at_random(model: nn.Module) -> bool:
    """Whether a packed model that is on a CPU draws random numbers while it trains, as dropout does."""
    inner = causal_lm(model)
    documents = _random_documents(inner, (9,))
    layout = lay_out(documents.cu_seqlens, documents.input_ids.device)
    training, before = model.training, torch.get_rng_state()
    model.train()
    try:
        backbone(model)(**packed_arguments(layout, documents.input_ids, documents.position_ids))
        return not torch.equal(before, torch.get_rng_state())
    finally:
        model.train(training)
        torch.set_rng_state(before)


def document_log_probs(
    model: nn.Module, path: ForwardPath, batch: Documents, chunk_tokens: int | None = None
) -> Tensor:
    """The log-likelihood [D] in nats of what carries loss in each document, weighted; gradients flow into the model."""
    kept = trained_places(batch)
    labels, weights = batch.labels[0][kept], batch.weights[0][kept]
    if path.fused_head:
        hidden, head = forward_hidden(model, path, batch)
        losses_m = chunked_token_losses(hidden[kept], head, labels, chunk_tokens)
    else:
        losses_m = token_losses(own_logits(model, path, batch, kept), labels)
    ends = batch.cu_seqlens[1:].to(kept.device)
    documents_m = torch.searchsorted(ends, kept, right=True)
    return losses_m.new_zeros(len(ends)).index_add(0, documents_m, -losses_m * weights)


def forward_hidden(model: nn.Module, path: ForwardPath, batch: Documents) -> tuple[Tensor, nn.Module]:
    """Last hidden states [N, hidden size] in the order of the batch, and the output head.

    `head(hidden)` equals the model's logits only where `path.fused_head` says so.
    """
    if path.packed:
        layout = lay_out(batch.cu_seqlens, batch.input_ids.device)
        hidden = backbone(model)(**packed_arguments(layout, batch.input_ids, batch.position_ids)).last_hidden_state[0]
        return _restored(hidden, layout), output_head(model)
    padded = pad_documents(batch)
    hidden = backbone(model)(**_padded_arguments(padded)).last_hidden_state
    return hidden[padded.attention_mask.bool()], output_head(model)


def document_logits(model: nn.Module, path: ForwardPath, batch: Documents) -> Tensor:
    """The model's own logits [N,V] in the order of the batch, all of them at once: for small batches."""
    if path.packed:
        layout = lay_out(batch.cu_seqlens, batch.input_ids.device)
        logits = causal_lm(model)(**packed_arguments(layout, batch.input_ids, batch.position_ids)).logits[0]
        return _restored(logits, layout)
    padded = pad_documents(batch)
    return cast(Tensor, causal_lm(model)(**_padded_arguments(padded)).logits[padded.attention_mask.bool()])


def pad_documents(batch: Documents, pad_id: int = 0) -> PaddedDocuments:
    """One document a row, for models that cannot keep packed documents apart."""
    bounds = batch.cu_seqlens.tolist()
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    place = torch.arange(longest, device=batch.input_ids.device)

    def rows(values_n: Tensor, fill: float) -> Tensor:
        out = values_n.new_full((len(bounds) - 1, longest), fill)
        for row, (start, end) in enumerate(itertools.pairwise(bounds)):
            out[row, : end - start] = values_n[start:end]
        return out

    lengths = torch.tensor([end - start for start, end in itertools.pairwise(bounds)], device=place.device)
    return PaddedDocuments(
        input_ids=rows(batch.input_ids[0], pad_id),
        attention_mask=(place[None, :] < lengths[:, None]).long(),
        position_ids=place.expand(len(lengths), -1),
        labels=rows(batch.labels[0], -100),
        weights=rows(batch.weights[0], 0.0),
    )


def supports_packing(model: nn.Module) -> tuple[bool, str]:
    """Whether packed documents get the logits that each gets alone, and if not, why not.

    Alone means one document a row under the model's own attention, so that a model whose attention does something that
    ours does not (soft caps, sinks, biases) is found as well as one whose state runs on (recurrent and convolutional
    layers) or one that counts positions by itself.
    """
    inner = causal_lm(model)
    if getattr(inner.config.get_text_config(), "attention_chunk_size", None):
        return False, f"{type(inner).__name__} attends in chunks, which packed attention does not compute"
    before = inner.config._attn_implementation
    # A window shorter than this is looked at from both sides; longer ones are handed to attention in the same way.
    window = getattr(inner.config.get_text_config(), "sliding_window", None) or 0
    longest = window + 11 if window <= 128 else 11
    lengths = (longest, 7, longest)
    documents = _random_documents(inner, lengths)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inner.set_attn_implementation(_unpacked(model))
            bounds = documents.cu_seqlens.tolist()
            alone = torch.cat(
                [
                    inner(input_ids=documents.input_ids[:, a:b], use_cache=False).logits[0]
                    for a, b in itertools.pairwise(bounds)
                ]
            )
            inner.set_attn_implementation(PACKED_ATTENTION)
            if inner.config._attn_implementation != PACKED_ATTENTION:
                return False, f"{type(inner).__name__} does not let its attention be replaced"
            layout = lay_out(documents.cu_seqlens, documents.input_ids.device)
            packed = inner(**packed_arguments(layout, documents.input_ids, documents.position_ids)).logits[0]
            difference = _difference_of_documents(inner, _restored(packed, layout), alone, lengths)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        return False, f"{type(inner).__name__} does not run on packed documents: {error}"
    finally:
        inner.set_attn_implementation(before)
        model.train(training)
    if not difference <= _tolerance(inner):
        return (
            False,
            f"the logits of packed documents of {type(inner).__name__} differ by {difference:.1e} from those of each alone",
        )
    return True, ""


def _head_is_everything(model: nn.Module) -> tuple[bool, str]:
    """Whether head(last hidden state) equals the model's own logits, and if not, why not."""
    inner = causal_lm(model)
    documents = _random_documents(inner, (9,))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = inner(input_ids=documents.input_ids, use_cache=False).logits[0]
            hidden = backbone(model)(input_ids=documents.input_ids, use_cache=False).last_hidden_state[0]
            difference = _relative_difference(output_head(model)(hidden), logits)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return False, f"{type(inner).__name__} has no head that can be taken apart: {error}"
    finally:
        model.train(training)
    if not difference <= _tolerance(inner):
        return (
            False,
            f"{type(inner).__name__} changes its logits after the output head (they differ by {difference:.1e})",
        )
    return True, ""


def _loss_of_own_logits(
    model: nn.Module, path: ForwardPath, batch: Documents, likeliest: Tensor | None
) -> tuple[Tensor, int]:
    """Loss over the model's own logits, at once for all trained positions."""
    kept = trained_places(batch)
    logits_mv, labels_m = own_logits(model, path, batch, kept), batch.labels[0][kept]
    losses_m = token_losses(logits_mv, labels_m)
    if likeliest is not None:
        likeliest += labels_likeliest(logits_mv, labels_m).sum()
    return (losses_m * batch.weights[0][kept]).sum(), kept.numel()


def trained_places(batch: Documents) -> Tensor:
    """The places of the row [M] that carry loss."""
    return ((batch.weights[0] > 0) & (batch.labels[0] >= 0)).nonzero().squeeze(1)


def own_logits(model: nn.Module, path: ForwardPath, batch: Documents, kept: Tensor) -> Tensor:
    """The model's own logits [M,V] at some places of the row."""
    if not path.packed:
        return document_logits(model, path, batch)[kept]
    layout = lay_out(batch.cu_seqlens, batch.input_ids.device)
    places = kept if layout.restore is None else layout.restore[kept]
    arguments = packed_arguments(layout, batch.input_ids, batch.position_ids)
    return cast(Tensor, causal_lm(model)(**arguments, logits_to_keep=places).logits[0])


def _restored(rows_n: Tensor, layout: DocumentLayout) -> Tensor:
    return rows_n if layout.restore is None else rows_n.index_select(0, layout.restore)


def _padded_arguments(padded: PaddedDocuments) -> dict[str, Any]:
    return {
        "input_ids": padded.input_ids,
        "attention_mask": padded.attention_mask,
        "position_ids": padded.position_ids,
        "use_cache": False,
    }


def backbone(model: nn.Module) -> Any:
    """The transformers model below the head, adapters included."""
    inner = causal_lm(model)
    return getattr(inner, inner.base_model_prefix)


def output_head(model: nn.Module) -> nn.Module:
    """The output head."""
    head = causal_lm(model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise AttributeError("get_output_embeddings() returns no module")
    return head


def _unpacked(model: nn.Module) -> str:
    """The attention that transformers itself would choose."""
    inner = causal_lm(model)
    return "sdpa" if getattr(inner, "_supports_sdpa", False) else "eager"


@dataclass(frozen=True)
class _Probe:
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    weights: Tensor
    cu_seqlens: Tensor


def _random_documents(inner: Any, lengths: Sequence[int]) -> _Probe:
    generator = torch.Generator().manual_seed(0)
    device = inner.get_input_embeddings().weight.device
    ids = torch.randint(0, inner.get_input_embeddings().weight.shape[0], (1, sum(lengths)), generator=generator).to(
        device
    )
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return _Probe(ids, positions, torch.full_like(ids, -100), torch.zeros(ids.shape, device=device), bounds)


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6))


def _difference_of_documents(inner: Any, a_nv: Tensor, b_nv: Tensor, lengths: Sequence[int]) -> float:
    """The largest difference of a token; in 16 bits that of a whole beginning or end of a document.

    Rounding sends single tokens of a mixture to other experts, which is no leak (measured: 6e-2 of the largest logit for
    one token, and 5e-3 for the median). A neighbour leaks into the first tokens (measured: a median of 8e-2 for linear
    attention behind a convolution); positions counted anew and windows forgotten change the last ones.
    """
    if _tolerance(inner) < 1e-3:
        return _relative_difference(a_nv, b_nv)
    tokens_n = (a_nv.float() - b_nv.float()).abs().amax(dim=-1)
    documents = torch.split(tokens_n, list(lengths))
    parts = [part.median() for one in documents for part in (one[:_BEGIN_TOKENS], one[-_END_TOKENS:])]
    return float(torch.stack(parts).max() / b_nv.float().abs().max().clamp_min(1e-6))


def _tolerance(inner: Any) -> float:
    # Layers of 8 bits round what comes in, as 16-bit formats do, and those of 4 bits have a format of their own to compute in.
    rounds = any(parameter.dtype == torch.int8 for parameter in inner.parameters()) or any(
        getattr(layer, "compute_dtype", torch.float32) in (torch.bfloat16, torch.float16) for layer in inner.modules()
    )
    return 1e-4 if not rounds and inner.get_input_embeddings().weight.dtype in (torch.float32, torch.float64) else 5e-2
