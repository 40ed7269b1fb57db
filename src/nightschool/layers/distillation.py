"""Learning a distribution in place of words: how far a model is from what a teacher gave the likeliest tokens.

Shapes: M places of which something is learned, T of them from a teacher, K likeliest tokens of the teacher at each, V vocabulary, D hidden size.

All that the teacher gives the other V − K tokens is one event, so that both distributions sum up to 1 and the divergence is 0 only
where they agree on the K tokens and on the rest. It is never more than the divergence of the whole distributions, by the inequality of
log sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nightschool.layers.forward import Documents, ForwardPath, forward_hidden, own_logits, trained_places
from nightschool.layers.loss import chunk_tokens_for, labels_likeliest, linear_loss, token_losses

# Below it a probability counts as this one, so that no logarithm is infinite.
_LEAST = 1e-6


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of a teacher at each place, the likeliest first: ids [M,K] int64, log-probabilities [M,K] fp32."""

    ids: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, logits_mv: Tensor, count: int) -> TopTokens:
        """Of logits [M,V]; fewer than `count` where the vocabulary is smaller."""
        log_probs, ids = logits_mv.float().log_softmax(-1).topk(min(count, logits_mv.shape[-1]))
        return cls(ids, log_probs)

    def to(self, device: torch.device) -> TopTokens:
        return TopTokens(self.ids.to(device), self.log_probs.to(device))


def document_divergence(model: nn.Module, path: ForwardPath, batch: Documents, teacher: TopTokens) -> Tensor:
    """KL(teacher ‖ model) in nats, summed over the places of a batch that carry loss; gradients flow into the model.

    `teacher` has what follows at each of these places, in their order.
    """
    kept = trained_places(batch)
    if not path.fused_head:
        return divergence(own_logits(model, path, batch, kept), teacher)
    hidden, head = forward_hidden(model, path, batch)
    if type(head) is nn.Linear:
        return linear_loss(hidden, head, kept, _Divergence(teacher))
    hidden_md = hidden[kept]
    chunk = chunk_tokens_for(getattr(head, "out_features", 32_768))
    total = hidden_md.new_zeros((), dtype=torch.float32)
    for start in range(0, len(kept), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(
            _of_hidden, head, hidden_md[part], teacher.ids[part], teacher.log_probs[part], use_reentrant=False
        )
    return total


def divergences(logits_mv: Tensor, teacher: TopTokens) -> Tensor:
    """KL(teacher ‖ model) [M] in nats at each place, of the model's logits."""
    return _divergences(logits_mv.float().log_softmax(-1).gather(1, teacher.ids), teacher.log_probs)


def taught_loss(
    model: nn.Module, path: ForwardPath, batch: Documents, places_t: Tensor, teacher: TopTokens
) -> tuple[Tensor, Tensor]:
    """The weighted loss summed over a batch in nats, of which a teacher teaches some places, and [M] whether each has its likeliest token.

    At these places the divergence from the teacher stands in place of the loss of the word, and what is meant to be likeliest is the
    teacher's likeliest token in place of it. Gradients flow into the model.

    Args:
        model: Bare or with adapters.
        path: How it is run.
        batch: On the model's device.
        places_t: Places of the row, ascending, that carry loss.
        teacher: What follows at each of them.
    """
    kept_m = trained_places(batch)
    at_t = torch.searchsorted(kept_m, places_t)
    labels_m = batch.labels[0][kept_m].index_copy(0, at_t, teacher.ids[:, 0])
    weights_m = batch.weights[0][kept_m]
    if not path.fused_head:
        losses_m, likeliest_m = _losses(own_logits(model, path, batch, kept_m), labels_m, at_t, teacher)
        return (losses_m * weights_m).sum(), likeliest_m
    hidden, head = forward_hidden(model, path, batch)
    hidden_md = hidden[kept_m]
    chunk = chunk_tokens_for(getattr(head, "out_features", 32_768))
    parts = []
    for start in range(0, len(kept_m), chunk):
        part = slice(start, start + chunk)
        mine_t = (at_t >= start) & (at_t < start + chunk)
        parts.append(
            checkpoint(
                _losses_of_hidden, head, hidden_md[part], labels_m[part], at_t[mine_t] - start, teacher.ids[mine_t],
                teacher.log_probs[mine_t], use_reentrant=False,
            )
        )  # fmt: skip
    losses_m, likeliest_m = (torch.cat(one) for one in zip(*parts, strict=True))
    return (losses_m * weights_m).sum(), likeliest_m


def divergence(logits_mv: Tensor, teacher: TopTokens) -> Tensor:
    """KL(teacher ‖ model) in nats, summed over the places, of the model's logits."""
    return divergences(logits_mv, teacher).sum()


class _Divergence:
    """KL(teacher ‖ model), as `divergence`, of logits that come chunk by chunk.

    It depends on the model's K log-probabilities alone: where g_k is the slope in each, that in a logit z_j is g_j − q_j · Σ g_k.
    """

    def __init__(self, teacher: TopTokens) -> None:
        self._teacher = teacher

    def __call__(self, part: slice, logits: Tensor, *, with_gradient: bool) -> Tensor:
        ids_mk, log_p_mk = self._teacher.ids[part], self._teacher.log_probs[part]
        chosen_mk, peak_m1 = logits.gather(1, ids_mk), logits.amax(dim=1, keepdim=True)
        partition_m1 = logits.sub_(peak_m1).exp_().sum(dim=1, keepdim=True)
        log_q_mk = chosen_mk - peak_m1 - partition_m1.log()
        if with_gradient:
            slopes_mk = _slopes(log_q_mk.exp(), log_p_mk.exp())
            logits.mul_(-slopes_mk.sum(dim=1, keepdim=True) / partition_m1).scatter_add_(1, ids_mk, slopes_mk)
        return _divergences(log_q_mk, log_p_mk)


def _divergences(log_q_mk: Tensor, log_p_mk: Tensor) -> Tensor:
    """KL [M] of what the teacher and the model give its likeliest tokens, and what is left of both."""
    p_mk = log_p_mk.exp()
    rest_p_m, rest_q_m = ((1 - probs_mk.sum(-1)).clamp_min(_LEAST) for probs_mk in (p_mk, log_q_mk.exp()))
    return (p_mk * (log_p_mk - log_q_mk)).sum(-1) + rest_p_m * (rest_p_m.log() - rest_q_m.log())


def _slopes(q_mk: Tensor, p_mk: Tensor) -> Tensor:
    """The derivative of `_divergences` by each log-probability of the model."""
    rest_p_m1, rest_q_m1 = (1 - probs_mk.sum(-1, keepdim=True) for probs_mk in (p_mk, q_mk))
    of_rest_m1 = rest_p_m1.clamp_min(_LEAST) / rest_q_m1.clamp_min(_LEAST) * (rest_q_m1 >= _LEAST)
    return of_rest_m1 * q_mk - p_mk


def _of_hidden(head: Any, hidden_md: Tensor, ids_mk: Tensor, log_probs_mk: Tensor) -> Tensor:
    return divergence(head(hidden_md), TopTokens(ids_mk, log_probs_mk))


def _losses_of_hidden(
    head: Any, hidden_md: Tensor, labels_m: Tensor, at_t: Tensor, ids_tk: Tensor, log_probs_tk: Tensor
) -> tuple[Tensor, Tensor]:
    return _losses(head(hidden_md), labels_m, at_t, TopTokens(ids_tk, log_probs_tk))


def _losses(logits_mv: Tensor, labels_m: Tensor, at_t: Tensor, teacher: TopTokens) -> tuple[Tensor, Tensor]:
    losses_m = token_losses(logits_mv, labels_m).float()
    taught_t = divergences(logits_mv[at_t], teacher)
    return losses_m.index_copy(0, at_t, taught_t), labels_likeliest(logits_mv, labels_m)
